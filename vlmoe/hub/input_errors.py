# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Report a fault of a user's input in one line that names the input.

At a damaged file libraries raise KeyError, TypeError, RecursionError and their own classes. Where
an input is read, and nowhere else, all of them become `InputError`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class InputError(ValueError):
    """A fault of the user's input: an option, a file, a row."""


@contextmanager
def reading(what: str, keep: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Turn any exception of the block into `InputError("what: reason")`, in one line.

    Args:
        what: the input that is read, as the user knows it: a path, `--option`, a row. A message
            that begins with it is kept as it is.
        keep: classes that pass through unchanged, as their messages name the input already.

    Raises:
        InputError: chained to what was raised; an InputError passes through unchanged.
    """
    kept: tuple[type[Exception], ...] = (InputError, *keep)
    try:
        yield
    except kept:
        raise
    except Exception as error:
        reason = reason_of(error)
        named = reason.startswith(what)
        raise InputError(reason if named else f"{what}: {reason}") from error


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Name the file or folder where an error of the disk, of the block, names none.

    Raises:
        OSError: `path cannot be written: reason`, for an OSError without a path, and for the
            errors of safetensors and torch at a full disk; other errors pass through unchanged.
    """
    try:
        yield
    except Exception as error:
        is_nameless = isinstance(error, OSError) and error.errno and not error.filename
        is_foreign = type(error).__name__ == "SafetensorError" or "PytorchStreamWriter" in str(
            error
        )
        if not (is_nameless or is_foreign):
            raise
        raise OSError(f"{path} cannot be written: {reason_of(error)}") from error


def reason_of(error: BaseException) -> str:
    """Return the message of an error in one line, led by its class where that helps."""
    message = str(error)
    if "Original Traceback" in message:  # of a data loader's worker
        message = message.rpartition(f"\n{type(error).__name__}: ")[2]
    message = " ".join(message.split())
    if isinstance(error, RecursionError):
        return "nested too deep"
    if isinstance(error, MemoryError):
        return f"not enough memory ({message})" if message else "not enough memory"
    if isinstance(error, (ValueError, OSError, ImportError)) and message:
        return message
    return f"{type(error).__name__}: {message}" if message else type(error).__name__

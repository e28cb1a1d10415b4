# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Whatever goes wrong while a user's input is read, as that input's fault in one line.

Libraries raise what they please at a damaged file: KeyError, TypeError, RecursionError, classes of
their own. Where an input is read, and nowhere else, all of it becomes `InputError`; an error of our
code elsewhere stays what it is.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class InputError(ValueError):
    """A fault of what the user gave: an option, a file, a row."""


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
        OSError: `path cannot be written: reason`, for an OSError without a path, and for what
            safetensors and torch raise of a full disk; other errors pass through unchanged.
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
    """The message of an error in one line, led by its class where the message alone says little."""
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

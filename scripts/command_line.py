# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""The boundary that all commands share: exit codes, and errors in one line."""

import logging
import os
import sys
import traceback
from collections.abc import Callable

TRACEBACK_FLAG = "--traceback"
EXIT_ERROR = 2
# They warn on import, about kernels for other GPUs and names that other packages register.
NOISY_LOGGERS = ("torchao", "torch.utils._pytree")
EXIT_INTERRUPTED = 130

# Causes outside our code, of classes that only their own library has: a full disk, full memory.
_OUTSIDE = ("SafetensorError", "OutOfMemoryError")
_NO_MEMORY = "can't allocate memory"


def run_command(
    name: str, command: Callable[[list[str]], None], argv: list[str] | None = None
) -> int:
    """Run `command` with the arguments and return the exit code.

    Wrong input is reported in one line on stderr with exit code 2. That covers every error raised
    while input is read (`vlmoe.hub.input_errors`), other ValueErrors, OSErrors such as a missing
    file or a full disk, the ImportError of a missing extra, and insufficient memory. `--traceback`
    or VLMOE_TRACEBACK=1 prints the traceback too. Other errors are bugs and keep their traceback.
    """
    arguments = sys.argv[1:] if argv is None else argv
    show_traceback = TRACEBACK_FLAG in arguments or os.environ.get("VLMOE_TRACEBACK", "") not in (
        "",
        "0",
    )
    _print_any_text()
    for logger in NOISY_LOGGERS:
        logging.getLogger(logger).setLevel(logging.ERROR)
    try:
        command([argument for argument in arguments if argument != TRACEBACK_FLAG])
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except Exception as error:
        if not is_outside_fault(error):
            raise
        if show_traceback:
            traceback.print_exc()
        _end_progress_bars()
        print(f"{name}: error: {one_line(error)}", file=sys.stderr)
        return EXIT_ERROR
    return 0


def is_outside_fault(error: Exception) -> bool:
    """Return whether the user's input or machine caused an error, and not a bug."""
    if isinstance(error, (ValueError, OSError, ImportError, MemoryError)):
        return True
    return type(error).__name__ in _OUTSIDE or _NO_MEMORY in str(error)


def one_line(error: Exception) -> str:
    """Return the message of an error, without the traceback that a data loader's worker adds."""
    message = str(error)
    if "Original Traceback" in message:
        message = message.rpartition(f"\n{type(error).__name__}: ")[2]
    if isinstance(error, MemoryError) or _NO_MEMORY in message:
        message = f"not enough memory: {message or 'try smaller batches or sizes'}"
    home = os.environ.get("HF_HOME")
    if home and isinstance(error, OSError) and str(error.filename or "").startswith(home):
        message = f"HF_HOME is {home!r}, which cannot be used: {message}"
    return " ".join(message.split()) or type(error).__name__


def readable(text: str, what: str) -> str:
    """Return a text from the command line, decoded as UTF-8 where the locale could not decode it.

    Python keeps bytes that the locale's encoding does not define as lone surrogates.

    Raises:
        ValueError: the bytes are no UTF-8; the message names `what`.
    """
    try:
        text.encode("utf-8")
        return text
    except UnicodeEncodeError:
        pass
    try:
        return text.encode(sys.getfilesystemencoding(), "surrogateescape").decode("utf-8")
    except UnicodeError as error:
        raise ValueError(f"{what} is no text in UTF-8: {text!a}.") from error


def _print_any_text() -> None:
    """Escape characters that a terminal or file cannot show: an error would lose the answer."""
    for stream in (sys.stdout, sys.stderr):
        if getattr(stream, "errors", None) == "strict" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _end_progress_bars() -> None:
    """End the lines of unfinished progress bars, so that the error gets its own line."""
    tqdm = sys.modules.get("tqdm")
    for bar in list(getattr(tqdm.tqdm, "_instances", ())) if tqdm else ():
        bar.close()

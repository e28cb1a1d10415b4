# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""What all commands share: errors in one line, exit codes, and where to read on."""

import os
import sys
import traceback
from collections.abc import Callable

TRACEBACK_FLAG = "--traceback"
EXIT_ERROR = 2
EXIT_INTERRUPTED = 130

# Causes outside our code, of classes that only their own library has: a full disk, full memory.
_OUTSIDE = ("SafetensorError", "OutOfMemoryError")
_NO_MEMORY = "can't allocate memory"


def run_command(
    name: str, command: Callable[[list[str]], None], argv: list[str] | None = None
) -> int:
    """Run `command` with the arguments and return the exit code.

    Wrong input is reported in one line on stderr with exit code 2: whatever was raised while it was
    read (`vlmoe.hub.input_errors`), other ValueErrors, OSErrors such as a missing file or a
    full disk, an ImportError of an extra, and memory that does not suffice. `--traceback` or
    VLMOE_TRACEBACK=1 shows where it came from. Other errors are bugs: they keep their traceback.
    """
    arguments = sys.argv[1:] if argv is None else argv
    show_traceback = TRACEBACK_FLAG in arguments or os.environ.get("VLMOE_TRACEBACK", "") not in (
        "",
        "0",
    )
    _print_any_text()
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
    """Whether an error tells of the user's input or machine, not of a bug."""
    if isinstance(error, (ValueError, OSError, ImportError, MemoryError)):
        return True
    return type(error).__name__ in _OUTSIDE or _NO_MEMORY in str(error)


def one_line(error: Exception) -> str:
    """The message of an error; of one from a data loader's worker, without its traceback."""
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
    """A text from the command line, also where the locale's encoding is not that of the terminal.

    Python keeps bytes that its locale does not know as lone surrogates; they are read as UTF-8.

    Raises:
        ValueError: they are no UTF-8; the message names `what`.
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
    """Let a terminal or file that is not Unicode show `\\xe9` for what it lacks: an error while
    printing would lose the answer."""
    for stream in (sys.stdout, sys.stderr):
        if getattr(stream, "errors", None) == "strict" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _end_progress_bars() -> None:
    """End the lines of bars that are under way, so that the error has its own."""
    tqdm = sys.modules.get("tqdm")
    for bar in list(getattr(tqdm.tqdm, "_instances", ())) if tqdm else ():
        bar.close()

# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""What all commands share: errors in one line, exit codes, and where to read on."""

import os
import sys
import traceback
from collections.abc import Callable

TRACEBACK_FLAG = "--traceback"
EXIT_ERROR = 2
EXIT_INTERRUPTED = 130


def run_command(
    name: str, command: Callable[[list[str]], None], argv: list[str] | None = None
) -> int:
    """Run `command` with the arguments and return the exit code.

    Wrong input (ValueError, OSError such as a missing file, ImportError of an extra) is reported in
    one line on stderr with exit code 2; `--traceback` or VLMOE_TRACEBACK=1 shows where it came
    from. Other errors are bugs: they keep their traceback.
    """
    arguments = sys.argv[1:] if argv is None else argv
    show_traceback = TRACEBACK_FLAG in arguments or os.environ.get("VLMOE_TRACEBACK", "") not in (
        "",
        "0",
    )
    try:
        command([argument for argument in arguments if argument != TRACEBACK_FLAG])
    except (ValueError, OSError, ImportError) as error:
        if show_traceback:
            traceback.print_exc()
        print(f"{name}: error: {one_line(error)}", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0


def one_line(error: Exception) -> str:
    """The message of an error; of one from a data loader's worker, without its traceback."""
    message = str(error)
    if "Original Traceback" in message:
        message = message.rpartition(f"\n{type(error).__name__}: ")[2]
    return " ".join(message.split()) or type(error).__name__

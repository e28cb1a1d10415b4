# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Try a foreign chat template in a child process before it is used.

transformers' sandbox keeps a template from running code, not from endless loops or filling the
memory. The child renders short chats under limits of time and address space, without torch, in
0.7 s of processor time. It does not find a template that misbehaves for other chats only.
"""

import json
import logging
import subprocess
import sys
from functools import lru_cache

SECONDS = 10
START_SECONDS = 120
"""The time limit of the child's imports."""
MEMORY = 2**30
"""Bytes of address space beyond the child's at start."""
MAX_CHARACTERS = 1_000_000
"""The longest text that the short chats may become."""
FAULT = 3
PROBES: tuple[tuple[bool, list[dict[str, object]]], ...] = (
    (True, [{"role": "user", "content": "a"}]),
    (True, [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}]}]),
    (
        False,
        [
            {"role": "system", "content": "a"},
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "a"},
        ],
    ),
)


def try_templates(template: str | dict[str, str] | None, source: str) -> None:
    """Render short chats by the chat template or templates of `source`, unless it is our own.

    Args:
        template: a processor's `chat_template`: None, a string, or strings by name.
        source: how errors call the folder, file or Hub id.

    Raises:
        InputError: a template does not end, takes too much memory, writes too much or is no
            template.
    """
    # here, since the child runs this file by its path
    from ..processing.chat_template import DEFAULT_CHAT_TEMPLATE
    from .input_errors import InputError

    for each in template.values() if isinstance(template, dict) else [template]:
        if isinstance(each, str) and each != DEFAULT_CHAT_TEMPLATE:
            fault = _fault(each)
            if fault:
                raise InputError(
                    f"{source}: its chat template (chat_template.jinja) {fault}. Take it from a "
                    "source that you trust, or write one that ends."
                )


@lru_cache
def _fault(template: str) -> str | None:
    """Describe the fault of a template, as a predicate; None for a sound one."""
    child = subprocess.Popen(
        [sys.executable, "-P", __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )
    with child:
        try:
            # `communicate` takes the limit of time from here, so that the import is waited for
            started = _first_line(child)
            if started == "unlimited":
                _say_unlimited()
            if not started:
                return f"cannot be tried: {_last_line(child.communicate()[1])}"
            output, errors = child.communicate(json.dumps(template), timeout=SECONDS)
        except subprocess.TimeoutExpired:
            child.kill()
            return f"does not end within {SECONDS} seconds"
    if child.returncode == 0:
        return None
    if child.returncode == FAULT:
        return output.strip()
    return f"kills the process that renders it: {_last_line(errors) or child.returncode}"


def _first_line(child: "subprocess.Popen[str]") -> str:
    """Read the child's first line, which it prints once it is ready; empty if it is late."""
    from threading import Timer

    timer = Timer(START_SECONDS, child.kill)
    timer.start()
    try:
        return child.stdout.readline().strip()  # type: ignore[union-attr]
    finally:
        timer.cancel()


def _last_line(text: str) -> str:
    return next(reversed(text.strip().splitlines()), "")


@lru_cache
def _say_unlimited() -> None:
    logging.getLogger(__name__).warning(
        "This system cannot limit the memory of a process: a chat template is tried under a limit "
        "of %s seconds only.",
        SECONDS,
    )


def _limit_memory() -> bool:
    """Limit the address space of this process; return False if the system cannot."""
    try:
        import resource

        with open("/proc/self/statm") as file:
            start = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (start + MEMORY, start + MEMORY))
    except (ImportError, OSError, ValueError):
        return False
    return True


def _child() -> int:
    """Render the probes by the template on stdin; print the fault and return `FAULT`."""
    from jinja2 import TemplateSyntaxError
    from transformers.utils.chat_template_utils import render_jinja_template

    print("limited" if _limit_memory() else "unlimited", flush=True)
    template = json.load(sys.stdin)
    for prompt, chat in PROBES:
        try:
            (text,), _ = render_jinja_template(
                [chat], chat_template=template, add_generation_prompt=prompt
            )
        except MemoryError:
            print(f"takes more than {MEMORY / 2**30:g} GiB of memory")
            return FAULT
        except (TemplateSyntaxError, RecursionError) as error:
            print(f"is no template: {type(error).__name__}: {' '.join(str(error).split())}")
            return FAULT
        except Exception:
            continue
        if len(text) > MAX_CHARACTERS:
            print(f"writes {len(text):,} characters for a chat of {len(chat)} letters")
            return FAULT
    return 0


if __name__ == "__main__":
    sys.exit(_child())

# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""What happens to rows of a task that are too long for the model."""

from typing import Literal

from .table import get_task
from .task import Task


def default_on_long_rows(task: str | Task | None) -> str:
    """Return what happens to long rows of a task, "error" without one."""
    return "error" if task is None else get_task(task).on_long_rows


def shortening(on_long_rows: str, task: str | Task | None) -> bool | Literal["longest"]:
    """Return `shorten_prompts` of the collators for a choice of `on_long_rows`.

    A task whose rows are long by default has a document beside its instruction. Other questions may
    ask something at their end, so that they lose their beginning.
    """
    if on_long_rows != "shorten-prompt":
        return False
    is_document = task is not None and get_task(task).on_long_rows == "shorten-prompt"
    return "longest" if is_document else True

# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""`load_rows` with a task: the rows of a dataset, in the columns that datasets of the task have."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Unpack

from ..data.loading import LoadOptions
from ..data.loading import load_rows as load_conversations
from .mixture import DataSource, MixedRows, checked_sources, mixed_rows
from .table import get_task, task_reader
from .task import Task

if TYPE_CHECKING:
    from datasets import Dataset


def load_rows(
    source: str | Sequence[DataSource],
    split: str = "train",
    *,
    task: str | Task | None = None,
    prompt: str | None = None,
    **options: Unpack[LoadOptions],
) -> "Dataset | MixedRows":
    """Load a split as conversational rows.

    Args:
        source: as for `vlmoe.data.load_rows`: a dataset's name, a file, a folder, or a Hub id. Or a
            list of `{"source", "split", "task", "prompt", "weight"}`, all but the first optional:
            their rows one source after the other, with the columns `task` and, where one of them
            has a weight, `loss_weight`; `split` and `options` then hold for each.
        split: its name; on the Hub also a slice such as `train[:10%]`.
        task: whose columns the rows have, see `TASKS`; by default rows of any common form are read.
            Rows with `messages` are taken as they are.
        prompt: the task's instruction, by default its own.
        **options: see `LoadOptions`.

    Raises:
        FileNotFoundError: as `vlmoe.data.load_rows`.
        ValueError: the task is unknown or the columns do not fit it, or copies
            altered by `altered_copies` would be wrong; as `vlmoe.data.load_rows`.
    """
    if not isinstance(source, str):
        sources = checked_sources(source)
        loaded = [
            load_rows(
                each["source"],
                each.get("split", split),
                task=each.get("task", task),
                prompt=each.get("prompt", prompt),
                **options,
            )
            for each in sources
        ]
        return mixed_rows(sources, loaded)
    copies = options.get("altered_copies", 0)
    if copies and task is not None and get_task(task).bound_to_place:
        raise ValueError(
            f"altered_copies={copies} (--altered_copies) shifts and mirrors pictures, but "
            f"answers of the task {get_task(task).name} say where things are; leave it out."
        )
    return load_conversations(source, split, reader=task_reader(task, prompt), **options)

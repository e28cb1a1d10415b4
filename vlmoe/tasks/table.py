# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""The table of tasks, a task by its name, and the reader of its rows."""

import re
from collections.abc import Collection
from dataclasses import replace
from functools import partial

from ..data.row_fields import CAPTION_COLUMNS, IMAGE_COLUMNS, VIDEO_COLUMNS, did_you_mean
from ..data.row_formats import RowFormat, RowReader, format_of
from . import rows
from .class_metrics import accuracy_and_f1
from .detection import BOX_METRIC
from .object_rows import OBJECTS, objects
from .task import Task
from .text_metrics import bleu, chrf, cider, rouge_l

CAPTIONS = (*CAPTION_COLUMNS, "captions")
LABELS = ("label", "labels")

TASKS = {
    task.name: task
    for task in (
        Task(
            "image-captioning",
            (IMAGE_COLUMNS, CAPTIONS),
            rows.captions,
            "Describe the image.",
            (cider, bleu, rouge_l, chrf),
            max_new_tokens=64,
        ),
        Task(
            "image-classification",
            (IMAGE_COLUMNS, LABELS),
            rows.classes,
            "What is in the image? Answer with the name of the class.",
            (accuracy_and_f1,),
        ),
        Task(
            "object-detection",
            (IMAGE_COLUMNS, OBJECTS),
            objects,
            "Find all objects. Answer with their boxes and labels in JSON.",
            measures=True,
            max_new_tokens=None,
            bound_to_place=True,
            certain_metric=BOX_METRIC,
        ),
        Task("visual-question-answering", (("question",), ("answer",)), rows.questions, ""),
        Task(
            "video-text-to-text",
            (VIDEO_COLUMNS, (*CAPTION_COLUMNS, "answer", "summary")),
            rows.videos,
            "Describe the video.",
            (cider, bleu, rouge_l, chrf),
            max_new_tokens=128,
            optional=("question",),
        ),
        Task(
            "translation",
            (("translation",),),
            rows.translations,
            "Translate from {source} to {target}:",
            (bleu, chrf),
            max_new_tokens=128,
            on_long_rows="shorten-prompt",
        ),
        Task(
            "summarization",
            (("document", "article", "dialogue"), ("summary", "highlights")),
            rows.documents,
            "Summarize the text:",
            (rouge_l,),
            max_new_tokens=128,
            on_long_rows="shorten-prompt",
        ),
        Task("image-text-retrieval", (IMAGE_COLUMNS, CAPTIONS), rows.captions, ""),
    )
}
"""By name. `visual-question-answering` also reads every other form of `row_formats.py`."""

QUESTIONS = "visual-question-answering"
TRANSLATION = re.compile(r"translation_(\w+)_to_(\w+)")


def get_task(task: str | Task) -> Task:
    """Return a task by its name; `translation_de_to_en` is translation in that direction.

    Raises:
        ValueError: there is no such task; the message names the nearest one and all of them.
    """
    if isinstance(task, Task):
        return task
    if task in TASKS:
        return TASKS[task]
    named = TRANSLATION.fullmatch(task)
    if named is not None:
        convert = partial(rows.translations, direction=(named[1], named[2]))
        return replace(TASKS["translation"], convert=convert)
    raise ValueError(
        f"there is no task {task!r}{did_you_mean(task, TASKS)}; there are {', '.join(TASKS)}, and "
        "translation_de_to_en for a direction."
    )


def task_reader(task: str | Task | None, prompt: str | None = None) -> RowReader:
    """Return the reader of a task's rows for `load_rows` and `as_rows` of `vlmoe.data`.

    Rows with `messages` are taken as they are. Without a task, rows that only a task reads are an
    error that names it.

    Args:
        task: its name, or a task of your own.
        prompt: the instruction, by default the task's own.

    Raises:
        ValueError: the task is unknown, or there is a prompt without a task.
    """
    if task is not None:
        return partial(_of_task, get_task(task), prompt)
    if prompt is not None:
        raise ValueError(f"the prompt {prompt!r:.80} is for a task; give `task` (--task), too.")
    return _of_any


def _of_task(
    task: Task, prompt: str | None, columns: Collection[str], source: str
) -> RowFormat | None:
    """Return the form of a task's rows; None for rows with `messages`."""
    other = format_of(columns) if task.name == QUESTIONS and not task.fits(columns) else None
    if other is None and "messages" not in columns:
        if not task.fits(columns):
            raise ValueError(f"{task.fault(columns, source)}.{_others(columns, task)}")
        return task.form(columns, prompt, source)
    if prompt is not None:
        what = "`messages`" if other is None else other.name
        raise ValueError(f"{source} has {what} with an instruction; leave out the prompt.")
    return other


def _of_any(columns: Collection[str], source: str) -> RowFormat | None:
    """Return the form of rows that need no task; name the tasks of others."""
    form = format_of(columns)
    fitting = [] if form or "messages" in columns else _fitting(columns)
    if fitting:
        raise ValueError(
            f"{source}: the columns {', '.join(map(str, columns))} fit the task "
            f"{' and the task '.join(fitting)}; say which is meant: task={fitting[0]!r} "
            f"(--task {fitting[0]})."
        )
    return form


def _fitting(columns: Collection[str]) -> list[str]:
    return [name for name, task in TASKS.items() if task.fits(columns)]


def _others(columns: Collection[str], task: Task) -> str:
    fitting = [name for name in _fitting(columns) if name != task.name]
    return f" They fit the task {' and the task '.join(fitting)}." if fitting else ""

# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Tasks: columns of rows to conversations, a default prompt, and metrics.

Read in this order:

- task.py: `Task`, the one concept;
- rows.py: the converters of rows, from a task's columns to conversations;
- table.py: `TASKS`, a task by its name (`get_task`), and the reader of its rows;
- loading.py: `load_rows` with a task; long_texts.py: what happens to rows that are too long;
- text_metrics.py with cider.py, class_metrics.py, retrieval.py: metrics;
- boxes.py, object_rows.py, detection.py: boxes as text, and their metrics.
"""

from typing import TYPE_CHECKING

from ..hub.lazy_names import lazy_names

if TYPE_CHECKING:
    from .loading import load_rows as load_rows
    from .table import TASKS as TASKS
    from .table import get_task as get_task
    from .table import task_reader as task_reader
    from .task import Metric as Metric
    from .task import Task as Task

# Imported on first use, so that one module of the room does not load all others.
__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "Metric": "task",
        "TASKS": "table",
        "Task": "task",
        "get_task": "table",
        "load_rows": "loading",
        "task_reader": "table",
    },
)

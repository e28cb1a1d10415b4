# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Options that several commands share, each declared once, and the kinds of values they take."""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from .command_line import readable

RUNNING, IMAGES = "Running the model", "Images of the data"


def place(text: str) -> str:
    """Return a path, a preset or a Hub id, with the home folder in place of a leading `~`.

    Raises:
        ValueError: the text is empty.
    """
    if not text:
        raise ValueError("an empty text names nothing")
    return os.path.expanduser(text)


def text(given: str) -> str:
    """Return a text from the command line; raise `ValueError` if it is empty or no UTF-8."""
    if not given:
        raise ValueError("the text is empty")
    return readable(given, "It")


def comma_list(given: str) -> list[str]:
    """Return the texts between commas; raise `ValueError` if one is empty or no UTF-8."""
    return [text(each.strip()) for each in given.split(",")]


def share(number: str) -> float:
    """Return a number above 0 and at most 1; raise `ValueError` for another."""
    value = float(number)
    if not 0 < value <= 1:
        raise ValueError("must be above 0 and at most 1")
    return value


def finite(number: str) -> float:
    """Return a number that is 0 or more and finite; raise `ValueError` for another."""
    value = float(number)
    if not (math.isfinite(value) and value >= 0):
        raise ValueError("must be 0 or more, and finite")
    return value


def dropout(number: str) -> float:
    """Return a number from 0 up to, but not, 1; raise `ValueError` for another."""
    value = float(number)
    if not 0 <= value < 1:
        raise ValueError("must be 0 or more, and below 1")
    return value


def refuse_unread(remedy: str, **given: bool) -> None:
    """Refuse options that were given where nothing reads them.

    Raises:
        ValueError: names the first of them, and the remedy.
    """
    for name, is_given in given.items():
        if is_given:
            raise ValueError(f"--{name} changes nothing here: {remedy}, or leave it out.")


def require_files(images: Sequence[str] | None) -> None:
    """Refuse an image file that does not exist, before a model is loaded for it.

    Raises:
        FileNotFoundError: names the file.
    """
    for path in images or ():
        if not Path(path).expanduser().is_file():
            raise FileNotFoundError(f"There is no image file {path}.")


SavedModel = Annotated[
    str, typer.Option(parser=place, metavar="MODEL", help="The model: a folder or a Hub id.")
]
Dataset = Annotated[
    str,
    typer.Option(
        parser=place,
        metavar="DATASET",
        help="Data: a Hub id, a file (parquet, JSON, CSV), a folder, or easy_vqa.",
    ),
]
TaskName = Annotated[
    str | None,
    typer.Option(
        metavar="TASK",
        help="Whose columns the data has: image-captioning, image-classification, translation, ... "
        "(default: conversations, or questions and answers).",
    ),
]
Prompt = Annotated[
    str | None,
    typer.Option(parser=text, help="The task's instruction (default: its own)."),
]
Rows = Annotated[int | None, typer.Option(min=1, help="Read only the first N rows.")]
AnswerTokens = Annotated[int, typer.Option(min=1, help="The longest answer, in tokens.")]
Pictures = Annotated[
    list[str] | None,
    typer.Option(
        parser=place, metavar="FILE", help="An image file; repeat the option for several images."
    ),
]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="The seed of all random draws.")]

Device = Annotated[
    str | None,
    typer.Option(
        help="cpu, cuda, cuda:1, mps, ... By default the best one available.",
        rich_help_panel=RUNNING,
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        help="Number type of the weights: float32, bfloat16, ... By default the saved one.",
        rich_help_panel=RUNNING,
    ),
]
Attention = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Attention kernels: eager, sdpa, flash_attention_2, ...",
        rich_help_panel=RUNNING,
    ),
]
ExpertKernels = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Expert kernels: eager, batched_mm, grouped_mm, auto, ...",
        rich_help_panel=RUNNING,
    ),
]

OutsideImages = Annotated[
    bool,
    typer.Option(
        help="Open image files outside the dataset's own folder. Only for data that you trust.",
        rich_help_panel=IMAGES,
    ),
]
ImageUrls = Annotated[
    bool,
    typer.Option(
        help="Download images given by http(s) URL. Only for data that you trust.",
        rich_help_panel=IMAGES,
    ),
]
ImagePixels = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Refuse images with more pixels (default: the processor's limit, 64 million).",
        rich_help_panel=IMAGES,
    ),
]
ImageSide = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Refuse images with a longer side, in pixels (default: the processor's limit, 32768).",
        rich_help_panel=IMAGES,
    ),
]

# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Datasets that come as Python packages, by the names under which `load_rows` knows them."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import Dataset

PACKAGED = ("easy_vqa", "easy_vqa_captions", "emoji", "emoji_held_out", "scenes", "scenes_emoji")


def packaged_splits(source: str) -> tuple[str, ...]:
    """Return the splits of one of `PACKAGED`, `train` first."""
    from . import easy_vqa, emoji, scenes

    if source.startswith("scenes"):
        return tuple(scenes.SPLITS)
    return easy_vqa.SPLITS if source.startswith("easy_vqa") else emoji.SPLITS


def packaged_rows(source: str, split: str) -> "Dataset":
    """Return the rows of a split of one of `PACKAGED`.

    Raises:
        ValueError: there is no such split.
        ImportError: the package is missing; the message names the extra.
    """
    if source.startswith("scenes"):
        from .scenes import scene_rows

        return scene_rows(split, emoji=source == "scenes_emoji")
    if source.startswith("emoji"):
        from .emoji import name_rows

        return name_rows(split, held_out=source == "emoji_held_out")
    from .easy_vqa import caption_rows, question_rows

    return question_rows(split) if source == "easy_vqa" else caption_rows(split)

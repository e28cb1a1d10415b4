# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Folders of pictures, each with its caption in a text file of the same name beside it."""

from pathlib import Path
from typing import TYPE_CHECKING

from .image_column import ImageSources

if TYPE_CHECKING:
    from datasets import Dataset

PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".jp2"}


def captioned_pictures(folder: Path) -> list[Path]:
    """The pictures below a folder, in order; none where no picture has a caption.

    Raises `ValueError` naming the first picture that lacks its caption where others have one.
    """
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in PICTURES)
    bare = [file for file in files if not file.with_suffix(".txt").is_file()]
    if len(bare) == len(files):
        return []
    if bare:
        raise ValueError(
            f"{bare[0]} has no caption {bare[0].with_suffix('.txt').name} beside it, nor have "
            f"{len(bare) - 1} other pictures; write the captions or move the pictures away."
        )
    return files


def caption_rows(files: list[Path], sources: ImageSources) -> "Dataset":
    """The pictures with their captions: `id` and `image`, the path in the folder, and `text`.

    Raises `ValueError` naming a caption that is no UTF-8, or a link out of the folder.
    """
    from datasets import Dataset

    texts = []
    for file in files:
        caption = file.with_suffix(".txt")
        sources.require_inside(caption, str(caption), "a caption")
        try:
            texts.append(caption.read_text(encoding="utf-8-sig").strip())
        except UnicodeDecodeError as error:
            raise ValueError(f"{caption} is not UTF-8: {error}. Save it as UTF-8.") from error
    names = [str(file.relative_to(sources.folder)) for file in files]
    return Dataset.from_dict({"id": names, "image": names, "text": texts})

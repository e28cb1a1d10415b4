# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Datasets in the conversational form, from wherever they are.

`load_rows` gives a `datasets.Dataset` with the columns

- `id`: string, names the row in errors: the source's own `id`, or "split[number]";
- `messages`: as the source has them; `conversations.py` describes the form, `row_formats.py` the
  forms of other projects that are read as it;
- `images`: `List(datasets.Image(decode=False))`. Images stay encoded until they are collated, which
  is several times faster (the collator remembers processed images by their bytes) and lets a broken
  one be reported by name. `vlmoe.data.images.open_image(row["images"][0], row["id"])` gives a
  PIL image;
- `question_type`, if the source has it: a string or one per conversation, for tables by type.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..hub.input_errors import reading
from ..processing.image_sources import DEFAULT_LIMITS, ImageLimits, is_url
from .content_digest import content_digest
from .conversations import without_image_parts
from .image_column import ImageSources, image_files, with_image_column
from .images import altered_image
from .local_files import FORMATS, local_splits, read_local
from .row_datasets import as_conversations, standard_columns

if TYPE_CHECKING:
    from datasets import Dataset


def load_rows(
    source: str,
    split: str = "train",
    *,
    limit: int | None = None,
    altered_copies: int = 0,
    with_images: bool = True,
    config_name: str | None = None,
    allow_outside_images: bool = False,
    allow_image_urls: bool = False,
    image_limits: ImageLimits = DEFAULT_LIMITS,
    faults: list[str] | None = None,
) -> "Dataset":
    """Load a split as conversational rows.

    Arguments:
        source: `easy_vqa`, `easy_vqa_captions`, a parquet, json(l), csv or tsv file, a folder of
            them, an image folder with `metadata.jsonl` or `metadata.csv` or with a caption in a
            text file beside each picture, a folder written by `save_to_disk`, or the id of a
            dataset on the Hub.
        split: its name; on the Hub also a slice such as `train[:10%]`.
        limit: keep the first rows only.
        altered_copies: append so many copies of every row with its images shifted a little, every
            other copy also mirrored left to right, the first one too. The copies are made once, so
            that every epoch and every resumed run sees the same; the texts stay, so they must not
            speak of left and right, nor the images show text.
        with_images: False takes images and image parts away, for a question-only baseline.
        config_name: the configuration of a Hub dataset that has several.
        allow_outside_images: open image files outside the dataset's folder (of a file: its folder;
            on the Hub: what was downloaded of the dataset), which rows name by absolute paths, `..`
            or symbolic links. By default an error, since anybody may have made the data.
        allow_image_urls: keep http(s) URLs of images, an error by default; the collator, with
            `allow_image_urls` too, downloads them.
        image_limits: the largest image that is opened for altered copies.
        faults: where given, takes what is wrong with single rows and images in place of an error
            (`row_datasets.is_faulty` tells what is left of them).

    Raises `FileNotFoundError` for a source that does not exist and `ValueError` for a split it does
    not have, missing columns, unreadable or no rows; each names the culprit. Single rows are
    checked when they are collated.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1 or None, got {limit}.")
    if altered_copies < 0:
        raise ValueError(f"altered_copies must be at least 0, got {altered_copies}.")
    allowed: dict[str, Any] = {
        "allow_outside_images": allow_outside_images,
        "allow_image_urls": allow_image_urls,
        "faults": faults,
    }
    with reading(source, keep=(ValueError, OSError, ImportError)):
        rows = standard_columns(_read(source, split, config_name, allowed), source, split)
    if limit is not None:
        rows = rows.select(range(min(limit, len(rows))))
    if not with_images:
        rows = _without_images(rows)
    if not altered_copies:
        return rows
    options = {"limits": image_limits, "allow_urls": allow_image_urls}
    return _with_altered_copies(rows, altered_copies, options)


def split_names(source: str) -> list[str]:
    """The names of the splits of a source, as `load_rows` takes it; `train` comes first.

    Raises `FileNotFoundError` for a source that does not exist.
    """
    if source in ("easy_vqa", "easy_vqa_captions"):
        return ["train", "test"]
    path = Path(source).expanduser()
    if path.exists():
        return sorted(local_splits(path), key=lambda name: (name != "train", name))
    _require_hub_id(source)
    from datasets import get_dataset_split_names

    try:
        return get_dataset_split_names(source)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(_not_found(source, error)) from error


def _read(source: str, split: str, config_name: str | None, allowed: dict[str, Any]) -> "Dataset":
    """The rows of a source, images normalised to one column."""
    try:
        import datasets  # noqa: F401
    except ImportError as error:
        raise ImportError(
            'loading data needs the datasets library: pip install "vlmoe[train]".'
        ) from error
    if source in ("easy_vqa", "easy_vqa_captions"):
        from .easy_vqa import caption_rows, question_rows

        return question_rows(split) if source == "easy_vqa" else caption_rows(split)
    path = Path(source).expanduser()
    if path.exists():
        return read_local(path, split, **allowed)
    _require_hub_id(source)
    rows = as_conversations(_read_hub(source, split, config_name), source, allowed["faults"])
    return with_image_column(rows, _hub_image_sources(source, allowed), source)


def _require_hub_id(source: str) -> None:
    """Raise `FileNotFoundError` for what can only be a path."""
    path = Path(source).expanduser()
    if path.is_absolute() or source.startswith((".", "~")) or path.suffix in FORMATS:
        raise FileNotFoundError(f"there is no file or folder {source}.")


def _not_found(source: str, error: Exception) -> str:
    return (
        f"{source!r} is no file or folder here, not easy_vqa or easy_vqa_captions, and could not "
        f"be read from the Hub: {error}"
    )


def _read_hub(source: str, split: str, config_name: str | None) -> "Dataset":
    """A dataset of the Hub; its errors in one sentence."""
    from datasets import load_dataset

    try:
        return load_dataset(source, name=config_name, split=split)
    except OSError as error:
        raise FileNotFoundError(_not_found(source, error)) from error
    except ValueError as error:
        raise ValueError(f"the dataset {source!r}, split {split!r}: {error}") from error


def _hub_image_sources(source: str, allowed: dict[str, Any]) -> ImageSources:
    """Images of a Hub dataset are files in its part of the cache, or were in its archives."""
    from datasets import config
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.file_download import repo_folder_name

    downloaded = Path(HF_HUB_CACHE) / repo_folder_name(repo_id=source, repo_type="dataset")
    roots = (downloaded, Path(config.EXTRACTED_DATASETS_PATH))
    return ImageSources(
        Path(),
        tuple(Path(os.path.realpath(root)) for root in roots),
        remedy=f" Download the dataset (hf download {source} --repo-type dataset --local-dir "
        "FOLDER) and give its folder.",
        **allowed,
    )


def _without_images(rows: "Dataset") -> "Dataset":
    """The rows without images and image parts."""
    return rows.map(
        _text_of_batch, batched=True, features=rows.features, desc="removing images"
    ).select_columns(rows.column_names)


def _with_altered_copies(rows: "Dataset", copies: int, options: dict[str, Any]) -> "Dataset":
    """The rows, then their altered copies, each time in the same order."""
    from datasets import concatenate_datasets

    files = list(image_files(rows))
    key = ["altered", rows._fingerprint, repr(options)]
    if any(map(is_url, files)):  # what the web will answer is not known
        files, key = [], [*key, os.urandom(16).hex()]
    altered = [
        rows.map(
            _altered_row,
            fn_kwargs={"number": number, "options": options},
            features=rows.features,
            new_fingerprint=content_digest(files, *key, str(number)),
            desc=f"altering images, copy {number} of {copies}",
        )
        for number in range(1, copies + 1)
    ]
    return concatenate_datasets([rows, *altered]).select_columns(rows.column_names)


# Functions of the module, not lambdas: `datasets` names its cache by them, and cannot hash lambdas
# whose callees are recursive.


def _text_of_batch(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """The changed columns of a batch of rows without images."""
    messages = [without_image_parts(messages) for messages in batch["messages"]]
    return {"messages": messages, "images": [[] for _ in messages]}


def _altered_row(row: dict[str, Any], number: int, options: dict[str, Any]) -> dict[str, Any]:
    """The changed columns of a row with altered images."""
    name = f"row {row['id']!r}"
    images = [altered_image(each, name, number, **options) for each in row["images"]]
    return {"id": f"{row['id']} altered {number}", "images": images}

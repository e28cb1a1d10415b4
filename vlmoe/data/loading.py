# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""`load_rows`: the rows of a dataset, from any source, in the conversational form.

The result is a `datasets.Dataset` with the columns

- `id`: string, names the row in errors: the source's own `id`, or "split[number]";
- `messages`: as the source has them; `conversations.py` describes the form, `row_formats.py` the
  forms of other projects that are read, too;
- `images`: `List(datasets.Image(decode=False))`. Images stay encoded until they are collated. This
  is several times faster, since the collator remembers processed images by their bytes, and lets a
  broken one be reported by name. `vlmoe.data.open_image(row["images"][0], row["id"])` returns a
  PIL image;
- `videos`, if the source has videos: `List(datasets.Video(decode=False))`, or lists of frames;
- `question_type`, if the source has it: a string or one per conversation, for tables by type.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from ..hub.input_errors import reading
from ..processing.image_sources import DEFAULT_LIMITS, ImageLimits
from .augmentation import with_altered_copies
from .images import ImageSources
from .local_files import FORMATS, ImageRules, local_splits, read_local
from .packaged import PACKAGED, packaged_rows, packaged_splits
from .row_datasets import as_conversations, standard_columns
from .row_formats import RowReader, format_of, without_image_parts

if TYPE_CHECKING:
    from datasets import Dataset


class LoadOptions(TypedDict, total=False):
    """The options of `load_rows` beside the data's names; see there."""

    limit: int | None
    altered_copies: int
    with_images: bool
    config_name: str | None
    allow_outside_images: bool
    allow_image_urls: bool
    image_limits: ImageLimits
    faults: list[str] | None


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
    reader: RowReader = format_of,
) -> "Dataset":
    """Load a split as conversational rows.

    Args:
        source: one of `PACKAGED`, a parquet, json(l), csv or tsv file, a folder of
            them, an image folder with `metadata.jsonl` or `metadata.csv`, with a caption in a
            text file beside each picture or with a sub-folder for each class, a folder written by
            `save_to_disk`, or the id of a dataset on the Hub.
        split: its name; on the Hub also a slice such as `train[:10%]`.
        limit: keep only the first rows.
        altered_copies: append this many copies of every row with shifted images. Every other copy,
            the first included, is also mirrored. All epochs and resumed runs see the same copies.
            The texts must not speak of left and right, nor the images show text.
        with_images: False removes images, videos and their parts, for a question-only baseline.
        config_name: the configuration of a Hub dataset that has several.
        allow_outside_images: open image files outside the dataset's folder (of a file: its folder;
            of a Hub dataset: its downloads). An error by default: a dataset may come from anyone.
        allow_image_urls: keep http(s) URLs of images, an error by default. The collator downloads
            them if it has `allow_image_urls`, too.
        image_limits: the largest image that is opened for altered copies.
        faults: if given, collects the errors about single rows and images (see `is_faulty`).
        reader: the forms of rows that are known; that of a task is `vlmoe.tasks.task_reader`'s.

    Raises:
        FileNotFoundError: the source or an image file does not exist.
        ValueError: the source does not have the split, lacks columns, cannot be read or has no
            rows. Single rows are checked when they are collated.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1 or None, got {limit}.")
    if altered_copies < 0:
        raise ValueError(f"altered_copies must be at least 0, got {altered_copies}.")
    rules = ImageRules(
        allow_outside_images=allow_outside_images, allow_image_urls=allow_image_urls, faults=faults
    )
    with reading(source, keep=(ValueError, OSError, ImportError)):
        rows = standard_columns(_read(source, split, config_name, rules, reader), source, split)
    if limit is not None:
        rows = rows.select(range(min(limit, len(rows))))
    if not with_images:
        rows = rows.map(
            _text_of_batch, batched=True, features=rows.features, desc="removing images"
        ).select_columns(rows.column_names)
    if not altered_copies:
        return rows
    if "videos" in rows.column_names:
        raise ValueError(f"{source} has videos, of which altered copies are not made.")
    return with_altered_copies(
        rows, altered_copies, limits=image_limits, allow_urls=allow_image_urls
    )


def split_names(source: str) -> list[str]:
    """List the splits of a source, as `load_rows` takes it, `train` first.

    Raises:
        FileNotFoundError: the source does not exist.
    """
    if source in PACKAGED:
        return list(packaged_splits(source))
    path = Path(source).expanduser()
    if path.exists():
        return sorted(local_splits(path), key=lambda name: (name != "train", name))
    _require_hub_id(source)
    from datasets import get_dataset_split_names

    try:
        return get_dataset_split_names(source)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(_not_found(source, error)) from error


def _read(
    source: str, split: str, config_name: str | None, rules: ImageRules, reader: RowReader
) -> "Dataset":
    """Read the rows of a source, with their images in one column."""
    try:
        import datasets  # noqa: F401
    except ImportError as error:
        raise ImportError(
            'loading data needs the datasets library: pip install "vlmoe[train]".'
        ) from error
    if source in PACKAGED:
        rows = packaged_rows(source, split)
        if "messages" in rows.column_names:
            return rows
        return as_conversations(rows, ImageSources(Path(), (), **rules), source, reader)
    path = Path(source).expanduser()
    if path.exists():
        return read_local(path, split, reader, **rules)
    _require_hub_id(source)
    rows = _read_hub(source, split, config_name)
    return as_conversations(rows, _hub_image_sources(source, rules), source, reader)


def _require_hub_id(source: str) -> None:
    """Raise `FileNotFoundError` if the source can only be a path."""
    path = Path(source).expanduser()
    if path.is_absolute() or source.startswith((".", "~")) or path.suffix in FORMATS:
        raise FileNotFoundError(f"there is no file or folder {source}.")


def _not_found(source: str, error: Exception) -> str:
    return (
        f"{source!r} is no local file or folder, none of {', '.join(PACKAGED)}, and could "
        f"not be read from the Hub: {error}"
    )


def _read_hub(source: str, split: str, config_name: str | None) -> "Dataset":
    """Load a dataset of the Hub; its errors become one sentence."""
    from datasets import load_dataset

    try:
        return load_dataset(source, name=config_name, split=split)
    except OSError as error:
        raise FileNotFoundError(_not_found(source, error)) from error
    except ValueError as error:
        raise ValueError(f"the dataset {source!r}, split {split!r}: {error}") from error


def _hub_image_sources(source: str, rules: ImageRules) -> ImageSources:
    """Allow the images in a Hub dataset's part of the cache, and those of its archives."""
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
        **rules,
    )


# A function of the module, not a lambda: `datasets` names its cache by it, and cannot hash lambdas
# whose callees are recursive.
def _text_of_batch(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Return the changed columns of a batch of rows without images."""
    messages = [without_image_parts(messages) for messages in batch["messages"]]
    media = [name for name in ("images", "videos") if name in batch]
    return {"messages": messages, **{name: [[] for _ in messages] for name in media}}

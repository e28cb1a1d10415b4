# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Rows from local files: parquet, json(l), folders of them, image folders, saved datasets.

- A folder's splits follow the names of its files, and then of its sub-folders, as in `datasets`:
  `train.jsonl`, `data/test-00000-of-00001.parquet`, `validation/rows.jsonl`. Where no name tells,
  everything is `train`.
- A folder with `metadata.jsonl` files is an image folder: its splits are the folders of those
  files, and its rows name images in `file_name` (one) or `images` (a list).
- A folder of pictures, each with its caption in a text file of the same name (`a.png`, `a.txt`),
  has the splits that its sub-folders are named after.
- Image paths are relative to the file that names them.
"""

import logging
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .caption_folders import caption_rows, captioned_pictures
from .row_formats import IMAGE_COLUMNS, as_conversations

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

FORMATS = {".parquet": "parquet", ".json": "json", ".jsonl": "json"}
SPLIT_WORDS = {
    "train": "train|training",
    "validation": "validation|valid|val|dev",
    "test": "test|testing|eval|evaluation",
}
SHARD_NAME = re.compile(r"(?P<split>\w+)-\d{5}-of-\d{5}")


def read_local(path: Path, split: str) -> "Dataset":
    """The rows of a file or folder, images as undecoded `datasets.Image` lists in `images`.

    Raises `FileNotFoundError` for a missing image file and `ValueError` for a split, file or folder
    that does not fit, each naming the culprit.
    """
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return with_image_column(as_conversations(_read_saved(path, split), str(path)), path)
    files = _pick_split(path, files_by_split(path), split)
    if files[0].suffix not in FORMATS:
        return with_image_column(as_conversations(caption_rows(files, path), str(path)), path)
    groups: dict[tuple[str, Path], list[Path]] = defaultdict(list)
    for file in files:
        groups[FORMATS[file.suffix], file.parent].append(file)
    parts = [
        with_image_column(
            as_conversations(_read_files(kind, group), ", ".join(map(str, group))), folder
        )
        for (kind, folder), group in groups.items()
    ]
    if len(parts) == 1:
        return parts[0]
    from datasets import concatenate_datasets

    try:
        return concatenate_datasets(parts)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"the files of split {split!r} of {path} differ in columns or types: {error}"
        ) from error


def files_by_split(path: Path) -> dict[str, list[Path]]:
    """The data files of a file or folder, by split."""
    if path.is_file():
        if path.suffix not in FORMATS:
            raise ValueError(f"{path}: unknown file type; allowed are {', '.join(FORMATS)}.")
        named = _split_name(path.stem)
        return {"train": [path]} if named is None else {named: [path]}
    metadata = sorted(path.rglob("metadata.jsonl"))
    if metadata:
        return _group((file, _split_of_folder(file.parent, path)) for file in metadata)
    files = sorted(file for file in path.rglob("*") if file.suffix in FORMATS and file.is_file())
    if not files:
        pictures = captioned_pictures(path)
        if not pictures:
            raise ValueError(
                f"{path} is a folder without any {', '.join(FORMATS)} file, and without pictures "
                "that have their caption in a text file beside them."
            )
        return _group((file, _split_of_folder(file.parent, path)) for file in pictures)
    named_files = [
        (file, _split_name(file.stem) or _split_of_folder(file.parent, path)) for file in files
    ]
    unnamed = [file for file, split in named_files if split is None]
    if unnamed and len(unnamed) < len(files):
        logger.warning("%s: these files name no split and are not read: %s", path, unnamed)
        named_files = [(file, split) for file, split in named_files if split is not None]
    return _group(named_files)


def with_image_column(rows: "Dataset", folder: Path | None) -> "Dataset":
    """The rows with `images`, a list of undecoded images, made of whichever image column is there.

    Paths are resolved against `folder` and must be files. Without an image column nothing changes.
    """
    from datasets import Image, List

    column = next((name for name in IMAGE_COLUMNS if name in rows.column_names), None)
    if column is None:
        return rows
    feature, target = rows.features[column], List(Image(decode=False))
    if isinstance(feature, List) and isinstance(feature.feature, Image):
        rows = _retype(rows, column, target)
        return rows if column == "images" else rows.rename_column(column, "images")
    if isinstance(feature, Image):
        return _listed(rows.cast_column(column, Image(decode=False)), column, target)
    values = [_image_entries(value, folder, f"row {i}") for i, value in enumerate(rows[column])]
    return rows.remove_columns(column).add_column("images", values, feature=target)


def _listed(rows: "Dataset", column: str, target: Any) -> "Dataset":
    """A column of single images as the column `images` of lists."""
    from datasets import Features

    others = rows.remove_columns(column).features
    return rows.map(
        _one_image_lists,
        fn_kwargs={"column": column},
        batched=True,
        remove_columns=None if column == "images" else column,
        features=Features({**others, "images": target}),
    )


def _one_image_lists(batch: dict[str, list[Any]], column: str) -> dict[str, list[Any]]:
    """Single images as lists of one, or of none."""
    return {"images": [[] if image is None else [image] for image in batch[column]]}


def _retype(rows: "Dataset", column: str, target: Any) -> "Dataset":
    """The same Arrow data under another feature, without rewriting it (as `cast` would)."""
    from datasets import Dataset, DatasetInfo, Features

    rows = rows.flatten_indices() if rows._indices is not None else rows
    features = Features({**rows.features, column: target})
    return Dataset(rows.data, info=DatasetInfo(features=features), split=rows.split)


def _read_saved(path: Path, split: str) -> "Dataset":
    """A `save_to_disk` folder."""
    from datasets import Dataset, load_from_disk

    saved = load_from_disk(str(path))
    if isinstance(saved, Dataset):
        return _pick_split(path, {str(saved.split or "train"): saved}, split)
    return _pick_split(path, dict(saved), split)


def _read_files(kind: str, files: list[Path]) -> "Dataset":
    """Files of one kind and folder through `datasets`."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    names = ", ".join(map(str, files))
    if all(file.stat().st_size == 0 for file in files):
        raise ValueError(f"empty dataset: {names} has 0 bytes.")
    try:
        return load_dataset(kind, data_files=[str(file) for file in files], split="train")
    except (DatasetGenerationError, ValueError, StopIteration) as error:
        if "corresponds to no data" in str(error):
            raise ValueError(f"empty dataset: {names} has no rows.") from error
        raise ValueError(f"{names} cannot be read as {kind}: {error.__cause__ or error}") from error


def _image_entries(value: Any, folder: Path | None, name: str) -> list[dict[str, Any]]:
    """The images of one row as `{"bytes", "path"}` entries, paths resolved and checked."""
    entries = value if isinstance(value, list) else [] if value is None else [value]
    return [_image_entry(entry, folder, f"{name}, image {i}") for i, entry in enumerate(entries)]


def _image_entry(value: Any, folder: Path | None, name: str) -> dict[str, Any]:
    """One image as a `{"bytes", "path"}` entry."""
    entry = {"bytes": None, "path": value} if isinstance(value, str) else value
    if isinstance(entry, dict) and entry.get("bytes") is not None:
        return {"bytes": entry["bytes"], "path": entry.get("path")}
    path = entry.get("path") if isinstance(entry, dict) else None
    if not isinstance(path, str):
        raise ValueError(f"{name}: expected a file path, got {value!r:.60}.")
    file = Path(path) if folder is None else folder / path
    if not file.is_file():
        raise FileNotFoundError(f"{name}: there is no image file {file}.")
    return {"bytes": None, "path": str(file.absolute())}


def _pick_split(path: Path, splits: dict[str, Any], split: str) -> Any:
    """The named split, or a `ValueError` that lists those there are."""
    if split not in splits:
        raise ValueError(f"{path} has no split {split!r}; it has: {', '.join(sorted(splits))}.")
    return splits[split]


def _group(files: Iterable[tuple[Path, str | None]]) -> dict[str, list[Path]]:
    """Files by split; without a split's name, `train`."""
    splits = defaultdict(list)
    for file, split in files:
        splits[split or "train"].append(file)
    return dict(splits)


def _split_of_folder(folder: Path, root: Path) -> str | None:
    """The split that a folder, or one between it and `root`, is named after."""
    for part in reversed(folder.relative_to(root).parts):
        split = _split_name(part)
        if split is not None:
            return split
    return None


def _split_name(name: str) -> str | None:
    """The split that a file or folder name tells."""
    shard = SHARD_NAME.fullmatch(name)
    if shard is not None:
        return shard["split"]
    for split, words in SPLIT_WORDS.items():
        if re.search(rf"(?<![a-zA-Z])({words})(?![a-zA-Z])", name):
            return split
    return None

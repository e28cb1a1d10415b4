# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Rows from local files: parquet, json(l), csv, folders of them, image folders, saved datasets.

- A folder's splits follow the names of its files, and then of its sub-folders, as in `datasets`:
  `train.jsonl`, `data/test-00000-of-00001.parquet`, `validation/rows.jsonl`. Where no name tells,
  everything is `train`. Tables (csv, tsv), all text, are read where there is nothing else.
- A folder with `metadata.jsonl` or `metadata.csv` files is an image folder: its splits are the
  folders of those files, and its rows name images in `file_name` (one) or `images` (a list).
- A folder of pictures, each with its caption in a text file of the same name (`a.png`, `a.txt`),
  has the splits that its sub-folders are named after.
- Image paths are relative to the file that names them, and stay below the folder that is read
  (`image_column.py`).
"""

import csv
import glob
import logging
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..hub.input_errors import reading
from .caption_folders import caption_rows, captioned_pictures
from .content_digest import content_digest
from .conversations import IMAGE_COLUMNS
from .image_column import ImageSources, with_image_column
from .json_rows import require_shallow, require_utf8
from .row_datasets import as_conversations

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

FORMATS = {
    ".parquet": "parquet",
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".tsv": "tsv",
}
METADATA = ("metadata.jsonl", "metadata.csv")
SEPARATORS = {"csv": ",", "tsv": "\t"}
SPLIT_WORDS = {
    "train": "train|training",
    "validation": "validation|valid|val|dev",
    "test": "test|testing|eval|evaluation",
}
SHARD_NAME = re.compile(r"(?P<split>\w+)-\d{5}-of-\d{5}")


def read_local(path: Path, split: str, **allowed: Any) -> "Dataset":
    """The rows of a file or folder, images as undecoded `datasets.Image` lists in `images`.

    `allowed` are fields of `ImageSources`, whose root is the folder, or that of the file.

    Raises `FileNotFoundError` for a missing image file and `ValueError` for a split, file or folder
    that does not fit, each naming the culprit.
    """
    roots = _image_roots(path if path.is_dir() else path.parent)
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        rows = _read_saved(path, split)
        return _conversational(rows, str(path), ImageSources(path, roots, **allowed))
    files = _pick_split(path, files_by_split(path), split)
    if files[0].suffix not in FORMATS:
        sources = ImageSources(path, roots, **allowed)
        return _conversational(caption_rows(files, sources), str(path), sources)
    groups: dict[tuple[str, Path], list[Path]] = defaultdict(list)
    for file in files:
        groups[FORMATS[file.suffix], file.parent].append(file)
    parts = [
        _conversational(
            _read_files(kind, group),
            ", ".join(map(str, group)),
            ImageSources(folder, roots, **allowed),
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


def _conversational(rows: "Dataset", name: str, sources: ImageSources) -> "Dataset":
    """Rows of any form as conversations, with their images in one column."""
    return with_image_column(as_conversations(rows, name, sources.faults), sources, name)


def local_splits(path: Path) -> list[str]:
    """The names of the splits of a file or folder."""
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return sorted(_saved_splits(path))
    return list(files_by_split(path))


def _image_roots(folder: Path) -> tuple[Path, ...]:
    """The folders that a dataset's image files must lie in: its own, and for a snapshot in the
    Hub's cache, whose files are links, the one that they lead to."""
    folder = Path(os.path.realpath(folder))
    blobs = [
        parent.parent / "blobs"
        for parent in (folder, *folder.parents)
        if parent.name == "snapshots"
    ]
    return (folder, *(each for each in blobs if each.is_dir()))


def files_by_split(path: Path) -> dict[str, list[Path]]:
    """The data files of a file or folder, by split."""
    if path.is_file():
        if path.suffix not in FORMATS:
            raise ValueError(f"{path}: unknown file type; allowed are {', '.join(FORMATS)}.")
        named = _split_name(path.stem)
        return {"train": [path]} if named is None else {named: [path]}
    files = sorted(file for file in path.rglob("*") if file.suffix in FORMATS and file.is_file())
    metadata = [file for file in files if file.name in METADATA]
    if metadata:
        return _group((file, _split_of_folder(file.parent, path)) for file in metadata)
    files = [file for file in files if FORMATS[file.suffix] not in SEPARATORS] or files
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
        names = ", ".join(str(file.relative_to(path)) for file in unnamed)
        logger.warning("%s: these files name no split and are not read: %s.", path, names)
        named_files = [(file, split) for file, split in named_files if split is not None]
    return _group(named_files)


def _read_saved(path: Path, split: str) -> "Dataset":
    """A split of a `save_to_disk` folder."""
    from datasets import Dataset

    rows = _pick_split(path, _saved_splits(path), split)
    # The fingerprint that is saved may be that of the code that made the rows, not of the rows.
    digest = content_digest(file["filename"] for file in rows.cache_files)
    return Dataset(rows.data, info=rows.info, split=rows.split, fingerprint=digest)


def _saved_splits(path: Path) -> dict[str, "Dataset"]:
    """The splits of a `save_to_disk` folder."""
    from datasets import Dataset, load_from_disk

    _refuse_unreadable_name(str(path))
    saved = load_from_disk(str(path))
    return {str(saved.split or "train"): saved} if isinstance(saved, Dataset) else dict(saved)


def _refuse_unreadable_name(path: str) -> None:
    """`datasets` would read another file, or none."""
    if "::" in path or os.path.expandvars(path) != path:
        raise ValueError(
            f"{path}: `datasets` takes `::` for a chain of file systems, and $NAME for a variable; "
            "rename the file or folder."
        )


def _read_files(kind: str, files: list[Path]) -> "Dataset":
    """Files of one kind and folder through `datasets`."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    names = ", ".join(map(str, files))
    _refuse_unreadable_name(names)
    if all(file.stat().st_size == 0 for file in files):
        raise ValueError(f"empty dataset: {names} has 0 bytes.")
    options: dict[str, Any] = {}
    if kind in SEPARATORS:
        options = {"sep": SEPARATORS[kind], "keep_default_na": False}
        options["na_values"] = {name: [""] for name in (*IMAGE_COLUMNS, "id")}  # nothing there
        options["features"] = _columns_of_text(files[0], SEPARATORS[kind])
    for file in files if kind == "json" else ():
        require_utf8(file)
        require_shallow(file)
    paths = [glob.escape(str(file)) for file in files]
    name = f"content-{content_digest(files)}"  # part of the cache's key
    kind = "csv" if kind in SEPARATORS else kind
    try:
        with _without_log():
            return load_dataset(kind, name, data_files=paths, split="train", **options)
    except (DatasetGenerationError, ValueError, StopIteration) as error:
        if "corresponds to no data" in str(error):
            raise ValueError(f"empty dataset: {names} has no rows.") from error
        raise ValueError(f"{names} cannot be read as {kind}: {error.__cause__ or error}") from error


def _columns_of_text(file: Path, separator: str) -> Any:
    """The columns of a table, each of texts: "007" is no number, and "NA" is not nothing."""
    from datasets import Features, Value

    require_utf8(file)
    with reading(str(file)), open(file, encoding="utf-8-sig", newline="") as opened:
        names = next(csv.reader(opened, delimiter=separator), [])
    return Features({name: Value("string") for name in names})


@contextmanager
def _without_log() -> Iterator[None]:
    """Keep `datasets` from logging, with the reason, an error that it raises as well."""
    from datasets.utils.logging import CRITICAL, get_verbosity, set_verbosity

    before = get_verbosity()
    set_verbosity(CRITICAL)
    try:
        yield
    finally:
        set_verbosity(before)


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

# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Rows from local files: parquet, json(l), csv, folders of them, image folders, saved datasets.

- A folder's splits follow the names of its files, and then of its sub-folders: `train.jsonl`,
  `data/test-00000-of-00001.parquet`, `validation/rows.jsonl`. If no name says, everything is
  `train`. Tables (csv, tsv), all text, are read only where there is nothing else. The discovery of
  `datasets` serves less: it silently drops `train.jsonl` beside a folder `validation`.
- A folder with `metadata.jsonl` or `metadata.csv` files is an image folder: its splits are the
  folders of those files, and its rows name images in `file_name` (one) or `images` (a list).
- A folder of pictures, each with its caption in a text file of the same name (`a.png`, `a.txt`),
  has the splits that its sub-folders are named after.
- A folder of pictures without captions, in sub-folders named after two classes or more
  (`train/cat/a.png`), gives the column `label`.
- Image paths are relative to the file that names them, and stay below the folder that is read
  (`images.py`).
- Prepared data are found again in the cache of `datasets` by the content of their files.
  `datasets` itself goes by path, size and time, and would return old rows for an overwritten file.
"""

import csv
import glob
import hashlib
import logging
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar, Unpack

from ..hub.input_errors import reading
from .images import ImageSources
from .json_rows import require_shallow, require_utf8
from .row_datasets import as_conversations
from .row_fields import IMAGE_COLUMNS
from .row_formats import RowReader, format_of

if TYPE_CHECKING:
    from datasets import Dataset, Features

logger = logging.getLogger(__name__)

FORMATS = {
    ".parquet": "parquet",
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".tsv": "tsv",
}
PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".jp2"}
METADATA = ("metadata.jsonl", "metadata.csv")
SEPARATORS = {"csv": ",", "tsv": "\t"}
SPLIT_WORDS = {
    "train": "train|training",
    "validation": "validation|valid|val|dev",
    "test": "test|testing|eval|evaluation",
}
SHARD_NAME = re.compile(r"(?P<split>\w+)-\d{5}-of-\d{5}")


class ImageRules(TypedDict):
    """Fields of `ImageSources` that the user decides."""

    allow_outside_images: bool
    allow_image_urls: bool
    faults: list[str] | None


Split = TypeVar("Split")


def read_local(
    path: Path, split: str, reader: RowReader = format_of, **rules: Unpack[ImageRules]
) -> "Dataset":
    """Read the rows of a file or folder, images as undecoded `datasets.Image` lists in `images`.

    Images must lie in the folder, or in that of the file, unless `rules` allow others.

    Raises:
        FileNotFoundError: an image file does not exist.
        ValueError: a split, file or folder does not fit; the message names it.
    """
    roots = _image_roots(path if path.is_dir() else path.parent)
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        rows = _read_saved(path, split)
        return as_conversations(rows, ImageSources(path, roots, **rules), str(path), reader)
    files = _pick_split(path, files_by_split(path), split)
    if files[0].suffix not in FORMATS:
        sources = ImageSources(path, roots, **rules)
        read = _caption_rows if files[0].with_suffix(".txt").is_file() else _class_rows
        return as_conversations(read(files, sources), sources, str(path), reader)
    groups: dict[tuple[str, Path], list[Path]] = defaultdict(list)
    for file in files:
        groups[FORMATS[file.suffix], file.parent].append(file)
    parts = [
        as_conversations(
            _read_files(kind, group),
            ImageSources(folder, roots, **rules),
            ", ".join(map(str, group)),
            reader,
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


def local_splits(path: Path) -> list[str]:
    """List the splits of a file or folder."""
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return sorted(_saved_splits(path))
    return list(files_by_split(path))


def _image_roots(folder: Path) -> tuple[Path, ...]:
    """Return the folders that a dataset's image files must lie in.

    These are its own and, for a snapshot in the Hub's cache, the one its links lead to.
    """
    folder = Path(os.path.realpath(folder))
    blobs = [
        parent.parent / "blobs"
        for parent in (folder, *folder.parents)
        if parent.name == "snapshots"
    ]
    return (folder, *(each for each in blobs if each.is_dir()))


def files_by_split(path: Path) -> dict[str, list[Path]]:
    """Group the data files of a file or folder by split."""
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
        pictures = _captioned_pictures(path)
        if pictures:
            return _group((file, _split_of_folder(file.parent, path)) for file in pictures)
        pictures = _classified_pictures(path)
        if not pictures:
            raise ValueError(
                f"{path} is a folder without any {', '.join(FORMATS)} file, without pictures that "
                "have their caption in a text file beside them, and without pictures in folders "
                "named after their classes."
            )
        return _group((file, _split_of_folder(file.parent.parent, path)) for file in pictures)
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
    """Read a split of a `save_to_disk` folder."""
    from datasets import Dataset

    rows = _pick_split(path, _saved_splits(path), split)
    # The saved fingerprint may describe the code that made the rows, not the rows.
    digest = content_digest(file["filename"] for file in rows.cache_files)
    return Dataset(rows.data, info=rows.info, split=rows.split, fingerprint=digest)


def _saved_splits(path: Path) -> dict[str, "Dataset"]:
    """Return the splits of a `save_to_disk` folder."""
    from datasets import Dataset, load_from_disk

    _refuse_unreadable_name(str(path))
    saved = load_from_disk(str(path))
    return {str(saved.split or "train"): saved} if isinstance(saved, Dataset) else dict(saved)


def _refuse_unreadable_name(path: str) -> None:
    """Raise `ValueError` for a path of which `datasets` would read another file, or none."""
    if "::" in path or os.path.expandvars(path) != path:
        raise ValueError(
            f"{path}: `datasets` reads `::` as a chain of file systems and $NAME as a variable; "
            "rename the file or folder."
        )


def _read_files(kind: str, files: list[Path]) -> "Dataset":
    """Read files of one kind and folder with `datasets`."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    names = ", ".join(map(str, files))
    _refuse_unreadable_name(names)
    if all(file.stat().st_size == 0 for file in files):
        raise ValueError(f"empty dataset: {names} has 0 bytes.")
    options: dict[str, Any] = {}
    if kind in SEPARATORS:
        options = {"sep": SEPARATORS[kind], "keep_default_na": False}
        options["na_values"] = {name: [""] for name in (*IMAGE_COLUMNS, "id")}  # "": no image
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


def _columns_of_text(file: Path, separator: str) -> "Features":
    """Return a table's columns as texts, so that "007" stays a text and "NA" a value."""
    from datasets import Features, Value

    require_utf8(file)
    with reading(str(file)), open(file, encoding="utf-8-sig", newline="") as opened:
        names = next(csv.reader(opened, delimiter=separator), [])
    return Features({name: Value("string") for name in names})


@contextmanager
def _without_log() -> Iterator[None]:
    """Keep `datasets` from logging an error that it raises, too."""
    from datasets.utils.logging import CRITICAL, get_verbosity, set_verbosity

    before = get_verbosity()
    set_verbosity(CRITICAL)
    try:
        yield
    finally:
        set_verbosity(before)


def _pick_split(path: Path, splits: dict[str, Split], split: str) -> Split:
    """Return the named split; raise `ValueError` with the existing ones if there is none."""
    if split not in splits:
        raise ValueError(f"{path} has no split {split!r}; it has: {', '.join(sorted(splits))}.")
    return splits[split]


def _group(files: Iterable[tuple[Path, str | None]]) -> dict[str, list[Path]]:
    """Group files by split; those without one are `train`."""
    splits = defaultdict(list)
    for file, split in files:
        splits[split or "train"].append(file)
    return dict(splits)


def _split_of_folder(folder: Path, root: Path) -> str | None:
    """Return the split that a folder, or one between it and `root`, is named after."""
    for part in reversed(folder.relative_to(root).parts):
        split = _split_name(part)
        if split is not None:
            return split
    return None


def _split_name(name: str) -> str | None:
    """Return the split that a file or folder is named after."""
    shard = SHARD_NAME.fullmatch(name)
    if shard is not None:
        return shard["split"]
    for split, words in SPLIT_WORDS.items():
        if re.search(rf"(?<![a-zA-Z])({words})(?![a-zA-Z])", name):
            return split
    return None


def _captioned_pictures(folder: Path) -> list[Path]:
    """List the pictures below a folder, in order; none if no picture has a caption.

    Raises:
        ValueError: some pictures have captions and others do not; the message names the first.
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


def _caption_rows(files: list[Path], sources: ImageSources) -> "Dataset":
    """Read pictures with their captions: `id` and `image`, the path in the folder, and `text`.

    Raises:
        ValueError: a caption is not UTF-8, or links out of the folder; the message names it.
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


def _classified_pictures(folder: Path) -> list[Path]:
    """List the pictures below a folder, in order, if their folders are named after classes.

    They are if each picture lies in a sub-folder, and these have two names or more that are not all
    those of splits.
    """
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in PICTURES)
    names = {file.parent.name for file in files}
    if len(names) < 2 or all(map(_split_name, names)):
        return []
    return [] if any(file.parent == folder for file in files) else files


def _class_rows(files: list[Path], sources: ImageSources) -> "Dataset":
    """Read pictures with their folders' names: `id` and `image`, the path, and `label`."""
    from datasets import Dataset

    names = [str(file.relative_to(sources.folder)) for file in files]
    labels = [file.parent.name for file in files]
    return Dataset.from_dict({"id": names, "image": names, "label": labels})


def content_digest(files: Iterable[Path | str], *parts: str) -> str:
    """Digest `parts` and the contents of the files, in their order, at 1 to 2 s per GB."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(hashlib.blake2b(part.encode()).digest())
    for file in files:
        with open(file, "rb") as opened:
            digest.update(hashlib.file_digest(opened, "blake2b").digest())
    return digest.hexdigest()

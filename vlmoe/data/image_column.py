# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""The pictures of a dataset's rows: bytes, or files below the dataset's own folder.

A dataset may have been made by anybody. What its rows name is opened only where it lies in the
dataset's folder (symbolic links followed), and URLs are not opened at all, unless the user allows
it. Every reader of rows makes its entries with `ImageSources.entries`.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..processing.image_sources import decode_text, has_image_header, is_url, require_web_url
from .conversations import IMAGE_COLUMNS

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class ImageSources:
    """Which pictures the rows of a dataset may name.

    Attributes:
        folder: where relative paths start: the folder of the file that names them.
        roots: the folders, resolved, that picture files must lie in.
        allow_outside_images: open files outside `roots`.
        allow_image_urls: leave http(s) URLs to the collator.
        remedy: what to do about a file that is not there.
        faults: where given, what is wrong with a picture is added in place of being raised, and the
            picture's entry is empty.
    """

    folder: Path
    roots: tuple[Path, ...]
    allow_outside_images: bool = False
    allow_image_urls: bool = False
    remedy: str = ""
    faults: list[str] | None = None

    def entries(self, value: Any, name: str) -> list[dict[str, Any]]:
        """The pictures of one row as `{"bytes", "path"}` entries, paths resolved and checked.

        Args:
            value: a picture, a list of them, or None; each a path, base64, a `data:` URL or a dict
                with `bytes` or `path`.
            name: what errors call the row.

        Raises:
            ValueError: a file outside the roots, a URL, or no picture; it names row and picture.
            FileNotFoundError: a file that does not exist.
        """
        entries = value if isinstance(value, list) else [] if value is None else [value]
        return [self.entry(entry, f"{name}, image {i}") for i, entry in enumerate(entries)]

    def entry(self, value: Any, name: str) -> dict[str, Any]:
        """Return one picture as `entries` does; its fault is kept where there is a list of them."""
        try:
            return self._entry(value, name)
        except (ValueError, OSError) as error:
            if self.faults is None:
                raise
            self.faults.append(str(error))
            return {"bytes": None, "path": None}

    def _entry(self, value: Any, name: str) -> dict[str, Any]:
        """One picture. A path beside bytes is dropped: `datasets` would open it in their place."""
        if isinstance(value, dict):
            value = value.get("path") if value.get("bytes") is None else value["bytes"]
        if isinstance(value, bytes):
            return {"bytes": value, "path": None}
        if isinstance(value, os.PathLike):
            value = os.fspath(value)
        if not isinstance(value, str):
            raise ValueError(f"{name}: expected a file path, got {value!r:.60}.")
        if is_url(value):
            require_web_url(value, name, self.allow_image_urls)
            return {"bytes": None, "path": value}
        file = self._find(value)
        if file is not None:
            return {"bytes": None, "path": str(self.require_inside(file, value, name))}
        content = decode_text(value)
        if content is None or not (value.startswith("data:") or has_image_header(content)):
            raise FileNotFoundError(
                f"{name}: there is no image file {self.folder / value!s:.200}.{self.remedy}"
            )
        return {"bytes": content, "path": None}

    def _find(self, path: str) -> Path | None:
        """The file of a path, also of one with Windows separators."""
        for written in (path, path.replace("\\", "/")):
            if os.path.isfile(self.folder / written):
                return self.folder / written
        return None

    def require_inside(self, file: Path, path: str, name: str) -> Path:
        """The resolved file; raises `ValueError` where it lies outside the roots."""
        resolved = Path(os.path.realpath(file))
        if not self.allow_outside_images and not any(map(resolved.is_relative_to, self.roots)):
            raise ValueError(
                f"{name}: {path[:200]!r} is {resolved}, outside the dataset's folder "
                f"{self.roots[0]}. Copy it there, or set allow_outside_images "
                "(--allow_outside_images) if you trust the data."
            )
        return resolved


def with_image_column(rows: "Dataset", sources: ImageSources, name: str) -> "Dataset":
    """The rows with `images`, a list of undecoded images, made of whichever image column is there.

    Files are checked against `sources`; errors call the rows `name, row 0` and so on. Without an
    image column nothing changes.
    """
    from datasets import Image, List

    column = next((name for name in IMAGE_COLUMNS if name in rows.column_names), None)
    if column is None:
        return rows
    feature = rows.features[column]
    is_list = isinstance(feature, List) and isinstance(feature.feature, Image)
    is_list = is_list and feature.length == -1  # Arrow has another layout for fixed lengths
    if is_list or isinstance(feature, Image):
        undecoded = Image(decode=False)
        rows = _retype(rows, column, List(undecoded) if is_list else undecoded)
        if next(image_files(rows, column), None) is None:
            return _listed(rows, column)
    values = [sources.entries(value, f"{name}, row {i}") for i, value in enumerate(rows[column])]
    return rows.remove_columns(column).add_column(
        "images", values, feature=List(Image(decode=False))
    )


def _retype(rows: "Dataset", column: str, feature: Any) -> "Dataset":
    """The same Arrow data under another feature, without rewriting it (as `cast` would)."""
    rows = rows.flatten_indices(keep_in_memory=True) if rows._indices is not None else rows
    return _rebuilt(rows, rows.data, {**rows.features, column: feature})


def image_files(rows: "Dataset", column: str = "images") -> Iterator[str]:
    """The paths of the pictures of an undecoded column that lack their bytes; no bytes are read."""
    from pyarrow import types

    for chunk in rows.data.column(column).chunks:
        images = chunk if types.is_struct(chunk.type) else chunk.flatten()
        without_bytes = images.filter(images.field("bytes").is_null())
        yield from without_bytes.field("path").drop_null().to_pylist()


def _listed(rows: "Dataset", column: str) -> "Dataset":
    """A column of pictures or of lists of them as the column `images` of lists; bytes stay where
    they are."""
    from datasets import Image, List

    if isinstance(rows.features[column], List):
        return rows if column == "images" else rows.rename_column(column, "images")
    import pyarrow as pa

    chunks = [_lists_of_one(chunk) for chunk in rows.data.column(column).chunks]
    position = rows.data.column_names.index(column)
    table = rows.data.table.set_column(position, "images", pa.chunked_array(chunks))
    features = {name: kind for name, kind in rows.features.items() if name != column}
    return _rebuilt(rows, table, {**features, "images": List(Image(decode=False))})


def _lists_of_one(images: Any) -> Any:
    """An Arrow array of pictures as lists of one, or of none where there is no picture."""
    import numpy as np
    import pyarrow as pa

    offsets = np.concatenate([[0], np.cumsum(images.is_valid().to_numpy(zero_copy_only=False))])
    present = images.drop_null() if images.null_count else images
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), present)


def _rebuilt(rows: "Dataset", table: Any, features: dict[str, Any]) -> "Dataset":
    """A dataset of other Arrow data or features; by default `datasets` hashes all of the data."""
    from datasets import Dataset, DatasetInfo, Features
    from datasets.fingerprint import Hasher

    return Dataset(
        table,
        info=DatasetInfo(features=Features(features)),
        split=rows.split,
        fingerprint=Hasher.hash((rows._fingerprint, repr(features))),
    )

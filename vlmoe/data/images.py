# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Images of rows: finding their files, bringing them into one column, opening them.

A row may hold an image as a PIL image, array or tensor, encoded bytes, base64 or a `data:` URL, a
file path, or the `{"bytes": ..., "path": ...}` of an undecoded `datasets.Image` column.

A dataset may come from anyone. A file that its rows name is opened only if it lies in the dataset's
folder (symbolic links followed), and a URL not at all, unless the user allows it. Every reader of
rows makes its entries with `ImageSources.entries`. An image that cannot be used raises an error
with the row's name.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
from PIL import Image

from ..hub.saved_model import Processor, is_own_processor
from ..processing.image_checks import load_rgb_image
from ..processing.image_sources import (
    DEFAULT_LIMITS,
    ImageLimits,
    decode_text,
    encoded_image,
    is_url,
    open_encoded,
    require_web_url,
)
from ..processing.video_frames import Frame
from .row_fields import IMAGE_COLUMNS, RowImage, StoredImage

if TYPE_CHECKING:
    import pyarrow
    from datasets import Dataset, Features
    from datasets.features.features import FeatureType

TURNED = (5, 6, 7, 8)
"""EXIF orientations that swap width and height."""


def limit_images(processor: Processor, max_pixels: int | None, max_side: int | None) -> ImageLimits:
    """Return the limits on the size of images, in pixels: those that are not None, and defaults.

    A `VLMoEProcessor` gets them. Processors of transformers have no limits: their collators do.
    """
    asked = {"max_pixels": max_pixels, "max_side": max_side}
    given = {name: value for name, value in asked.items() if value is not None}
    if not is_own_processor(processor):
        return replace(DEFAULT_LIMITS, **given)
    for name, value in given.items():
        setattr(processor, f"max_image_{name.removeprefix('max_')}", value)
    return processor.image_limits


def open_image(
    value: RowImage | Frame,
    name: str,
    *,
    limits: ImageLimits = DEFAULT_LIMITS,
    allow_urls: bool = False,
) -> Image.Image:
    """Open an image as RGB; raise `ValueError` that starts with `name` if it cannot be used."""
    value = value.image if isinstance(value, Frame) else value
    return cast(Image.Image, load_rgb_image(value, name, limits=limits, allow_urls=allow_urls))


def image_size(
    image: RowImage, *, limits: ImageLimits = DEFAULT_LIMITS, allow_urls: bool = False
) -> tuple[int, int] | None:
    """Read (width, height) of an image as it is shown from its header; None if that fails."""
    try:
        encoded = encoded_image(image, "", limits=limits, allow_urls=allow_urls)
        opened = image if encoded is None else open_encoded(encoded.content)
        if not isinstance(opened, Image.Image):  # an array or tensor
            return None
        width, height = opened.size
        turned = opened.getexif().get(0x0112) in TURNED
    except (OSError, ValueError, AttributeError, SyntaxError, Image.DecompressionBombError):
        return None
    return (height, width) if turned else (width, height)


@dataclass(frozen=True)
class ImageSources:
    """The images that the rows of a dataset may name.

    Attributes:
        folder: where relative paths start: the folder of the file that names them.
        roots: the folders, resolved, that image files must lie in.
        allow_outside_images: open files outside `roots`.
        allow_image_urls: leave http(s) URLs to the collator.
        remedy: the advice that ends the error about a missing file.
        faults: if given, collects the errors about single images; their entries are then empty.
    """

    folder: Path
    roots: tuple[Path, ...]
    allow_outside_images: bool = False
    allow_image_urls: bool = False
    remedy: str = ""
    faults: list[str] | None = None

    def entries(self, value: object, name: str) -> list[StoredImage]:
        """Convert the images of one row to `{"bytes", "path"}`, paths resolved and checked.

        Args:
            value: an image, a list of them, or None; each a path, base64, a `data:` URL or a dict
                with `bytes` or `path`.
            name: what errors call the row.

        Raises:
            ValueError: a file outside the roots, a URL, or no image; the message names row and
                image.
            FileNotFoundError: the file does not exist.
        """
        entries = value if isinstance(value, list) else [] if value is None else [value]
        return [self.entry(entry, f"{name}, image {i}") for i, entry in enumerate(entries)]

    def entry(self, value: object, name: str) -> StoredImage:
        """Convert one image as `entries` does; its error is collected if `faults` are."""
        try:
            return self._entry(value, name)
        except (ValueError, OSError) as error:
            if self.faults is None:
                raise
            self.faults.append(str(error))
            return {"bytes": None, "path": None}

    def _entry(self, value: object, name: str) -> StoredImage:
        """Convert one image; drop a path beside bytes, which `datasets` would open instead."""
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
        for written in (value, value.replace("\\", "/")):  # the second: Windows separators
            if os.path.isfile(file := self.folder / written):
                return {"bytes": None, "path": str(self.require_inside(file, value, name))}
        content = decode_text(value)
        if content is None or not (value.startswith("data:") or has_image_header(content)):
            raise FileNotFoundError(
                f"{name}: there is no image file {self.folder / value!s:.200}.{self.remedy}"
            )
        return {"bytes": content, "path": None}

    def require_inside(self, file: Path, path: str, name: str) -> Path:
        """Resolve the file; raise `ValueError` if it lies outside the roots."""
        resolved = Path(os.path.realpath(file))
        if not self.allow_outside_images and not any(map(resolved.is_relative_to, self.roots)):
            raise ValueError(
                f"{name}: {path[:200]!r} is {resolved}, outside the dataset's folder "
                f"{self.roots[0]}. Copy it there, or set allow_outside_images "
                "(--allow_outside_images) if you trust the data."
            )
        return resolved


def with_image_column(rows: "Dataset", sources: ImageSources, name: str) -> "Dataset":
    """Convert the rows' image column, whichever it is, to `images`: lists of undecoded images.

    Files are checked against `sources`; errors call the rows `name, row 0` and so on. Without an
    image column nothing changes.
    """
    from datasets import Features, Image, List

    column = next((name for name in IMAGE_COLUMNS if name in rows.column_names), None)
    if column is None:
        return rows
    feature = rows.features[column]
    is_list = isinstance(feature, List) and isinstance(feature.feature, Image)
    is_list = is_list and feature.length == -1  # Arrow has another layout for fixed lengths
    if is_list or isinstance(feature, Image):
        undecoded = Image(decode=False)
        features = {**rows.features, column: List(undecoded) if is_list else undecoded}
        rows = with_features(rows, Features(features))
        if next(image_files(rows, column), None) is None:
            return listed(rows, column, "images", undecoded)
    values = [sources.entries(value, f"{name}, row {i}") for i, value in enumerate(rows[column])]
    return rows.remove_columns(column).add_column(
        "images", values, feature=List(Image(decode=False))
    )


def with_features(rows: "Dataset", features: "Features") -> "Dataset":
    """Read the same Arrow data under other features, without rewriting it as `cast` would."""
    rows = rows.flatten_indices(keep_in_memory=True) if rows._indices is not None else rows
    return _rebuilt(rows, rows.data, features)


def image_files(rows: "Dataset", column: str = "images") -> Iterator[str]:
    """Yield the paths of the images of an undecoded column that lack their bytes."""
    from pyarrow import types

    for chunk in rows.data.column(column).chunks:
        images = chunk if types.is_struct(chunk.type) else chunk.flatten()
        without_bytes = images.filter(images.field("bytes").is_null())
        yield from without_bytes.field("path").drop_null().to_pylist()


def listed(rows: "Dataset", column: str, name: str, undecoded: "FeatureType") -> "Dataset":
    """Turn a column of images or videos, or of lists of them, into the column `name` of lists.

    Their bytes are not copied.
    """
    import pyarrow as pa
    from datasets import Features, List

    if isinstance(rows.features[column], List):
        return rows if column == name else rows.rename_column(column, name)
    lists = []
    for images in rows.data.column(column).chunks:  # one list for each image, none for no image
        counts = images.is_valid().to_numpy(zero_copy_only=False)
        offsets = pa.array(np.concatenate([[0], np.cumsum(counts)]), pa.int32())
        present = images.drop_null() if images.null_count else images
        lists.append(pa.ListArray.from_arrays(offsets, present))
    position = rows.data.column_names.index(column)
    table = rows.data.table.set_column(position, name, pa.chunked_array(lists))
    features = {each: kind for each, kind in rows.features.items() if each != column}
    return _rebuilt(rows, table, Features({**features, name: List(undecoded)}))


def _rebuilt(rows: "Dataset", table: "pyarrow.Table", features: "Features") -> "Dataset":
    """Make a dataset of other Arrow data or features; by default `datasets` hashes all the data."""
    from datasets import Dataset, DatasetInfo
    from datasets.fingerprint import Hasher

    return Dataset(
        table,
        info=DatasetInfo(features=features),
        split=rows.split,
        fingerprint=Hasher.hash((rows._fingerprint, repr(features))),
    )


def has_image_header(content: bytes) -> bool:
    """Return whether encoded bytes begin as an image of a known format does."""
    try:
        open_encoded(content).close()
    except Image.DecompressionBombError:
        return True
    except Exception:  # decoders raise almost anything on broken data
        return False
    return True

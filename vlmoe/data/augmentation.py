# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Altered copies of rows: the same texts beside shifted and mirrored images."""

import hashlib
import io
import os
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageOps

from ..processing.image_sources import DEFAULT_LIMITS, ImageLimits, is_url
from .images import image_files, open_image
from .local_files import content_digest
from .row_fields import AnyRow, RowImage, StoredImage

if TYPE_CHECKING:
    from datasets import Dataset

SHIFT_FRACTION = 16
"""A copy is shifted by at most this fraction of the image's width and height."""


def with_altered_copies(
    rows: "Dataset", copies: int, *, limits: ImageLimits = DEFAULT_LIMITS, allow_urls: bool = False
) -> "Dataset":
    """Append `copies` altered copies of all rows, each time in the order of the rows."""
    from datasets import concatenate_datasets

    options = {"limits": limits, "allow_urls": allow_urls}
    files = list(image_files(rows))
    key = ["altered", rows._fingerprint, repr(options)]
    if any(map(is_url, files)):  # a server may answer differently next time: never reuse the cache
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


def altered_image(
    value: RowImage,
    name: str,
    number: int,
    *,
    limits: ImageLimits = DEFAULT_LIMITS,
    allow_urls: bool = False,
) -> StoredImage:
    """Shift an image by up to a sixteenth of its size, and mirror it where `number` is odd.

    The shift depends on `name` and `number` alone. The uncovered edge repeats the pixels beside it.
    Returns the PNG content of an undecoded `datasets.Image`.
    """
    image = open_image(value, name, limits=limits, allow_urls=allow_urls)
    digest = hashlib.blake2b(f"{name} {number}".encode(), digest_size=8, person=b"shift").digest()
    reach = np.array([image.height // SHIFT_FRACTION, image.width // SHIFT_FRACTION])
    down, right = np.random.default_rng(list(digest)).integers(-reach, reach, endpoint=True)
    rows = np.clip(np.arange(image.height) - down, 0, image.height - 1)
    columns = np.clip(np.arange(image.width) - right, 0, image.width - 1)
    altered = Image.fromarray(np.asarray(image)[rows][:, columns])
    buffer = io.BytesIO()
    (ImageOps.mirror(altered) if number % 2 else altered).save(
        buffer, format="PNG", compress_level=1
    )
    return {"bytes": buffer.getvalue(), "path": None}


# A function of the module, not a lambda: `datasets` names its cache by it.
def _altered_row(row: AnyRow, number: int, options: dict[str, Any]) -> dict[str, Any]:
    """Return the changed columns of a row with altered images."""
    name = f"row {row['id']!r}"
    images = [altered_image(each, name, number, **options) for each in row["images"]]
    return {"id": f"{row['id']} altered {number}", "images": images}

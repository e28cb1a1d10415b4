# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Images as a dataset row holds them: opening, content keys, altered copies.

A row may hold an image as a PIL image, array or tensor, encoded bytes, base64 or a `data:` URL, a
file path, or the `{"bytes": ..., "path": ...}` of an undecoded `datasets.Image` column. Data make
no requests: an http(s) URL is an error unless `allow_urls` is given. An image that cannot be used
raises `ValueError` with the name it is given here, so that one bad file among a million is found.
"""

import hashlib
import io
from typing import Any, cast

import numpy as np
from PIL import Image, ImageOps

from ..processing.image_checks import load_rgb_image
from ..processing.image_sources import DEFAULT_LIMITS, ImageLimits

SHIFT_FRACTION = 16
"""A copy is shifted by at most this fraction of the image's width and height."""


def open_image(
    value: Any, name: str, *, limits: ImageLimits = DEFAULT_LIMITS, allow_urls: bool = False
) -> Image.Image:
    """The image as RGB; raises `ValueError` that starts with `name` if it cannot be used."""
    return cast(Image.Image, load_rgb_image(value, name, limits=limits, allow_urls=allow_urls))


def encoded_key(content: bytes) -> bytes:
    """A digest of encoded bytes: images with equal keys are equal."""
    return hashlib.blake2b(content, digest_size=16, person=b"encoded").digest()


def pixel_key(image: Image.Image) -> bytes:
    """A digest of an RGB image's size and pixels: images with equal keys are equal."""
    digest = hashlib.blake2b(repr(image.size).encode(), digest_size=16, person=b"pixels")
    digest.update(image.tobytes())
    return digest.digest()


def altered_image(
    value: Any,
    name: str,
    number: int,
    *,
    limits: ImageLimits = DEFAULT_LIMITS,
    allow_urls: bool = False,
) -> dict[str, Any]:
    """A copy of an image for training: shifted by up to a sixteenth of its size, and mirrored left
    to right where `number` is odd. What the shift uncovers repeats the pixels of the edge.

    The shift depends on `name` and `number` alone. Returns the PNG content of an undecoded
    `datasets.Image`.
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

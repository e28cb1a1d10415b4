# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Read encoded images: paths, `data:` URLs, base64, bytes, and URLs.

Every reader of images goes through `encoded_image`, so that the same value means the same image to
the processor, the collators and `load_rows`. URLs are opened only where the caller allows it.
"""

import base64
import os
import re
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

EncodedImage = str | Path | bytes | bytearray | memoryview | Mapping[str, str | bytes | None]
ImageSource = EncodedImage | Image.Image | np.ndarray | torch.Tensor
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000")
"""The formats that are decoded, MPO as JPEG. Others of PIL are not: EPS starts an interpreter."""
REMEDY = "Replace the image or leave the sample out."
URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
WEB_URL = re.compile(r"https?://", re.IGNORECASE)
URL_TIMEOUT = 60.0  # seconds
BYTES_PER_PIXEL = 4
"""A file may have so many bytes for each pixel of the limit: the size of a decoded image."""


class ImageError(ValueError):
    """An unusable image; the message names the sample, the fault and the remedy."""


@dataclass(frozen=True)
class ImageLimits:
    """The largest image that is decoded: a small file can hold one that fills the memory.

    `max_pixels` limits width times height, `max_side` each of the two.
    """

    max_pixels: int = 64_000_000
    max_side: int = 32_768

    def __post_init__(self) -> None:
        """Raise `ValueError` for a limit that is not a whole number above 0."""
        for name, value in (("pixels", self.max_pixels), ("side", self.max_side)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"`max_image_{name}` is {value!r}; allowed: 1 or more.")

    def require(self, width: int, height: int, name: str) -> None:
        """Raise `ImageError` for an image without pixels, or beyond the limits."""
        if width < 1 or height < 1:
            raise ImageError(f"{name} has no pixels (width {width}, height {height}). {REMEDY}")
        if width * height > self.max_pixels or max(width, height) > self.max_side:
            raise ImageError(
                f"{name} is {width}x{height} pixels; the limit is {self.max_pixels:,} "
                f"pixels and {self.max_side:,} a side. Shrink it, or raise the processor's "
                "max_image_pixels or max_image_side (the commands' options of these names) if you "
                "trust its origin."
            )

    def require_bytes(self, count: int, name: str) -> None:
        """Raise `ImageError` for an empty file, or one larger than a decoded image may be."""
        if count == 0:
            raise ImageError(f"{name} is empty (0 bytes). {REMEDY}")
        if count > BYTES_PER_PIXEL * self.max_pixels:
            raise ImageError(
                f"{name} has {count:,} bytes; the limit is "
                f"{BYTES_PER_PIXEL * self.max_pixels:,}. Shrink it, or raise the processor's "
                "max_image_pixels if you trust its origin."
            )


DEFAULT_LIMITS = ImageLimits()


class ImageContent(NamedTuple):
    """The bytes of an image file, and what errors call it."""

    content: bytes
    what: str


def encoded_image(
    source: ImageSource,
    where: str,
    *,
    limits: ImageLimits = DEFAULT_LIMITS,
    allow_urls: bool = False,
) -> ImageContent | None:
    """Read the bytes that `source` is or names; None for a decoded image or an unknown type.

    The arguments are those of `load_rgb_image`; `limits` bounds the size of the file.

    Raises:
        ImageError: a file that is missing, empty or too large, a URL that is not allowed or does
            not answer, or a string that is none of these.
    """
    if isinstance(source, Mapping):
        held = source.get("path") if source.get("bytes") is None else source["bytes"]
        if held is None:
            return None
        return encoded_image(held, where, limits=limits, allow_urls=allow_urls)
    if isinstance(source, bytes | bytearray | memoryview):
        encoded = ImageContent(bytes(source), f"the image of {len(source)} bytes")
    elif isinstance(source, str | Path) and os.path.isfile(source):
        what = f"the file {source}"
        limits.require_bytes(os.path.getsize(source), f"{where}: {what}")
        encoded = ImageContent(Path(source).read_bytes(), what)
    elif isinstance(source, Path):
        raise ImageError(f"{where}: there is no file {source}. Correct the path.")
    elif isinstance(source, str):
        if is_url(source):
            require_web_url(source, where, allow_urls)
            encoded = _download(source, where, limits)
        elif (content := decode_text(source)) is not None:
            encoded = ImageContent(content, f"the image of {len(content)} bytes")
        else:
            raise ImageError(
                f"{where}: {source[:80]!r} is neither an existing file nor an http(s) URL nor "
                "base64. Correct the path."
            )
    else:
        return None
    limits.require_bytes(len(encoded.content), f"{where}: {encoded.what}")
    return encoded


def is_url(text: str) -> bool:
    """Whether a string is a URL of any scheme but `data:`, which holds its image."""
    return URL.match(text) is not None


def require_web_url(text: str, where: str, allow_urls: bool) -> None:
    """Raise `ImageError` for a URL of another scheme than http(s), or where none is allowed."""
    if WEB_URL.match(text) is None:
        raise ImageError(
            f"{where}: {text[:200]!r} is a URL of a kind that is not opened. Download the image "
            "and name its file."
        )
    if not allow_urls:
        raise ImageError(
            f"{where}: {text[:200]!r} is a URL, and data do not make requests. Download the image "
            "and name its file, or set allow_image_urls (--allow_image_urls) if you trust the data."
        )


def decode_text(text: str) -> bytes | None:
    """Decode a base64 `data:` URL or base64; return None for any other string."""
    payload = text
    if text[:5].lower() == "data:":
        header, _, payload = text.partition(",")
        if not header.lower().endswith(";base64"):
            return None
    try:
        return base64.b64decode("".join(payload.split()), validate=True)
    except ValueError:
        return None


def open_encoded(content: bytes) -> Image.Image:
    """Open encoded bytes, of which only the header is read; errors are PIL's."""
    return Image.open(BytesIO(content), formats=FORMATS)


def _download(url: str, where: str, limits: ImageLimits) -> ImageContent:
    """Read a web server's answer, up to the limit."""
    what = f"the image at {url[:200]}"
    request = urllib.request.Request(url, headers={"User-Agent": "vlmoe"})
    try:
        with urllib.request.urlopen(request, timeout=URL_TIMEOUT) as answer:
            content = answer.read(BYTES_PER_PIXEL * limits.max_pixels + 1)
    except (OSError, ValueError) as error:  # what urllib raises
        raise ImageError(
            f"{where}: {what} cannot be downloaded ({type(error).__name__}: {error}). Check the "
            "address and the connection."
        ) from error
    return ImageContent(content, what)

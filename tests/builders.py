"""Builders of rows and images, and measurements, that several test files share."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

Message = dict[str, Any]
Row = dict[str, Any]


def user(text: str, images: int | Sequence[Any] = 0, key: str = "image") -> Message:
    """Ask about `images`: so many placeholders, or the images themselves under `key`."""
    parts: list[dict[str, Any]] = (
        [{"type": "image"}] * images
        if isinstance(images, int)
        else [{"type": "image", key: image} for image in images]
    )
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def assistant(text: str) -> Message:
    """Answer in one part of text."""
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def plain_chat(question: str, answer: str) -> list[Message]:
    """Ask and answer without images, with strings as contents."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def row(*messages: Message, images: Sequence[Any] = (), **columns: Any) -> Row:
    """Make a row of one conversation, its images and further columns."""
    return {"messages": list(messages), "images": list(images), **columns}


def picture(seed: int = 0, size: tuple[int, int] = (24, 20), mode: str = "RGB") -> Image.Image:
    """Draw an image of random pixels; `size` is (width, height)."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 4), np.uint8)
    return Image.fromarray(pixels if mode == "RGBA" else pixels[..., :3]).convert(mode)


def png(image: Image.Image) -> bytes:
    """Encode an image as the bytes of a PNG file."""
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def stored_bytes(tensor: torch.Tensor) -> int:
    """Count the bytes of the storages behind a tensor, those inside a tensor subclass included."""
    if is_traceable_wrapper_subclass(tensor):
        return sum(stored_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.untyped_storage().nbytes()

"""Altered copies of images, against a shift written out pixel by pixel."""

import io
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, ImageOps

from vlmoe.data.augmentation import SHIFT_FRACTION, altered_image
from vlmoe.data.images import open_image

WIDTH, HEIGHT = 64, 48


def shifted(image: Image.Image, down: int, right: int) -> Image.Image:
    """The image moved; what it uncovers repeats the nearest pixel of the edge."""
    moved = Image.new("RGB", image.size)
    for x in range(image.width):
        for y in range(image.height):
            nearest = (
                min(max(x - right, 0), image.width - 1),
                min(max(y - down, 0), image.height - 1),
            )
            moved.putpixel((x, y), image.getpixel(nearest))
    return moved


def shift_of(image: Image.Image, copy: Image.Image) -> tuple[int, int]:
    """The one shift (down, right) within the allowed reach that makes the copy."""
    reach = range(-HEIGHT // SHIFT_FRACTION, HEIGHT // SHIFT_FRACTION + 1)
    sideways = range(-WIDTH // SHIFT_FRACTION, WIDTH // SHIFT_FRACTION + 1)
    pixels = np.asarray(copy)
    found = [
        (down, right)
        for down in reach
        for right in sideways
        if (np.asarray(shifted(image, down, right)) == pixels).all()
    ]
    assert len(found) == 1
    return found[0]


def test_copies_are_shifted_and_every_other_one_is_mirrored(
    make_image: Callable[..., Image.Image],
) -> None:
    image = make_image(1, size=(WIDTH, HEIGHT))
    shifts = []
    for number in range(1, 5):
        copy = open_image(altered_image(image, "row 'a'", number), "copy")
        shifts.append(shift_of(image, ImageOps.mirror(copy) if number % 2 else copy))
    assert len(set(shifts)) > 1
    first, other = (altered_image(image, name, 1)["bytes"] for name in ("row 'a'", "row 'b'"))
    assert first == altered_image(image, "row 'a'", 1)["bytes"]
    assert first != other


def test_shifts_cover_their_whole_range(make_image: Callable[..., Image.Image]) -> None:
    image = make_image(1, size=(2 * SHIFT_FRACTION, 8))  # 2 pixels sideways, none up and down
    shifts = set()
    for name in range(40):
        copy = open_image(altered_image(image, str(name), 2), "copy")
        for right in range(-2, 3):
            if np.array_equal(np.asarray(shifted(image, 0, right)), np.asarray(copy)):
                shifts.add(right)
    assert shifts == {-2, -1, 0, 1, 2}


def test_an_unusable_image_is_named() -> None:
    with pytest.raises(ValueError, match="row 7"):
        altered_image({"bytes": b"", "path": None}, "row 7", 1)


def test_a_copy_is_a_png(make_image: Callable[..., Image.Image]) -> None:
    copy = altered_image(make_image(), "row", 1)
    assert copy["path"] is None
    assert Image.open(io.BytesIO(copy["bytes"])).format == "PNG"

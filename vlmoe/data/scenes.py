# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Scenes: one to three objects on a canvas of 64 x 64 pixels, with exact boxes and a caption.

- `scenes`: drawn shapes, 4 in 6 colors, which need no package.
- `scenes_emoji`: drawings of 24 emoji (`emoji.py`), which need the extra `emoji`.

A row is `{id, image, objects, caption}`, as detection data of the Hub are: `objects` holds `bbox`,
COCO's `[x, y, width, height]` in pixels, and `category`. The box of an object is that of its own
pixels. Boxes are apart. A caption names the objects from left to right: "a red circle, then a
blue square". A scene follows from its split and number alone; scenes of the test are in no other
split.
"""

import io
from functools import cache
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw

from .emoji import emoji_table, recolored

if TYPE_CHECKING:
    from datasets import Dataset

SIDE = 64
SPLITS = {"train": 12_000, "validation": 500, "test": 500}
"""Rows of each split."""
MOST_OBJECTS = 3
OBJECT_SIDES = (14, 27)
"""The longer side of an object's box is at least the first and below the second, in pixels."""
GAP = 1
"""Pixels between the boxes of two objects, at least."""
COLORS = {
    "red": (215, 45, 45),
    "green": (40, 160, 60),
    "blue": (45, 80, 215),
    "yellow": (235, 205, 40),
    "purple": (150, 60, 190),
    "black": (30, 30, 30),
}
SHAPES = ("circle", "cross", "square", "triangle")
EMOJI = (
    *("anchor", "automobile", "bicycle", "books", "candle", "cat face", "cherries", "dog face"),
    *("dolphin", "elephant", "guitar", "key", "lemon", "mushroom", "octopus", "pear"),
    *("penguin", "pizza", "rocket", "scissors", "snowman", "sunflower", "trumpet", "watermelon"),
)
"""English names of the emoji in scenes."""
_FINE = 4
"""Shapes are drawn so many times larger, and made small for smooth edges."""

VISIBLE = 64
"""Pixels of an object are at least so opaque, of 255."""

Box = tuple[int, int, int, int]
Drawn = tuple[str, Image.Image]


def scene_rows(split: str, *, emoji: bool = False, count: int | None = None) -> "Dataset":
    """Return the scenes of a split.

    Args:
        split: "train", "validation" or "test".
        emoji: of emoji, not of shapes.
        count: the first so many, which may be more than `SPLITS` says.

    Raises:
        ValueError: there is no such split.
        ImportError: the packages of the extra `emoji` are missing, and it is about emoji.
    """
    if split not in SPLITS:
        raise ValueError(f"scenes have no split {split!r}; they have: {', '.join(SPLITS)}.")
    from datasets import Dataset, Features, List, Value
    from datasets import Image as ImageColumn

    source = "scenes_emoji" if emoji else "scenes"
    rows = [
        {"id": f"{source}/{split}/{number}", **scene(split, number, emoji=emoji)}
        for number in range(SPLITS[split] if count is None else count)
    ]
    features = Features(
        {
            "id": Value("string"),
            "image": ImageColumn(decode=False),
            "objects": {"bbox": List(List(Value("float32"))), "category": List(Value("string"))},
            "caption": Value("string"),
        }
    )
    return Dataset.from_list(rows, features=features)


def scene(split: str, number: int, *, emoji: bool = False) -> dict[str, Any]:
    """Return one scene: `image` as PNG, `objects` from left to right, and `caption`."""
    rng = np.random.default_rng([emoji, [*SPLITS].index(split), number])
    ground = tuple(int(each) for each in rng.integers(170, 256, 3))
    canvas = Image.new("RGB", (SIDE, SIDE), ground)
    draw = _emoji if emoji else _shape
    drawn = [
        draw(rng, int(rng.integers(*OBJECT_SIDES)))
        for _ in range(rng.integers(1, MOST_OBJECTS + 1))
    ]
    boxes = _boxes(rng, [picture.size for _, picture in drawn])
    for box, (_, picture) in zip(boxes, drawn, strict=True):
        canvas.paste(picture, box[:2], picture)
    file = io.BytesIO()
    canvas.save(file, format="PNG", compress_level=1)
    placed = sorted((box, name) for box, (name, _) in zip(boxes, drawn, strict=True))
    names = [name for _, name in placed]
    return {
        "image": {"bytes": file.getvalue(), "path": None},
        "objects": {"bbox": [list(box) for box, _ in placed], "category": names},
        "caption": ", then ".join(f"{_article(name)} {name}" for name in names),
    }


def _boxes(rng: np.random.Generator, sizes: list[tuple[int, int]]) -> list[Box]:
    """Draw places for all objects until their boxes are apart: x, y, width and height."""
    while True:
        boxes: list[Box] = []
        for width, height in sizes:
            x, y = (int(rng.integers(0, SIDE - side + 1)) for side in (width, height))
            boxes.append((x, y, width, height))
        if all(_apart(one, other) for one, other in combinations(boxes, 2)):
            return boxes


def _apart(one: Box, other: Box) -> bool:
    (x, y, width, height), (left, top, across, down) = one, other
    beside = x + width + GAP <= left or left + across + GAP <= x
    return beside or y + height + GAP <= top or top + down + GAP <= y


def _shape(rng: np.random.Generator, side: int) -> Drawn:
    """Draw a colored shape: its category, and its picture with transparency."""
    color, shape = (names[rng.integers(len(names))] for names in (tuple(COLORS), SHAPES))
    fine = side * _FINE
    mask = Image.new("L", (fine, fine))
    pen, last = ImageDraw.Draw(mask), fine - 1
    if shape == "circle":
        pen.ellipse((0, 0, last, last), fill=255)
    elif shape == "square":
        pen.rectangle((0, 0, last, last), fill=255)
    elif shape == "triangle":
        pen.polygon([(fine / 2, 0), (last, last), (0, last)], fill=255)
    else:
        third = fine // 3
        pen.rectangle((third, 0, last - third, last), fill=255)
        pen.rectangle((0, third, last, last - third), fill=255)
    picture = Image.new("RGBA", (side, side), COLORS[color])
    picture.putalpha(mask.resize((side, side), Image.Resampling.BOX))
    return f"{color} {shape}", _cut(recolored(picture, rng))


def _emoji(rng: np.random.Generator, side: int) -> Drawn:
    """Draw an emoji: its category, and its picture with transparency."""
    name = EMOJI[rng.integers(len(EMOJI))]
    whole = _pictures()[name]
    scale = side / max(whole.size)
    width, height = (max(round(each * scale), 1) for each in whole.size)
    return name, _cut(recolored(whole.resize((width, height), Image.Resampling.BOX), rng))


@cache
def _pictures() -> dict[str, Image.Image]:
    """Return the emoji of scenes by name, without their transparent margins."""
    by_name = {each.names["en"]: each.picture for each in emoji_table()}
    found = {}
    for name in EMOJI:
        with Image.open(by_name[name]) as file:
            found[name] = _cut(file.convert("RGBA"))
    return found


def _cut(picture: Image.Image) -> Image.Image:
    """Clear the pixels that hardly show, and cut off the margins without any other."""
    alpha = picture.getchannel("A").point([0] * VISIBLE + [*range(VISIBLE, 256)])
    picture.putalpha(alpha)
    return picture.crop(alpha.getbbox())


def _article(name: str) -> str:
    return "an" if name[0] in "aeiou" else "a"

# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Boxes as text: objects in a picture, written and read as the answer of a model.

Written is Qwen3-VL's JSON, `[{"bbox_2d": [x1, y1, x2, y2], "label": "cat"}]`: whole numbers from 0
to 1000, relative to the width and height of the picture, whatever its resolution. It needs no
tokens beyond a tokenizer's own. Read is also InternVL's `<ref>cat</ref><box>[[x1, y1, x2,
y2]]</box>`, with the same numbers; its tags may be missing, since they are special tokens there.

Boxes in data are COCO's: `[x, y, width, height]` in pixels.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeGuard

RELATIVE = 1000
"""The coordinate of the right and lower edge of a picture."""
TOLERANCE = 1.0
"""A box may be so many pixels beyond the edge of its picture, where it is cut."""

Corners = tuple[float, float, float, float]
"""Left, top, right, bottom."""

_NUMBER = r"\s*-?\d+(?:\.\d+)?\s*"
_LIST = rf"\[(?:{_NUMBER},){{3}}{_NUMBER}\]"
_LISTS = rf"\[\s*{_LIST}(?:\s*,\s*{_LIST})*\s*\]"
_TAGGED = re.compile(
    rf"(?:<ref>(?P<tagged>[^<]+)</ref>|(?P<bare>[^\[\]<>\n,;:]+))\s*(?:<box>)?\s*(?P<boxes>{_LISTS})"
    r"(?:\s*</box>)?"
)


@dataclass(frozen=True)
class LabeledBox:
    """An object in a picture.

    Attributes:
        label: its class.
        corners: left, top, right and bottom, relative: 0 to 1000.
        span: the part of the text that it was read from, start and end; (0, 0) if from no text.
    """

    label: str
    corners: Corners
    span: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class ParsedBoxes:
    """What `parse_boxes` read.

    Attributes:
        objects: in the order of the text.
        is_whole: whether the text is a list of boxes to its end, without a part that is none.
    """

    objects: tuple[LabeledBox, ...]
    is_whole: bool


def labeled_box(
    label: str, bbox: Sequence[float], size: tuple[int, int], name: str = "the box"
) -> LabeledBox:
    """Convert a COCO box to relative corners, rounded to whole numbers.

    Args:
        label: class of the object.
        bbox: `[x, y, width, height]` in pixels.
        size: width and height of the picture, in pixels.
        name: what errors call the box.

    Raises:
        ValueError: the box has no four finite numbers, no area, or lies outside the picture by more
            than `TOLERANCE`; or the label is no text.
    """
    if not isinstance(label, str) or not label.strip():
        raise ValueError(f"{name} has no category: {label!r:.80}; give each box the name of one.")
    if not _are_numbers(bbox):
        raise ValueError(f"{name} is {bbox!r:.80}; needed is [x, y, width, height] in pixels.")
    x, y, width, height = (float(each) for each in bbox)
    if not (width > 0 and height > 0):
        raise ValueError(
            f"{name} is {list(bbox)}: width {width:g} and height {height:g} must be above 0. "
            "COCO's boxes are [x, y, width, height], not corners."
        )
    pixels = (x, y, x + width, y + height)
    beyond = max(-x, -y, pixels[2] - size[0], pixels[3] - size[1])
    if beyond > TOLERANCE:
        raise ValueError(
            f"{name} is {list(bbox)} and ends {beyond:g} pixels outside its picture of "
            f"{size[0]} x {size[1]}. COCO's boxes are [x, y, width, height] in pixels of the "
            "picture."
        )
    left, right = _rounded(pixels[0], pixels[2], size[0])
    top, bottom = _rounded(pixels[1], pixels[3], size[1])
    return LabeledBox(label.strip(), (left, top, right, bottom))


def pixel_corners(corners: Corners, size: tuple[int, int]) -> Corners:
    """Return left, top, right and bottom in pixels of a picture of this width and height."""
    left, top, right, bottom = corners
    across, down = size[0] / RELATIVE, size[1] / RELATIVE
    return left * across, top * down, right * across, bottom * down


def boxes_as_text(objects: Iterable[LabeledBox]) -> str:
    """Write objects as Qwen3-VL's JSON, from left to right and then from top to bottom.

    The order is fixed because the loss of a list in random order is noise.
    """
    ordered = sorted(objects, key=lambda each: (*each.corners, each.label))
    written = [
        {"bbox_2d": [round(side) for side in each.corners], "label": each.label} for each in ordered
    ]
    return json.dumps(written, ensure_ascii=False)


def parse_boxes(text: str) -> ParsedBoxes:
    """Read the objects of an answer, as far as it has some.

    Words around the list are allowed, as are Markdown's fences. Of an answer that ends within an
    object, the objects before are read. Numbers are cut at 0 and 1000. A box whose corners are in
    the wrong order is read with a width or height of 0: it overlaps nothing.
    """
    found = tuple(_json_objects(text))
    if found or '"bbox_2d"' in text:
        return ParsedBoxes(found, _is_whole_json(text))
    if _value(text) == []:
        return ParsedBoxes((), True)
    matches = list(_TAGGED.finditer(text))
    rest = _TAGGED.sub("", text)
    is_whole = bool(matches) and not any(mark in rest for mark in "[]<")
    return ParsedBoxes(tuple(each for match in matches for each in _tagged(match)), is_whole)


def _json_objects(text: str) -> Iterator[LabeledBox]:
    """Yield the objects of JSON, whether or not the list around them is whole."""
    decoder, start = json.JSONDecoder(), text.find("{")
    while start >= 0:
        try:
            value, end = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            end = start + 1
        else:
            if (read := _object(value, (start, end))) is not None:
                yield read
        start = text.find("{", end)


def _is_whole_json(text: str) -> bool:
    """Return whether the text holds one list of objects, or one object, and no other."""
    value = _value(text)
    objects = value if isinstance(value, list) else [value]
    return all(_object(each, (0, 0)) is not None for each in objects)


def _value(text: str) -> object:
    """Return the JSON between the first and the last bracket, or None."""
    start, end = re.search(r"[\[{]", text), max(text.rfind("]"), text.rfind("}"))
    if start is None:
        return None
    try:
        return json.loads(text[start.start() : end + 1])
    except (ValueError, RecursionError):
        return None


def _object(value: object, span: tuple[int, int]) -> LabeledBox | None:
    """Return an object of JSON, or None if it has no label or no four numbers."""
    if not isinstance(value, dict):
        return None
    label, numbers = value.get("label"), value.get("bbox_2d")
    if not isinstance(label, str) or not label.strip() or not _are_numbers(numbers):
        return None
    return LabeledBox(label.strip(), _in_range(numbers), span)


def _tagged(match: re.Match[str]) -> Iterator[LabeledBox]:
    """Yield the objects of one label of InternVL's form."""
    label = (match["tagged"] or match["bare"]).strip()
    for numbers in json.loads(match["boxes"]):
        if label:
            yield LabeledBox(label, _in_range(numbers), match.span())


def _are_numbers(value: object) -> TypeGuard[Sequence[float]]:
    """Return whether it is a list of four numbers, none of them NaN."""
    return (
        isinstance(value, list | tuple)
        and len(value) == 4
        and all(type(each) in (int, float) and abs(each) < float("inf") for each in value)
    )


def _in_range(numbers: Sequence[float]) -> Corners:
    """Cut corners at the edges of the picture; right and bottom are not before left and top."""
    left, top, right, bottom = (float(min(max(each, 0), RELATIVE)) for each in numbers)
    return left, top, max(left, right), max(top, bottom)


def _rounded(low: float, high: float, side: int) -> tuple[int, int]:
    """Return two relative coordinates of an axis: 1 apart at least, each off by 1 at most."""
    first, last = (min(max(each / side, 0), 1) * RELATIVE for each in (low, high))
    if round(first) < round(last):
        return round(first), round(last)
    start = min(int((first + last) / 2), RELATIVE - 1)
    return start, start + 1

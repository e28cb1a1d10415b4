# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""The converter of detection data: boxes and categories of a picture become an answer in text.

`objects` is `{"bbox": [...], "category": [...]}`, as datasets of the Hub have it, or a list of
`{"bbox": ..., "category": ...}`. `categories`, `label` and `labels` are read like `category`.
"""

from collections.abc import Mapping, Sequence

from ..data.row_fields import AnyRow, is_list
from ..data.row_formats import Converted, dialogue, text_parts
from .boxes import LabeledBox, boxes_as_text, labeled_box

OBJECTS = ("objects",)
CATEGORIES = ("category", "categories", "label", "labels")


def objects(row: AnyRow, images: int, name: str, prompt: str) -> Converted:
    """Convert the objects of the row's one picture; no object at all is the answer `[]`.

    Raises:
        ValueError: the row has not one picture, or it cannot be read; `objects` is malformed; a box
            has no area, no category, or lies outside the picture. The message names row and box.
    """
    (given,) = (row[column] for column in OBJECTS)
    if images != 1:
        raise ValueError(f"{name} has {images} pictures; rows with `objects` have one each.")
    (size,) = row["image_sizes"]
    if size is None:
        raise ValueError(f"{name}: the size of its picture, which boxes need, cannot be read.")
    found = [
        _object(bbox, category, size, f"{name}, box {number}")
        for number, (bbox, category) in enumerate(_pairs(given, name))
    ]
    asked = text_parts(prompt) or [] if prompt else []
    return [dialogue(asked, text_parts(boxes_as_text(found)), images)], []


def _object(bbox: object, category: object, size: tuple[int, int], name: str) -> LabeledBox:
    """Return an object; the number of a class without a name is its label."""
    label = str(category) if type(category) is int else category
    return labeled_box(label, bbox, size, name)  # type: ignore[arg-type] # it checks both


def _pairs(given: object, name: str) -> list[tuple[object, object]]:
    """Return box and category of each object.

    Raises:
        ValueError: there are no such fields, two of categories, or not as many of both.
    """
    if is_list(given):
        if not all(isinstance(each, Mapping) for each in given):
            raise ValueError(f"{name}: `objects` is {given!r:.80}; {_needed()}")
        return [_fields(each, name) for each in given]
    if not isinstance(given, Mapping):
        raise ValueError(f"{name}: `objects` is {given!r:.80}; {_needed()}")
    boxes, categories = (_listed(each) for each in _fields(given, name))
    if boxes is None or categories is None or len(boxes) != len(categories):
        counts = [0 if each is None else len(each) for each in (boxes, categories)]
        raise ValueError(
            f"{name}: `objects` has {counts[0]} boxes and {counts[1]} categories; each box needs "
            "one."
        )
    return list(zip(boxes, categories, strict=True))


def _fields(given: Mapping, name: str) -> tuple[object, object]:
    """Return the box or boxes, and the category or categories, of an entry."""
    found = [each for each in CATEGORIES if given.get(each) is not None]
    if "bbox" not in given or len(found) > 1:
        raise ValueError(
            f"{name}: `objects` has the fields {', '.join(map(str, given))}; {_needed()}"
        )
    return given["bbox"], given[found[0]] if found else None


def _listed(value: object) -> Sequence[object] | None:
    """Return a list, of an array too."""
    value = value.tolist() if hasattr(value, "tolist") else value
    return value if is_list(value) else None


def _needed() -> str:
    return (
        "needed are `bbox`, boxes of [x, y, width, height] in pixels, and one of "
        f"{', '.join(CATEGORIES)}."
    )

# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Render a model's routing as one HTML page for a person who never saw a router.

The page is self-contained: pictures are data URIs, there are no scripts, and its content security
policy forbids the browser to load anything. The template escapes every text from outside. Its
sentences are made from the numbers.

The text is in page.html.jinja, the tokens' boxes in tokens.html.jinja, the style in page.css.
"""

import base64
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from ...figures.plots import DOTS_PER_INCH
from ...figures.text import drawable
from ...hub.atomic_files import atomic_path
from ...hub.json_files import JsonObject
from .figures import expert_colors, text_color
from .overlays import RANK_COLORS, layer_colors, pale_picture
from .report import (
    LAYERS_IN_FULL,
    PLACE_NAMES,
    VISION_TOKENS,
    BeforeTraining,
    RoutingInspection,
)
from .tokens import layer_strip

CSS_PIXELS_PER_INCH = 96
DASH = "\N{EN DASH}"


def write_page(inspection: RoutingInspection, path: str | Path) -> Path:
    """Write the page, atomically, and return its path."""
    with atomic_path(path) as temporary:
        temporary.write_text(page(inspection), encoding="utf-8")
    return Path(path)


def page(inspection: RoutingInspection) -> str:
    """Return the HTML of the page."""
    return (
        _environment()
        .get_template("page.html.jinja")
        .render(
            seen=inspection,
            colors=expert_colors(inspection.num_experts),
            layers_in_full=LAYERS_IN_FULL,
            place_names=PLACE_NAMES,
            rank_colors=RANK_COLORS,
            vision_tokens=VISION_TOKENS,
        )
    )


def percent(share: float | None) -> str:
    """Write a share in 0..1 for reading, such as 12.5%; a dash for None."""
    return DASH if share is None else f"{100 * share:.1f}".removesuffix(".0") + "%"


@dataclass(frozen=True)
class Busiest:
    """The expert with the most load of a layer, its share, and an even share."""

    expert: int
    share: float
    even: float


@dataclass(frozen=True)
class Picture:
    """A PNG file as a data URI, and its width in CSS pixels."""

    uri: str
    width: int


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader(__package__, ""),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {
        "bits": lambda value: f"{value:.3f} bits" if value >= 0.001 else "less than 0.001 bits",
        "busiest": _busiest,
        "changed": _changed,
        "drawable": drawable,
        "ink": text_color,
        "layer_colors": layer_colors,
        "log": math.log,
        "number": lambda value: DASH if value is None else f"{value:.2f}",
        "pale": pale_picture,
        "percent": percent,
        "png": _png,
        "strip": layer_strip,
        "times": lambda violation: DASH if violation is None else f"{violation + 1:.2f}",
        "zip": lambda first, second: zip(first, second, strict=True),
    }
    return environment


def _png(path: Path) -> Picture:
    with Image.open(path) as picture:
        width = round(picture.width * CSS_PIXELS_PER_INCH / DOTS_PER_INCH)
    return Picture(f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}", width)


def _busiest(load: JsonObject, number: int, kinds: Sequence[str]) -> Iterator[tuple[str, Busiest]]:
    """Yield for each kind of token that a layer saw its name and the busiest expert.

    Args:
        load: as `ExpertLoad.as_dict` gives it.
        number: position of the layer.
        kinds: of tokens.
    """
    for kind in kinds:
        violation = load["max_violation"][kind][number]
        if violation is not None:
            shares = load[f"{kind}_share"][number]
            largest = max(shares)
            yield kind, Busiest(shares.index(largest), largest, largest / (violation + 1))


def _changed(before: BeforeTraining) -> list[tuple[str, Mapping[str, list[float]]]]:
    """Return the kinds of tokens whose choices can be compared, with `change`'s numbers."""
    assert before.change is not None
    return [(kind, of) for kind in ("image", "text", "video") if (of := before.change.get(kind))]

# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Pictures for models of many layers: one per image, and a small one of colors for each layer.

A layer's colors have one pixel per cell, which the browser enlarges over the picture. The twelve
experts with the most tokens of a prompt in a layer have a color; the rest share a gray.
"""

import base64
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from .figures import EXPERT_COLORS, LUMA, plain_tile, tile_places
from .images import ImageRouting

LONGEST_SIDE = 640
"""Pixels of a picture on the page; a larger one is made smaller."""
OTHERS = len(EXPERT_COLORS)
"""The rank of experts without a color of their own."""
RANK_COLORS = (*EXPERT_COLORS, "#d5d8dc")


@dataclass(frozen=True)
class Placed:
    """A picture as a data URI, and where it is, in pixels of what the model sees."""

    uri: str
    left: int
    top: int
    width: int
    height: int


def ranks(first_choices: Sequence[int], experts: int) -> list[int]:
    """Return the number of each expert's color: its own up to twelve experts, else by load."""
    if experts <= OTHERS:
        return list(range(experts))
    result = [OTHERS] * experts
    for rank, (expert, _) in enumerate(Counter(first_choices).most_common(OTHERS)):
        result[expert] = rank
    return result


def pale_picture(image: ImageRouting) -> Placed:
    """Return an image as the model sees it, its tiles in their places, gray and pale."""
    tiles = [plain_tile(tile) for tile in image.tiles]
    places = tile_places(image, *tiles[0].shape[:2])
    height = max(top for top, _ in places) + tiles[0].shape[0]
    width = max(left for _, left in places) + tiles[0].shape[1]
    canvas = np.full((height, width), 255, dtype=np.uint8)
    for tile, (top, left) in zip(tiles, places, strict=True):
        canvas[top : top + tile.shape[0], left : left + tile.shape[1]] = 0.5 * tile @ LUMA + 127.5
    picture = Image.fromarray(canvas)
    picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    return Placed(_uri(picture, "jpeg"), 0, 0, width, height)


def layer_colors(image: ImageRouting, layer: int, rank_of: Sequence[int]) -> list[Placed]:
    """Return the colors of each tile's cells in a layer.

    Args:
        image: what to color.
        layer: position of the sparse layer.
        rank_of: of each expert, from `ranks`.
    """
    tiles, lookup = image.tiles, np.array(rank_of, dtype=np.uint8)
    placed = []
    places = tile_places(image, *tiles[0].picture.shape[:2])
    for tile, (top, left) in zip(tiles, places, strict=True):
        cells = lookup[tile.experts[layer]]
        picture = Image.fromarray(cells)
        picture.putpalette(bytes.fromhex("".join(color[1:] for color in RANK_COLORS)))
        height, width = (
            size * count for size, count in zip(tile.cell_size, cells.shape, strict=True)
        )
        placed.append(Placed(_uri(picture, "png"), left, top, width, height))
    return placed


def _uri(picture: Image.Image, form: str) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, form, optimize=True)
    return f"data:image/{form};base64,{base64.b64encode(buffer.getvalue()).decode()}"

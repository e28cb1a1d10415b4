# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Find the grid of cells that the tokens of each image or video of a native model lie on.

A processor of transformers says it in one of three ways:
- `image_grid_thw`, `video_grid_thw`: steps of time, rows and columns of patches, of which each
  `merge_size` x `merge_size` are one token (Qwen-VL, GLM-4V, ERNIE-4.5-VL)
- `image_position_ids`: column and row of each patch, of which each `pooling_kernel_size` squared
  are one token (Gemma 4)
- tiles of one size in `pixel_values`, whose tokens are a square (LLaVA, InternVL)

In all of them tokens follow each other row by row. Other families put marks between rows or remove
padding; their grid is not known here.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

from ..kinds import Inputs

SQUARES = ("llava", "vipllava", "internvl")
"""Model types whose tiles are squares of tokens without marks."""


@dataclass(frozen=True)
class CellGrid:
    """The cells of one image or video: so many tiles or steps of time, each of `rows` x `cols`."""

    tiles: int
    rows: int
    cols: int

    @property
    def cells(self) -> int:
        """How many tokens lie on the grid."""
        return self.tiles * self.rows * self.cols


def cell_grids(
    inputs: Inputs,
    kind: str,
    is_kind: Sequence[bool],
    merge: int,
    model_type: str,
    count: int | None = None,
) -> list[CellGrid] | None:
    """Return the grid of each image, or of each video, of one prompt.

    Args:
        inputs: the processor's output for the prompt.
        kind: `"image"` or `"video"`.
        is_kind: of each token of the prompt, whether it is of that kind.
        merge: patches on the side of a cell, where the processor counts in patches.
        model_type: of the model.
        count: how many images the prompt has, if that is known.

    Returns:
        None where the grid is not known, or does not have as many cells as there are tokens.
    """
    tokens = sum(is_kind)
    grids: list[CellGrid] | None = None
    if (sizes := inputs.get(f"{kind}_grid_thw")) is not None:
        grids = [CellGrid(t, h // merge, w // merge) for t, h, w in sizes.tolist()]
    elif kind == "image" and (places := inputs.get("image_position_ids")) is not None:
        grids = [CellGrid(1, *_rows_and_cols(of, merge)) for of in places]
    elif kind == "image" and model_type in SQUARES and "pixel_values" in inputs:
        grids = _squares(is_kind, len(inputs["pixel_values"]), count)
    if not grids or sum(grid.cells for grid in grids) != tokens:
        return None
    return grids if count in (None, len(grids)) else None


def _rows_and_cols(places: torch.Tensor, merge: int) -> tuple[int, int]:
    """(patches, 2) columns and rows, -1 for padding -> the number of rows and columns of cells."""
    cols, rows = ((places.amax(0) + 1) // merge).tolist()
    return rows, cols


def _squares(is_kind: Sequence[bool], tiles: int, images: int | None) -> list[CellGrid] | None:
    """Share tiles among the images: one for each, or those of its run of tokens."""
    tokens = sum(is_kind)
    side = math.isqrt(tokens // tiles) if tiles else 0
    if side == 0 or side * side * tiles != tokens:
        return None
    if tiles == images:
        return [CellGrid(1, side, side)] * tiles
    runs = [sum(run) for of_kind, run in groupby(is_kind) if of_kind]
    if any(run % (side * side) for run in runs):
        return None
    return [CellGrid(run // (side * side), side, side) for run in runs]

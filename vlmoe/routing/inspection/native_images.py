# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Lay the tokens of images and videos of a native model on what the model sees.

Where the processor's grid is not known (`grids.py`), there is no picture.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedConfig
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

from ...hub.saved_model import Processor
from ..kinds import KINDS, Inputs
from ..trace import TokenRouting
from .grids import CellGrid, cell_grids
from .images import ImageRouting, TileRouting, picture_of

STEPS_PER_ROW = 4
CELL_PIXELS = 14  # of a video, whose frames are not shown
BLANK = 235


def native_images(
    routing: TokenRouting,
    images: Sequence[Image.Image],
    processor: Processor,
    config: PreTrainedConfig,
    inputs: Inputs,
) -> list[ImageRouting]:
    """Find the experts of the cells of each image and video of a prompt.

    Args:
        routing: of the prompt, and of its answer.
        images: of the prompt, RGB, in its order.
        processor: that made `inputs`.
        config: the model's.
        inputs: of the prompt.

    Returns:
        Those whose grid is known: none, or all of one kind.
    """
    found: list[ImageRouting] = []
    for kind, name in enumerate(KINDS[1:], start=1):
        is_kind = routing.kinds == kind
        merge = _merge_size(processor, config)
        count = len(images) if name == "image" else None
        grids = cell_grids(inputs, name, is_kind.tolist(), merge, config.model_type, count)
        if grids is None:
            continue
        sizes = [grid.cells for grid in grids]
        experts = routing.first_choices[:, is_kind].split(sizes, dim=1)  # (L, cells) each
        first = 0
        for number, (grid, of_grid) in enumerate(zip(grids, experts, strict=True)):
            cells = of_grid.unflatten(1, (grid.tiles, grid.rows, grid.cols)).numpy()
            if name == "video":
                pictures = [_blank(grid)] * grid.tiles
                rows, cols = _steps(grid.tiles)
            elif "image_grid_thw" in inputs or "image_position_ids" in inputs:
                pictures, rows, cols = [_resized(images[number], grid, processor, merge)], 0, 0
            else:
                tiles = inputs["pixel_values"][first : first + grid.tiles]
                pictures = [picture_of(tile, processor.image_processor) for tile in tiles]
                rows, cols = _tile_rows(images[number], grid.tiles, processor)
                first += grid.tiles
            tiled = [_tile(picture, cells[:, i]) for i, picture in enumerate(pictures)]
            found.append(ImageRouting(tiled, rows, cols, name))
    return found


def _merge_size(processor: Processor, config: PreTrainedConfig) -> int:
    image_processor = getattr(processor, "image_processor", None)
    for holder, name in (
        (image_processor, "merge_size"),
        (image_processor, "pooling_kernel_size"),
        (getattr(config, "vision_config", None), "spatial_merge_size"),
    ):
        if isinstance(value := getattr(holder, name, None), int):
            return value
    return 1


def _resized(image: Image.Image, grid: CellGrid, processor: Processor, merge: int) -> np.ndarray:
    """(H, W, 3): the image in the size in which the processor cuts it into patches."""
    pixels = processor.image_processor.patch_size * merge
    size = (grid.cols * pixels, grid.rows * pixels)
    return np.asarray(image.convert("RGB").resize(size, Image.Resampling.BICUBIC))


def _blank(grid: CellGrid) -> np.ndarray:
    shape = (grid.rows * CELL_PIXELS, grid.cols * CELL_PIXELS, 3)
    return np.full(shape, BLANK, dtype=np.uint8)


def _steps(count: int) -> tuple[int, int]:
    """Rows and columns in which steps of time are laid out."""
    return (0, 0) if count == 1 else (math.ceil(count / STEPS_PER_ROW), min(count, STEPS_PER_ROW))


def _tile_rows(image: Image.Image, tiles: int, processor: Processor) -> tuple[int, int]:
    """Rows and columns of an image's tiles, the thumbnail left out; 0 for a single tile."""
    if tiles == 1:
        return 0, 0
    own = processor.image_processor
    size = own.size["height"], own.size["width"]
    cols, rows = get_optimal_tiled_canvas(
        (image.height, image.width), size, own.min_patches, own.max_patches
    )
    return (rows, cols) if rows * cols in (tiles, tiles - 1) else (1, tiles)


def _tile(picture: np.ndarray, experts: np.ndarray | torch.Tensor) -> TileRouting:
    """Lay cells (L, R, S) on a picture (H, W, 3)."""
    height, width = picture.shape[0] // experts.shape[1], picture.shape[1] // experts.shape[2]
    is_real = np.ones(picture.shape[:2], dtype=bool)
    return TileRouting(picture, is_real, (height, width), np.asarray(experts))

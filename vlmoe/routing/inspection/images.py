# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Where on an image each image token lies: tiles, cells, and the expert that each cell went to.

A tile's image tokens are the cells of a grid, row by row; a cell is a patch of the vision tower, or
the square of patches that pixel shuffle joins. What is shown is what the tower was given, after
resizing, cutting and padding: so each cell is where the model saw it.

Shapes: H, W of a tile, L sparse layers, R x S cells of a tile.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from transformers import BaseImageProcessor

from ...configuration.configuration_vlmoe import VLMoEConfig
from ...processing.image_layout import TiledImage, encode_images
from ...processing.processing_vlmoe import VLMoEProcessor
from ..trace import TokenRouting


@dataclass
class TileRouting:
    """One tile and the first expert of each of its cells.

    Attributes:
        picture: (H, W, 3) uint8.
        is_real: (H, W) bool, False where the processor padded.
        cell_size: height and width of a cell in pixels; the cells begin at the top left, and what
            is over at the right and at the bottom the tower does not see.
        experts: (L, R, S).
    """

    picture: np.ndarray
    is_real: np.ndarray
    cell_size: tuple[int, int]
    experts: np.ndarray


@dataclass
class ImageRouting:
    """One image: a single tile, or tiles in reading order and then a thumbnail of the whole.

    There are `rows * cols` tiles; both are 0 for a single one. A video has a tile for each step of
    time, and no thumbnail.
    """

    tiles: list[TileRouting]
    rows: int
    cols: int
    kind: str = "image"

    @property
    def cells(self) -> int:
        """How many tokens the image has."""
        return sum(tile.experts[0].size for tile in self.tiles)

    @property
    def has_whole(self) -> bool:
        """Whether a thumbnail of the whole follows the tiles."""
        return len(self.tiles) > max(self.rows * self.cols, 1)

    @property
    def is_padded(self) -> bool:
        """Whether the processor padded a tile."""
        return not all(tile.is_real.all() for tile in self.tiles)

    def spread(self, layer: int) -> "Spread":
        """Return how the cells of all tiles are spread over the experts of a layer."""
        return spread(np.concatenate([tile.experts[layer].flatten() for tile in self.tiles]))


@dataclass(frozen=True)
class Spread:
    """How tokens are spread over first experts.

    Attributes:
        tokens: how many there are.
        experts: how many experts have some.
        busiest: the expert with the most; the first seen of several.
        share: of the tokens, of the busiest.
    """

    tokens: int
    experts: int
    busiest: int
    share: float


def spread(first_choices: np.ndarray | torch.Tensor) -> Spread:
    """Return how tokens are spread over their first experts, (n,)."""
    counts = Counter(first_choices.tolist())
    busiest, count = counts.most_common(1)[0]
    return Spread(len(first_choices), len(counts), busiest, count / len(first_choices))


def image_routings(
    routing: TokenRouting,
    images: Sequence[Image.Image],
    processor: VLMoEProcessor,
    config: VLMoEConfig,
) -> list[ImageRouting]:
    """Find the experts of each image's cells.

    Args:
        routing: of a prompt with these images.
        images: RGB, in the prompt's order.
        processor: what made the prompt.
        config: the model's `VLMoEConfig`.

    Raises:
        ValueError: the prompt has not the image tokens that these images give.
    """
    if not images:
        return []
    tiled = encode_images(processor.image_processor, images, {})
    per_tile = processor.image_seq_len
    tokens = int(routing.is_image.sum())
    expected = per_tile * sum(len(image.pixel_values) for image in tiled)
    if tokens != expected:
        raise ValueError(
            f"The prompt has {tokens} image tokens, but its {len(images)} images give {expected}; "
            "pass the images that the prompt was made with."
        )
    experts = routing.first_choices[:, routing.is_image]  # (L, image tokens)
    experts = experts.unflatten(1, (-1, per_tile))  # (L, tiles, tokens of a tile)
    routings, start = [], 0
    for image in tiled:
        count = len(image.pixel_values)
        of_image = experts[:, start : start + count]
        start += count
        tiles = [
            _tile(image, number, of_image[:, number], processor, config) for number in range(count)
        ]
        routings.append(ImageRouting(tiles, image.rows, image.cols))
    return routings


def cell_size(config: VLMoEConfig) -> tuple[int, int]:
    """Return height and width of an image token's cell in pixels."""
    patch, factor = config.vision_config.patch_size, config.pixel_shuffle_factor
    patch_height, patch_width = (patch, patch) if isinstance(patch, int) else tuple(patch)
    return patch_height * factor, patch_width * factor


def _tile(
    image: TiledImage,
    number: int,
    experts: torch.Tensor,
    processor: VLMoEProcessor,
    config: VLMoEConfig,
) -> TileRouting:
    """Tile `number` of an image; `experts` (L, tokens of a tile)."""
    height, width = cell_size(config)
    rows, cols = image.pixel_values.shape[-2] // height, image.pixel_values.shape[-1] // width
    # Class and register tokens, where a tower keeps them, stand before the patches.
    cells = experts[:, experts.shape[1] - rows * cols :]
    return TileRouting(
        picture_of(image.pixel_values[number], processor.image_processor),
        image.pixel_mask[number].bool().numpy(),
        (height, width),
        cells.unflatten(1, (rows, cols)).numpy(),
    )


def picture_of(pixels: torch.Tensor, image_processor: BaseImageProcessor) -> np.ndarray:
    """Return (H, W, 3) uint8 from (3, H, W) as the tower takes it: undo normalization."""
    picture = pixels.float()
    if getattr(image_processor, "do_normalize", False):
        mean, std = (
            torch.tensor(values).view(-1, 1, 1)
            for values in (image_processor.image_mean, image_processor.image_std)
        )
        picture = picture * std + mean
    if getattr(image_processor, "do_rescale", True):
        picture = picture * 255
    return picture.round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()

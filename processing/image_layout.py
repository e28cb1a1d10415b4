# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""How images become tiles, tiles become tokens, and the tiles of a batch one padded tensor.

- An image is one tile, or `rows * cols` crops in reading order and then a thumbnail of the whole.
- Every tile is `image_seq_len` image tokens.
- Shapes: n images of the call, t tiles of one image, B rows of the batch, T most tiles of a row.

Resizing, cropping and scaling are the image processor's: Idefics3's, SmolVLM's and GotOcr2's (which
InternVL uses) can tile, most cannot.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

IDEFICS3_MAX_EDGE = 4096
TILING_OPTIONS = ("do_image_splitting", "crop_to_patches")
"""What image processors call their switch for tiling: Idefics3's and SmolVLM's, GotOcr2's."""


@dataclass(frozen=True)
class TiledImage:
    """One image as the model takes it; `rows` and `cols` are 0 where it stays a single tile."""

    pixel_values: torch.Tensor  # (t, 3, H, W)
    pixel_mask: torch.Tensor  # (t, H, W), 1 where a pixel is real
    rows: int
    cols: int


def tiling_option(image_processor: Any) -> str | None:
    """Which option makes an image processor cut images into tiles; None where it cannot."""
    known = image_processor.valid_kwargs.__annotations__
    return next((option for option in TILING_OPTIONS if option in known), None)


def image_option(image_processor: Any, options: Mapping[str, Any], name: str) -> Any:
    """An option of this call, else the image processor's own."""
    value = options.get(name)
    return getattr(image_processor, name, None) if value is None else value


def encode_images(
    image_processor: Any, images: Sequence[Image.Image | np.ndarray], options: Mapping[str, Any]
) -> list[TiledImage]:
    """Run the image processor over n images.

    `do_image_splitting` switches tiling whatever the image processor calls it. Where Idefics3's
    tiles and `do_resize` is off, `size["longest_edge"]` is an upper bound only: larger images are
    shrunk to it, smaller ones are not enlarged.

    Raises:
        ValueError: tiling is asked of a processor that cannot, or its output is no known layout.
    """
    name, options = type(image_processor).__name__, dict(options) | {"return_tensors": "pt"}
    asked, switch = options.pop("do_image_splitting", None), tiling_option(image_processor)
    if switch is None and asked:
        raise ValueError(
            f"{name} cannot tile images (do_image_splitting=True); use Idefics3ImageProcessor."
        )
    if switch is not None and asked is not None:
        options[switch] = asked
    if switch == "do_image_splitting":
        options |= {"return_row_col_info": True, "do_pad": True}
        if tiles_on(image_processor, options) and not image_option(
            image_processor, options, "do_resize"
        ):
            images = [_shrink(image, _longest_edge(image_processor, options)) for image in images]
    output = image_processor([[image] for image in images], **options)
    if switch == "crop_to_patches":
        grids = [tile_grid(*_image_size(image), image_processor, options) for image in images]
        return _split_patches(output, grids)
    pixels = torch.as_tensor(output["pixel_values"])  # (n, 3, H, W), or (n, most tiles, 3, H, W)
    if pixels.ndim == 4 and len(pixels) == len(images):
        return [TiledImage(tile[None], _full_mask(tile[None]), 0, 0) for tile in pixels]
    if pixels.ndim != 5 or "rows" not in output:
        raise ValueError(
            f"{name} made pixel_values of shape {tuple(pixels.shape)} from {len(images)} images; "
            "allowed: (images, 3, H, W), or Idefics3's layout with rows and columns."
        )
    masks = torch.as_tensor(output["pixel_attention_mask"])
    grids = [(rows[0], cols[0]) for rows, cols in zip(output["rows"], output["cols"], strict=True)]
    return [
        TiledImage(tiles[: rows * cols + 1], mask[: rows * cols + 1], rows, cols)
        for tiles, mask, (rows, cols) in zip(pixels, masks, grids, strict=True)
    ]


def _split_patches(output: Mapping[str, Any], grids: Sequence[tuple[int, int]]) -> list[TiledImage]:
    """GotOcr2's patches, those of all images in one tensor, by images."""
    patches = torch.as_tensor(output["pixel_values"])  # (patches of all images, 3, H, W)
    tiles = patches.split([int(count) for count in output["num_patches"]])
    return [
        TiledImage(pixels, _full_mask(pixels), *grid)
        for pixels, grid in zip(tiles, grids, strict=True)
    ]


def _full_mask(pixels: torch.Tensor) -> torch.Tensor:
    """(t, 3, H, W) -> (t, H, W): each pixel is real."""
    return pixels.new_ones(len(pixels), *pixels.shape[-2:], dtype=torch.long)


def batch_tiles(batch: Sequence[Sequence[TiledImage]]) -> dict[str, torch.Tensor]:
    """Join the images of each row, tiles in order, and pad with zeros.

    Returns `pixel_values` (B, T, 3, H, W) and `pixel_attention_mask` (B, T, H, W).
    """
    most = max(sum(len(image.pixel_values) for image in row) for row in batch)
    example = next(image for row in batch for image in row)
    pixels = example.pixel_values.new_zeros(len(batch), most, *example.pixel_values.shape[1:])
    mask = example.pixel_mask.new_zeros(len(batch), most, *example.pixel_mask.shape[1:])
    for i, row in enumerate(batch):
        start = 0
        for image in row:
            end = start + len(image.pixel_values)
            pixels[i, start:end], mask[i, start:end] = image.pixel_values, image.pixel_mask
            start = end
    return {"pixel_values": pixels, "pixel_attention_mask": mask}


def tiles_on(image_processor: Any, options: Mapping[str, Any]) -> bool:
    """Whether this call cuts images into tiles."""
    switch = tiling_option(image_processor)
    if switch is None:
        return False
    asked = options.get("do_image_splitting")
    return bool(image_option(image_processor, options, switch) if asked is None else asked)


def tile_grid(
    height: int, width: int, image_processor: Any, options: Mapping[str, Any]
) -> tuple[int, int]:
    """Rows and columns that an image of this size is cut into; (0, 0) if it stays one tile."""
    if not tiles_on(image_processor, options):
        return 0, 0
    if tiling_option(image_processor) == "crop_to_patches":
        return _got_ocr2_grid(height, width, image_processor, options)
    tile = image_option(image_processor, options, "max_image_size")["longest_edge"]
    longest = _longest_edge(image_processor, options)
    if not image_option(image_processor, options, "do_resize"):
        height, width = _shrunk_size(height, width, longest)
    elif longest is None:
        size = image_option(image_processor, options, "size")
        height, width = size["height"], size["width"]
    else:
        height, width = _idefics3_size(height, width, longest)
    return _grid_of_resized(height, width, tile)


def _got_ocr2_grid(
    height: int, width: int, image_processor: Any, options: Mapping[str, Any]
) -> tuple[int, int]:
    """GotOcr2 takes the grid of the nearest aspect ratio among those of so many patches."""
    most = image_option(image_processor, options, "max_patches")
    if most <= 1:
        return 0, 0
    least, size = (image_option(image_processor, options, n) for n in ("min_patches", "size"))
    side = dict(size)["height"], dict(size)["width"]
    cols, rows = get_optimal_tiled_canvas((height, width), side, least, most)
    return (rows, cols) if rows > 1 or cols > 1 else (0, 0)


def _idefics3_size(height: int, width: int, longest: int) -> tuple[int, int]:
    """Idefics3 brings the longer edge to `longest`, at most 4096, the other to an even number."""
    aspect = width / height
    if width >= height:
        height, width = int(longest / aspect), longest
        height += height % 2
    else:
        height, width = longest, int(longest * aspect)
        width += width % 2
    height, width = max(height, 1), max(width, 1)
    aspect = width / height
    if width >= height and width > IDEFICS3_MAX_EDGE:
        height, width = int(IDEFICS3_MAX_EDGE / aspect), IDEFICS3_MAX_EDGE
    elif height > width and height > IDEFICS3_MAX_EDGE:
        height, width = IDEFICS3_MAX_EDGE, int(IDEFICS3_MAX_EDGE * aspect)
    return max(height, 1), max(width, 1)


def _grid_of_resized(height: int, width: int, tile: int) -> tuple[int, int]:
    """Idefics3 rounds the longer edge up to whole tiles, then the shorter one in proportion."""
    if width >= height:
        cols = math.ceil(width / tile)
        rows = math.ceil(int(cols * tile / (width / height)) / tile)
    else:
        rows = math.ceil(height / tile)
        cols = math.ceil(int(rows * tile * (width / height)) / tile)
    return (rows, cols) if rows > 1 or cols > 1 else (0, 0)


def _longest_edge(image_processor: Any, options: Mapping[str, Any]) -> int | None:
    size = image_option(image_processor, options, "size")
    return None if size is None else dict(size).get("longest_edge")


def _image_size(image: Image.Image | np.ndarray) -> tuple[int, int]:
    """Height and width of an RGB image or a float (3, H, W) array."""
    if isinstance(image, Image.Image):
        return image.height, image.width
    return image.shape[1], image.shape[2]


def _shrunk_size(height: int, width: int, longest: int | None) -> tuple[int, int]:
    if longest is None or max(height, width) <= longest:
        return height, width
    scale = longest / max(height, width)
    return max(round(height * scale), 1), max(round(width * scale), 1)


def _shrink(image: Image.Image | np.ndarray, longest: int | None) -> Image.Image | np.ndarray:
    """Shrink an RGB image or a float (3, H, W) array to a longest edge."""
    if isinstance(image, Image.Image):
        height, width = _shrunk_size(*_image_size(image), longest)
        if (width, height) == image.size:
            return image
        return image.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=3.0)
    size = _shrunk_size(*_image_size(image), longest)
    if size == image.shape[1:]:
        return image
    tensor = torch.from_numpy(image)[None]
    shrunk = torch.nn.functional.interpolate(tensor, size, mode="bilinear", antialias=True)
    return shrunk[0].numpy()


def rows_of_images(images: Any, placeholders: list[int] | None) -> list[list[Any]]:
    """One list of images per row: as nested, or dealt out by the placeholders of each text.

    `images` is one image, a list of images, a list of lists (or None, or stacked arrays) per row.
    """
    if not isinstance(images, list | tuple):
        images = list(images) if _is_stack(images) else [images]
    if any(
        image is None or isinstance(image, list | tuple) or _is_stack(image) for image in images
    ):
        return [_as_row(row) for row in images]
    if placeholders is None:
        return [list(images)]
    ends = list(accumulate(placeholders))
    starts = [0, *ends[:-1]]
    ends[-1:] = [len(images)] * len(
        ends[-1:]
    )  # a surplus goes to the last row, where it is reported
    return [list(images[start:end]) for start, end in zip(starts, ends, strict=True)]


def _as_row(row: Any) -> list[Any]:
    if row is None:
        return []
    return list(row) if isinstance(row, list | tuple) or _is_stack(row) else [row]


def _is_stack(images: Any) -> bool:
    """Whether this is an array of several images, (n, C, H, W) or (n, H, W, C)."""
    return isinstance(images, np.ndarray | torch.Tensor) and images.ndim == 4

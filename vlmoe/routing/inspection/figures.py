# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Pictures of a router at work: its experts over an image, and who specialises in what.

As in `figures.py`, every function takes plain data and a path, writes the file atomically and
returns its path. Widths suit a page of about 1000 pixels.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ...figures.plots import BLUE, ORANGE, new_figure, save_figure
from ...hub.json_files import JsonObject
from .images import ImageRouting, TileRouting

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Chosen so that no two are alike in normal, red-blind, green-blind or blue-blind sight.
EXPERT_COLORS = (
    *("#0072B2", "#EEDD88", "#CC3311", "#99DDFF", "#AAAA00", "#882255"),
    *("#888888", "#56B4E9", "#BBCC33", "#AA3377", "#FFAABB", "#117733"),
)
PADDING_GREY = 225
TINT = 0.5  # how much of a cell's color is its expert's
LUMA = np.array([0.299, 0.587, 0.114])  # of red, green and blue
TILE_PIXELS = 240  # at least so many for each side of a tile in a picture
PANELS_PER_ROW = 4
LEGEND_COLUMNS = 8
WIDTH = 10.5  # inches
POINTS_FOR_A_NUMBER = 9


def expert_colors(experts: int) -> list[str]:
    """Return a color for each expert, as `#rrggbb`.

    Up to twelve are distinct; more are a circle of hues, which needs the expert's number beside it.
    """
    if experts <= len(EXPERT_COLORS):
        return list(EXPERT_COLORS[:experts])
    return [_hue(360 * expert / experts) for expert in range(experts)]


def text_color(background: str) -> str:
    """Black or white, whichever is easier to read on `#rrggbb`."""
    red, green, blue = (_linear(value / 255) for value in _rgb(background))
    luminance = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    return "#000000" if (luminance + 0.05) ** 2 > 0.05 * 1.05 else "#ffffff"


def paint_tile(tile: TileRouting, layer: int, colors: Sequence[str], side: int = 1) -> np.ndarray:
    """Paint a tile with its experts' colors: (H * scale, W * scale, 3) uint8.

    Each cell is tinted and framed in the color of its first expert. Below the tint the picture is
    pale and without colors of its own, as else a tint over a dark place could not be told.

    Args:
        tile: the picture and its experts.
        layer: which sparse layer, counted from 0.
        colors: of the experts.
        side: enlarge by a whole number until both sides have at least so many pixels.
    """
    plain = plain_tile(tile, side).astype(float)
    canvas = (0.5 * plain @ LUMA + 0.5 * 255)[..., None].repeat(3, -1)
    scale = len(canvas) // len(tile.picture)
    height, width = (scale * pixels for pixels in tile.cell_size)
    frame = max(min(height, width) // 32, 1)
    for (row, col), expert in np.ndenumerate(tile.experts[layer]):
        cell = canvas[row * height : (row + 1) * height, col * width : (col + 1) * width]
        color = np.array(_rgb(colors[expert]), dtype=float)
        inner = (1 - TINT) * cell[frame:-frame, frame:-frame] + TINT * color
        cell[:] = color
        cell[frame:-frame, frame:-frame] = inner
    return canvas.round().astype(np.uint8)


def plain_tile(tile: TileRouting, side: int = 1) -> np.ndarray:
    """Enlarge a tile as `paint_tile` does, with gray padding and without colors."""
    scale = max(math.ceil(side / min(tile.picture.shape[:2])), 1)
    picture = np.where(tile.is_real[..., None], tile.picture, np.uint8(PADDING_GREY))
    return picture.repeat(scale, 0).repeat(scale, 1)


def plot_image_experts(
    image: ImageRouting, layers: Sequence[int], experts: int, path: str | Path
) -> Path:
    """Draw an image as the model saw it, then for each sparse layer under its experts' colors.

    Each cell is one image token, with its first expert's number. The tiles of a tiled image stand
    where they were cut, the thumbnail of the whole below them.

    Args:
        image: what to draw.
        layers: the decoder's index of each sparse layer.
        experts: how many there are.
        path: the PNG file to write.
    """
    colors = expert_colors(experts)
    side = TILE_PIXELS if len(image.tiles) == 1 else TILE_PIXELS // 2
    plain = [plain_tile(tile, side) for tile in image.tiles]
    places = tile_places(image, *plain[0].shape[:2])
    height = max(top for top, _ in places) + plain[0].shape[0]
    width = max(left for _, left in places) + plain[0].shape[1]
    scale = len(plain[0]) // len(image.tiles[0].picture)
    cell = scale * min(image.tiles[0].cell_size) / width  # of a panel's width
    fits = 72 * WIDTH / PANELS_PER_ROW * cell >= POINTS_FOR_A_NUMBER
    # Among many colors only the number tells, so there it gets room.
    most = PANELS_PER_ROW if fits or experts <= len(EXPERT_COLORS) else PANELS_PER_ROW // 2
    columns = min(len(layers) + 1, most)
    rows = -(-(len(layers) + 1) // columns)
    panel = WIDTH / columns if columns > 2 or most == 2 else 3.2
    chosen = sorted({int(e) for tile in image.tiles for e in np.unique(tile.experts)})
    legend = 0.24 * -(-len(chosen) // LEGEND_COLUMNS) + 0.15
    figure = new_figure(panel * columns, rows * (panel * height / width + 0.35) + legend)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis in axes:
        axis.set_axis_off()
    for number, axis in enumerate(axes[: len(layers) + 1]):
        layer = number - 1
        canvas = np.full((height, width, 3), 255, dtype=np.uint8)
        for tile, below, (top, left) in zip(image.tiles, plain, places, strict=True):
            painted = below if layer < 0 else paint_tile(tile, layer, colors, side)
            canvas[top : top + len(painted), left : left + painted.shape[1]] = painted
            if layer >= 0:
                _write_experts(axis, tile, layer, (top, left), scale, 72 * panel * cell)
        axis.imshow(canvas, interpolation="nearest", extent=(0, width, height, 0))
        axis.set_title("what the model sees" if layer < 0 else f"layer {layers[layer]}", size=11)
    _expert_legend(figure, chosen, colors)
    return save_figure(figure, path)


def plot_specialization(numbers: JsonObject, layers: Sequence[int], path: str | Path) -> Path:
    """Draw for each sparse layer how much a token's expert tells of its question's type, in bits.

    Text and image tokens are each beside the same with shuffled types.

    Args:
        numbers: `specialization` of `inspection.py`.
        layers: the decoder's index of each sparse layer.
        path: the PNG file to write.
    """
    figure = new_figure(min(max(5.5, 1.1 * len(layers) + 3), 10.5), 3.2)
    axis = figure.subplots()
    places = np.arange(len(layers))
    for offset, kind, color in ((-0.2, "text", ORANGE), (0.2, "image", BLUE)):
        bits, chance = (numbers[kind][key] for key in ("information_bits", "shuffled_95_bits"))
        axis.bar(places + offset, bits, 0.36, color=color, label=f"{kind} tokens")
        label = "95% of shuffles stay below" if kind == "text" else ""
        axis.hlines(
            chance, places + offset - 0.2, places + offset + 0.2, color="k", lw=2, label=label
        )
        for place, value, line in zip(places, bits, chance, strict=True):
            if len(layers) <= 8:
                above = max(value, line)
                axis.text(place + offset, above, f"{value:.3f}", ha="center", va="bottom", size=9.5)
    axis.set(xticks=places, ylabel="bits", xlabel="sparse layer", xlim=(-0.6, len(layers) - 0.4))
    axis.set_xticklabels(map(str, layers))
    axis.margins(y=0.16)
    axis.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", alpha=0.25, linewidth=0.6)
    axis.set_axisbelow(True)
    return save_figure(figure, path)


def tile_places(image: ImageRouting, height: int, width: int) -> list[tuple[int, int]]:
    """Return (top, left) of each tile in its row and column, a thumbnail below in the middle.

    A gap is a twentieth of a tile.
    """
    if image.rows == 0:
        return [(0, 0)]
    gap = max(height // 20, 2)
    down, right = height + gap, width + gap
    tiles = [(row * down, col * right) for row in range(image.rows) for col in range(image.cols)]
    if len(image.tiles) > len(tiles):
        tiles.append((image.rows * down + gap, (image.cols - 1) * right // 2))
    return tiles[: len(image.tiles)]


def _write_experts(
    axis: "Axes", tile: TileRouting, layer: int, place: tuple[int, int], scale: int, points: float
) -> None:
    """Write the experts' numbers into their cells, if a cell, so many points high, has room."""
    if points < POINTS_FOR_A_NUMBER:
        return
    height, width = (scale * pixels for pixels in tile.cell_size)
    for (row, col), expert in np.ndenumerate(tile.experts[layer]):
        axis.text(
            place[1] + (col + 0.5) * width,
            place[0] + (row + 0.5) * height,
            str(expert),
            ha="center",
            va="center",
            fontsize=min(points / 2.6, 13),
            fontweight="bold",
            bbox={"boxstyle": "round,pad=0.15", "fc": "w", "ec": "none", "alpha": 0.75},
        )


def _expert_legend(figure: "Figure", experts: Sequence[int], colors: Sequence[str]) -> None:
    from matplotlib.patches import Patch

    figure.legend(
        handles=[Patch(color=colors[expert], label=f"expert {expert}") for expert in experts],
        loc="outside lower center",
        ncols=min(len(experts), LEGEND_COLUMNS),
        frameon=False,
        fontsize=10,
    )


def _hue(degrees: float) -> str:
    """Return a color of this hue; lightness and chroma are always the same.

    The color space is Oklab (https://bottosson.github.io/posts/oklab/).
    """
    a, b = 0.11 * math.cos(math.radians(degrees)), 0.11 * math.sin(math.radians(degrees))
    long = (0.76 + 0.3963377774 * a + 0.2158037573 * b) ** 3
    medium = (0.76 - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (0.76 - 0.0894841775 * a - 1.2914855480 * b) ** 3
    linear = (
        4.0767416621 * long - 3.3077115913 * medium + 0.2309699292 * short,
        -1.2684380046 * long + 2.6097574011 * medium - 0.3413193965 * short,
        -0.0041960863 * long - 0.7034186147 * medium + 1.7076147010 * short,
    )
    values = [round(255 * _gamma(min(max(value, 0), 1))) for value in linear]
    return "#{:02x}{:02x}{:02x}".format(*values)


def _rgb(color: str) -> tuple[int, int, int]:
    return int(color[1:3], 16), int(color[3:5], 16), int(color[5:7], 16)


def _linear(value: float) -> float:
    """Turn a channel of sRGB in 0..1 into light."""
    return value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4


def _gamma(value: float) -> float:
    """Turn light into a channel of sRGB, the inverse of `_linear`."""
    return 12.92 * value if value <= 0.0031308 else 1.055 * value ** (1 / 2.4) - 0.055

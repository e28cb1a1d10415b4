"""Pictures of experts: colours that can be told apart, and planted experts at the right pixels."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlmoe.routing.inspection.figures import (
    EXPERT_COLORS,
    expert_colors,
    paint_tile,
    plot_image_experts,
    plot_specialization,
    text_color,
)
from vlmoe.routing.inspection.images import ImageRouting, TileRouting

# Machado, Oliveira and Fernandes (2009), https://doi.org/10.1109/TVCG.2009.113, severity 1.
SIGHT = {
    "normal": np.eye(3),
    "red-blind": [[0.1523, 1.0526, -0.2049], [0.1145, 0.7863, 0.0992], [-0.0039, -0.0481, 1.052]],
    "green-blind": [[0.3673, 0.8606, -0.228], [0.2801, 0.6725, 0.0474], [-0.0118, 0.0429, 0.9689]],
    "blue-blind": [[1.2555, -0.0767, -0.1788], [-0.0784, 0.9308, 0.1476], [0.0047, 0.6914, 0.3039]],
}


def rgb(color: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(color[1:]))


def oklab(color: str, sight: str) -> np.ndarray:
    values = np.array(rgb(color)) / 255
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    seen = np.clip(np.asarray(SIGHT[sight]) @ linear, 0, 1)
    cones = [[0.4122, 0.5363, 0.0514], [0.2119, 0.6807, 0.1074], [0.0883, 0.2817, 0.63]]
    lab = [[0.2105, 0.7936, -0.0041], [1.978, -2.4286, 0.4506], [0.0259, 0.7828, -0.8087]]
    return np.asarray(lab) @ np.cbrt(np.asarray(cones) @ seen)


@pytest.mark.parametrize("sight", SIGHT)
def test_no_two_experts_look_alike_to_anyone(sight: str) -> None:
    for count, least in ((8, 0.09), (12, 0.055)):
        colors = [oklab(color, sight) for color in expert_colors(count)]
        pairs = itertools.combinations(colors, 2)
        assert min(np.linalg.norm(one - other) for one, other in pairs) > least


def test_many_experts_have_a_circle_of_hues_and_text_can_be_read_on_all() -> None:
    colors = expert_colors(64)
    assert len(set(colors)) == 64 and colors[0] not in EXPERT_COLORS
    steps = [
        np.linalg.norm(oklab(one, "normal") - oklab(other, "normal"))
        for one, other in zip(colors, [*colors[1:], colors[0]], strict=True)
    ]
    assert max(steps) < 3 * min(steps), "the circle is closed, and no step is a jump"
    assert (text_color("#000000"), text_color("#ffffff")) == ("#ffffff", "#000000")
    assert text_color("#882255") == "#ffffff" and text_color("#EEDD88") == "#000000"


def tile(experts: list, picture: np.ndarray, cell: tuple[int, int] = (8, 16)) -> TileRouting:
    real = np.ones(picture.shape[:2], dtype=bool)
    real[-4:] = False
    return TileRouting(picture, real, cell, np.array(experts))


def test_planted_experts_tint_their_own_cells_and_nothing_else() -> None:
    # 2 x 3 cells of 8 x 16 pixels; 2 rows and 3 columns of pixels that no patch covers
    planted = [[[0, 1, 2], [3, 4, 5]], [[5, 4, 3], [2, 1, 0]]]
    picture = np.random.default_rng(0).integers(0, 256, (18, 51, 3), dtype=np.uint8)
    picture[-4:] = 225  # the grey of padding
    colors = expert_colors(6)
    for layer, scale in itertools.product((0, 1), (1, 4)):
        painted = paint_tile(tile(planted, picture), layer, colors, side=18 * scale)
        assert painted.shape == (18 * scale, 51 * scale, 3)
        grey = 0.5 * (picture @ [0.299, 0.587, 0.114]) + 127.5
        for (y, x), value in np.ndenumerate(grey):
            row, col = y // 8, x // 16
            inside, pixel = row < 2 and col < 3, painted[y * scale, x * scale]
            if not inside:
                assert abs(pixel - value).max() <= 0.5
                continue
            color = np.array(rgb(colors[planted[layer][row][col]]))
            at_edge = y % 8 in (0, 7) or x % 16 in (0, 15)
            tinted = color if at_edge and (scale == 1 or y % 8 == 0) else (value + color) / 2
            if scale == 1 or not at_edge or y % 8 == 0:
                assert abs(pixel - tinted).max() <= 0.51, (y, x)


def centre(picture: np.ndarray, color: str, left: int = 0) -> tuple[float, float]:
    """Mean row and column of the pixels of exactly this colour right of `left`, above the legend's
    part."""
    part = picture[: int(0.86 * len(picture)), left:]
    rows, cols = np.nonzero((part == rgb(color)).all(-1))
    assert len(rows) > 50, f"no {color}"
    return float(rows.mean()), float(cols.mean()) + left


def test_the_layers_stand_side_by_side_with_their_cells_in_place(tmp_path: Path) -> None:
    planted = [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]
    picture = np.full((16, 32, 3), 255, dtype=np.uint8)
    image = ImageRouting([tile(planted, picture)], 0, 0)
    path = plot_image_experts(image, (1, 3), 8, tmp_path / "image.png")
    drawn = np.asarray(Image.open(path).convert("RGB"))
    places = [centre(drawn, color) for color in expert_colors(8)]
    for first in (0, 4):
        (y0, x0), (y1, x1), (y2, x2), (y3, x3) = places[first : first + 4]
        assert x0 < x1 and y0 < y2 and x2 < x3 and y1 < y3
        assert abs(y0 - y1) < 2 and abs(x0 - x2) < 2
    assert places[1][1] < places[4][1], "the second layer is right of the first"
    assert all(x > drawn.shape[1] / 3 - 5 for _, x in places), "the bare picture comes first"


def test_tiles_lie_where_they_were_cut_and_the_thumbnail_below(tmp_path: Path) -> None:
    picture = np.full((16, 16, 3), 255, dtype=np.uint8)
    tiles = [tile([[[number, number]] * 2], picture, (8, 8)) for number in range(7)]
    path = plot_image_experts(ImageRouting(tiles, 2, 3), (0,), 7, tmp_path / "image.png")
    drawn = np.asarray(Image.open(path).convert("RGB"))
    rows, cols = zip(*(centre(drawn, color) for color in expert_colors(7)), strict=True)
    assert cols[0] < cols[1] < cols[2] and cols[3] < cols[4] < cols[5]
    assert max(rows[:3]) < min(rows[3:6]) <= max(rows[3:6]) < rows[6]
    assert abs(cols[0] - cols[3]) < 2 and abs(cols[6] - cols[1]) < 2


@pytest.mark.parametrize("layers", [1, 24])
def test_specialization_is_drawn_for_few_and_many_layers(layers: int, tmp_path: Path) -> None:
    bits = {"information_bits": [0.5] * layers, "shuffled_95_bits": [0.1] * layers}
    path = plot_specialization({"text": bits, "image": bits}, range(layers), tmp_path / "a.png")
    seen = {color for _, color in Image.open(path).convert("RGB").getcolors(maxcolors=1 << 24)}
    assert {(0xD9, 0x73, 0x1A), (0x2A, 0x78, 0xD6)} <= seen

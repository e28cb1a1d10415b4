"""The grid that the tokens of native models' images lie on, against grids made by hand."""

import torch

from vlmoe.routing.inspection.grids import CellGrid, cell_grids


def marks(*lengths: int) -> list[bool]:
    """Runs of image tokens, one text token before each."""
    return [is_image for length in lengths for is_image in (False, *[True] * length)]


def test_patches_are_merged_in_rows_and_columns() -> None:
    inputs = {"image_grid_thw": torch.tensor([[1, 4, 6], [1, 8, 2]])}
    grids = cell_grids(inputs, "image", marks(6, 4), 2, "qwen3_vl_moe", 2)
    assert grids == [CellGrid(1, 2, 3), CellGrid(1, 4, 1)]
    assert cell_grids(inputs, "image", marks(6, 5), 2, "qwen3_vl_moe", 2) is None, "11 tokens"
    assert cell_grids(inputs, "image", marks(6, 4), 2, "qwen3_vl_moe", 3) is None, "three images"


def test_a_video_has_a_tile_for_each_step_of_time_also_between_time_stamps() -> None:
    inputs = {"video_grid_thw": torch.tensor([[3, 2, 4]])}
    assert cell_grids(inputs, "video", marks(2, 2, 2), 2, "qwen3_vl_moe") == [CellGrid(3, 1, 2)]
    assert cell_grids(inputs, "image", marks(6), 2, "qwen3_vl_moe", 1) is None


def test_positions_of_pooled_patches_leave_padding_out() -> None:
    column, row = torch.arange(4).repeat(2), torch.arange(2).repeat_interleave(4)
    places = torch.stack([column, row], -1)
    padded = torch.cat([places, torch.full((5, 2), -1)])
    found = cell_grids({"image_position_ids": padded[None]}, "image", marks(2), 2, "gemma4", 1)
    assert found == [CellGrid(1, 1, 2)]


def test_tiles_are_squares_shared_by_runs() -> None:
    tiles = {"pixel_values": torch.zeros(4, 3, 8, 8)}
    found = cell_grids(tiles, "image", marks(4, 12), 1, "internvl", 2)
    assert found == [CellGrid(1, 2, 2), CellGrid(3, 2, 2)]
    assert cell_grids(tiles, "image", marks(16), 1, "llava", 4) == [CellGrid(1, 2, 2)] * 4
    assert cell_grids(tiles, "image", marks(12), 1, "llava", 4) is None, "3 is no square"
    assert cell_grids(tiles, "image", marks(16), 1, "llava_next", 4) is None, "has row marks"

"""Cells of image tokens: where the vision tower's patches are, in the tiles that the model saw."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import PreTrainedTokenizerBase

from vlmoe.modeling_vlmoe.connector import pixel_shuffle
from vlmoe.processing.processing_vlmoe import VLMoEProcessor
from vlmoe.routing.inspection.images import image_routings
from vlmoe.routing.trace import TokenRouting


def planted(processor: VLMoEProcessor, images: Sequence[Image.Image], **options: Any) -> Any:
    """Inputs of a prompt, and a routing in which the experts count the image tokens."""
    text = "<image>".join("ab" for _ in range(len(images) + 1))
    inputs = processor(images=[list(images)], text=[text], return_tensors="pt", **options)
    ids = inputs["input_ids"][0]
    is_image = ids == processor.image_token_id
    numbers = torch.where(is_image, is_image.cumsum(0) - 1, -1)
    experts = torch.stack([numbers, 1000 + numbers])[..., None]  # two layers, k = 1
    routing = TokenRouting((0, 2), 2000, ids, is_image.long(), experts, torch.ones(experts.shape))
    return inputs, routing


def test_a_cell_covers_the_patches_that_pixel_shuffle_joins(
    tiny_config: Callable[..., Any], processor: VLMoEProcessor, make_image: Callable[..., Any]
) -> None:
    config = tiny_config()
    _, routing = planted(processor, [make_image()])
    [image] = image_routings(routing, [make_image()], processor, config)
    [tile] = image.tiles
    side = 16 // 4  # patches
    patches = torch.arange(side * side, dtype=torch.float).view(1, -1, 1)
    joined = pixel_shuffle(patches, 2)[0].int().tolist()  # (image tokens, patches of each)
    assert tile.cell_size == (8, 8) and tile.experts.shape == (2, 2, 2)
    for (row, col), token in np.ndenumerate(tile.experts[0]):
        rows, cols = range(2 * row, 2 * row + 2), range(2 * col, 2 * col + 2)
        assert joined[token] == [r * side + c for r in rows for c in cols]
    assert (tile.experts[1] == 1000 + tile.experts[0]).all()


def test_the_picture_is_what_the_tower_is_given(
    tiny_config: Callable[..., Any], processor: VLMoEProcessor, make_image: Callable[..., Any]
) -> None:
    image = make_image()
    _, routing = planted(processor, [image])
    [shown] = image_routings(routing, [image], processor, tiny_config())
    resized = np.asarray(image.resize((16, 16), Image.Resampling.LANCZOS))
    assert (shown.tiles[0].picture == resized).all()
    assert shown.tiles[0].is_real.all() and (shown.rows, shown.cols) == (0, 0)


def test_tiles_of_several_images_are_told_apart_in_the_order_of_their_markers(
    tiny_config: Callable[..., Any],
    tokenizer: PreTrainedTokenizerBase,
    make_image: Callable[..., Any],
) -> None:
    processor = VLMoEProcessor.for_config(tiny_config(), tokenizer, tiling=True)
    pair = [make_image(1, size=(40, 20)), make_image(2, size=(10, 33))]
    inputs, routing = planted(processor, pair)
    images = image_routings(routing, pair, processor, tiny_config())
    assert [(image.rows, image.cols) for image in images] == [(2, 3), (3, 1)]
    ids = inputs["input_ids"][0].tolist()
    positions = [i for i, token in enumerate(ids) if token == processor.image_token_id]
    for image, source in zip(images, pair, strict=True):
        resized = source.resize((16 * image.cols, 16 * image.rows), Image.Resampling.LANCZOS)
        for number, tile in enumerate(image.tiles):
            first = int(tile.experts[0, 0, 0])
            assert tile.experts[0].flatten().tolist() == list(range(first, first + 4))
            marker = tokenizer.convert_ids_to_tokens(ids[positions[first] - 1])
            row, col = divmod(number, image.cols)
            if number == image.rows * image.cols:
                assert marker == "<global-img>"
                continue
            assert marker == f"<row_{row + 1}_col_{col + 1}>"
            box = (16 * col, 16 * row, 16 * col + 16, 16 * row + 16)
            assert (tile.picture == np.asarray(resized.crop(box))).all()


def test_a_class_token_that_is_kept_is_no_cell(
    tiny_config: Callable[..., Any],
    tokenizer: PreTrainedTokenizerBase,
    make_image: Callable[..., Any],
) -> None:
    config = tiny_config(
        vision={"model_type": "clip_vision_model"},
        pixel_shuffle_factor=1,
        vision_feature_select_strategy="full",
    )
    processor = VLMoEProcessor.for_config(config, tokenizer)
    assert processor.image_seq_len == 17
    _, routing = planted(processor, [make_image()])
    [image] = image_routings(routing, [make_image()], processor, config)
    assert image.tiles[0].experts[0].flatten().tolist() == list(range(1, 17))
    assert image.tiles[0].cell_size == (4, 4)


def test_images_of_another_prompt_are_refused(
    tiny_config: Callable[..., Any], processor: VLMoEProcessor, make_image: Callable[..., Any]
) -> None:
    _, routing = planted(processor, [make_image()])
    with pytest.raises(ValueError, match="4 image tokens, but its 2 images give 8"):
        image_routings(routing, [make_image(), make_image()], processor, tiny_config())
    assert image_routings(routing, [], processor, tiny_config()) == []

"""Images become tiles, tiles become one padded tensor per batch."""

import copy

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    CLIPImageProcessorPil,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    SiglipImageProcessorPil,
    SmolVLMImageProcessorPil,
)
from transformers.models.idefics3.image_processing_pil_idefics3 import get_resize_output_image_size

from vlmoe.processing import processing_vlmoe
from vlmoe.processing.image_checks import load_rgb_image
from vlmoe.processing.image_layout import tile_grid
from vlmoe.processing.processing_vlmoe import VLMoEProcessor


def normalized(image: Image.Image) -> torch.Tensor:
    """(3, H, W), as SigLIP takes it."""
    pixels = torch.from_numpy(np.array(image, dtype=np.float32))
    return (pixels.permute(2, 0, 1) / 255 - 0.5) / 0.5


def expected_tiles(image: Image.Image, rows: int, cols: int, tile: int) -> torch.Tensor:
    """Crops of the image resized to whole tiles, in reading order, then the thumbnail."""
    resized = image.resize((cols * tile, rows * tile), Image.Resampling.LANCZOS)
    crops = [
        resized.crop((c * tile, r * tile, (c + 1) * tile, (r + 1) * tile))
        for r in range(rows)
        for c in range(cols)
    ]
    crops.append(resized.resize((tile, tile), Image.Resampling.LANCZOS))
    return torch.stack([normalized(crop) for crop in crops])


def test_fixed_image_is_resized_once_and_expands_to_image_tokens(processor, make_image, tile, seq):
    image = make_image()
    output = processor(images=[image], text=["what <image> is it?"], return_tensors="pt")
    wanted = processor.tokenizer([f"what {seq} is it?"])["input_ids"]
    assert output["input_ids"].tolist() == wanted
    assert output["pixel_values"].shape == (1, 1, 3, tile, tile)
    reference = normalized(image.resize((tile, tile), Image.Resampling.LANCZOS))
    torch.testing.assert_close(output["pixel_values"][0, 0], reference)
    assert output["pixel_attention_mask"].eq(1).all()


@pytest.mark.parametrize(("width", "height", "rows", "cols"), [(40, 20, 2, 3), (10, 33, 3, 1)])
def test_tiles_are_crops_of_the_resized_image_then_the_thumbnail(
    processor, make_image, tile, width, height, rows, cols
):
    image = make_image(size=(width, height))
    output = processor(images=image, text="<image>", do_image_splitting=True, return_tensors="pt")
    wanted = expected_tiles(image, rows, cols, tile)
    torch.testing.assert_close(output["pixel_values"][0], wanted)


def test_tiling_can_be_switched_for_a_call_or_by_default(processor, tiny_config, make_image):
    image = make_image(size=(40, 20))
    by_default = VLMoEProcessor.for_config(tiny_config(), processor.tokenizer, tiling=True)
    calls = [
        (processor, {}, 1),
        (processor, {"do_image_splitting": True}, 7),
        (processor, {"images_kwargs": {"do_image_splitting": True}}, 7),
        (by_default, {}, 7),
        (by_default, {"do_image_splitting": False}, 1),
    ]
    for chosen, options, tiles in calls:
        output = chosen(images=image, text="<image>", return_tensors="pt", **options)
        assert output["pixel_values"].shape[1] == tiles
        assert output["mm_token_type_ids"].sum() == tiles * processor.image_seq_len


def test_a_small_image_stays_one_tile_and_a_huge_one_is_bounded(processor, make_image):
    tiled = {"text": "<image>", "do_image_splitting": True, "return_tensors": "pt"}
    assert processor(images=make_image(size=(9, 9)), **tiled)["pixel_values"].shape[1] == 1
    assert processor(images=make_image(size=(500, 499)), **tiled)["pixel_values"].shape[1] == 17


@pytest.mark.parametrize("splitting", [True, False])
def test_pixels_and_text_equal_those_of_transformers_idefics3(
    tokenizer, make_image, tile, seq, splitting
):
    image_processor = Idefics3ImageProcessorPil(
        size={"longest_edge": 3 * tile},
        max_image_size={"longest_edge": tile},
        do_image_splitting=splitting,
    )
    theirs = Idefics3Processor(image_processor, copy.deepcopy(tokenizer), seq.count("<image>"))
    ours = VLMoEProcessor(image_processor, tokenizer, image_seq_len=seq.count("<image>"))
    images = [[make_image(), make_image(1, (16, 60))], [make_image(2, (50, 20))]]
    text = ["<image> and <image>", "<image>?"]
    inputs = {"images": images, "return_tensors": "pt", "padding": True}
    reference, output = theirs(text=text, **inputs), ours(text=text, **inputs)
    assert torch.equal(output["pixel_values"], reference["pixel_values"])
    assert torch.equal(output["pixel_attention_mask"], reference["pixel_attention_mask"])
    theirs_only = ["<fake_token_around_image>"] + ["<global-img>"] * (not splitting)
    for ours_row, their_row in zip(output["input_ids"], reference["input_ids"], strict=True):
        expanded = theirs.tokenizer.decode(their_row)
        for token in theirs_only:
            expanded = expanded.replace(token, "")
        assert tokenizer.decode(ours_row).replace("<|pad|>", "") == expanded.replace("<|pad|>", "")


def test_smolvlm_image_processor_tiles_too(tokenizer, make_image, tile):
    image_processor = SmolVLMImageProcessorPil(
        do_resize=False,
        size={"longest_edge": 4 * tile},
        max_image_size={"longest_edge": tile},
    )
    processor = VLMoEProcessor(image_processor, tokenizer, image_seq_len=4)
    image = make_image(size=(40, 20))
    output = processor(images=image, text="<image>", return_tensors="pt")
    torch.testing.assert_close(output["pixel_values"][0], expected_tiles(image, 2, 3, tile))


@pytest.mark.parametrize(
    "image_processor",
    [
        SiglipImageProcessorPil(size={"height": 18, "width": 14}),
        CLIPImageProcessorPil(size={"shortest_edge": 14}, crop_size={"height": 14, "width": 14}),
    ],
)
def test_flat_image_processors_give_one_tile_per_image(tokenizer, make_image, image_processor):
    processor = VLMoEProcessor(image_processor, tokenizer, image_seq_len=3)
    images = [[make_image(0)], [], [make_image(1), make_image(2)]]
    output = processor(
        images=images, text=["<image>", "x", "<image><image>"], padding=True, return_tensors="pt"
    )
    reference = image_processor([make_image(i) for i in range(3)], return_tensors="pt")
    pixels = output["pixel_values"]
    assert torch.equal(pixels[[0, 2, 2], [0, 0, 1]], reference["pixel_values"])
    assert not pixels[1].any() and not pixels[0, 1].any()
    assert output["pixel_attention_mask"].flatten(2).all(2).tolist() == [
        [True, False],
        [False, False],
        [True, True],
    ]
    with pytest.raises(ValueError, match="cannot tile"):
        processor(images=make_image(), text="<image>", do_image_splitting=True)
    processor(images=make_image(), text="<image>", do_image_splitting=False)


def test_rows_with_different_numbers_of_images_are_padded_with_zeros(processor, make_image, seq):
    first, second = make_image(1, (40, 20)), make_image(2, (9, 9))
    text = ["<image>a<image>", "b", "<image>"]
    output = processor(
        images=[[first, second], [], [second]],
        text=text,
        do_image_splitting=True,
        padding=True,
        return_tensors="pt",
    )
    real = output["pixel_attention_mask"].flatten(2)
    assert real.sum(2).gt(0).sum(1).tolist() == [8, 0, 1]
    padding = ~real.bool().all(2)
    assert not output["pixel_values"][padding].any()
    assert output["mm_token_type_ids"].sum(1).tolist() == [8 * seq.count("<"), 0, seq.count("<")]
    for row, images in enumerate([[first, second], [], [second]]):
        alone = processor(
            images=[images], text=[text[row]], do_image_splitting=True, return_tensors="pt"
        )
        kept = output["attention_mask"][row].bool()
        assert torch.equal(output["input_ids"][row][kept], alone["input_ids"][0])
        if images:
            pixels = alone["pixel_values"][0]
            assert torch.equal(output["pixel_values"][row][: len(pixels)], pixels)


def test_flat_images_are_dealt_out_by_placeholders(processor, make_image):
    images = [make_image(i) for i in range(3)]
    text = ["<image>", "x", "<image> <image>"]
    inputs = {"text": text, "padding": True, "return_tensors": "pt"}
    nested = processor(images=[images[:1], [], images[1:]], **inputs)
    for flat in (images, tuple(images), np.stack([np.array(image) for image in images])):
        assert torch.equal(processor(images=flat, **inputs)["pixel_values"], nested["pixel_values"])


def test_images_alone_follow_idefics3(processor, make_image, tile):
    images = [make_image(i) for i in range(3)]
    assert set(processor(images=images)) == {"pixel_values", "pixel_attention_mask"}
    layouts = [(images, (1, 3)), ([images[:1], images[1:]], (2, 2)), (images[0], (1, 1))]
    for given, shape in layouts:
        pixels = processor(images=given, return_tensors="pt")["pixel_values"]
        assert pixels.shape == (*shape, 3, tile, tile)


def test_an_image_shared_by_rows_is_opened_and_encoded_once(
    processor, make_image, monkeypatch, tmp_path
):
    image, path, calls = make_image(), str(tmp_path / "image.png"), []
    image.save(path)

    def counted(function):
        return lambda *args, **kwargs: calls.append(args[-1]) or function(*args, **kwargs)

    backend = type(processor.image_processor)
    monkeypatch.setattr(backend, "rescale", counted(backend.rescale))
    monkeypatch.setattr(processing_vlmoe, "load_rgb_image", counted(load_rgb_image))
    rows = [[image], [path], [image], ["".join(path)]]
    output = processor(images=rows, text=["<image>"] * 4, return_tensors="pt")
    assert len(calls) == 2 + 2
    assert torch.equal(output["pixel_values"], output["pixel_values"][:1].expand(4, 1, 3, -1, -1))


@pytest.mark.parametrize("longest_edge", [None, 20, 45, 48, 64])
@pytest.mark.parametrize("do_resize", [True, False])
@pytest.mark.parametrize("splitting", [True, False])
@pytest.mark.parametrize("trim", [0, 1])
def test_token_counts_planned_from_sizes_equal_those_of_calls(
    processor, make_image, tile, longest_edge, do_resize, splitting, trim
):
    size = {"longest_edge": longest_edge} if longest_edge else {"height": 40, "width": 20}
    image_processor = Idefics3ImageProcessorPil(
        do_resize=do_resize,
        size=size,
        max_image_size={"longest_edge": tile - trim},
        do_image_splitting=splitting,
    )
    planner = VLMoEProcessor(image_processor, processor.tokenizer, image_seq_len=2)
    sizes = [(16, 16), (1, 1), (17, 16), (40, 20), (30, 41), (1, 200), (99, 7), (64, 64), (65, 63)]
    plan = planner._get_num_multimodal_tokens([[height, width] for width, height in sizes])
    for (width, height), tokens, tiles in zip(
        sizes, plan["num_image_tokens"], plan["num_image_patches"], strict=True
    ):
        output = planner(
            images=make_image(size=(width, height)), text="<image>", return_tensors="pt"
        )
        assert output["input_ids"].shape[1] == tokens, (width, height)
        assert output["pixel_values"].shape[1] == tiles, (width, height)


def test_an_unknown_pixel_layout_is_refused_by_name(processor, make_image):
    class Strange(SiglipImageProcessorPil):
        def __call__(self, images, **kwargs):
            return {"pixel_values": torch.zeros(len(images), 2, 1, 3, 8, 8)}

    strange = VLMoEProcessor(Strange(), processor.tokenizer)
    with pytest.raises(ValueError, match="Strange made pixel_values of shape"):
        strange(images=make_image(), text="<image>")


class SizesOnly(Idefics3ImageProcessorPil):
    """transformers' steps from image to tiles, without pixels."""

    def resize(self, image, size, **kwargs):
        return np.broadcast_to(np.uint8(0), (3, size.height, size.width))


@pytest.mark.parametrize("longest", [45, 64, 4096, 5001])
def test_idefics3_grids_are_those_of_transformers(longest, tile):
    sizes = {"size": {"longest_edge": longest}, "max_image_size": {"longest_edge": tile}}
    image_processor = SizesOnly(do_resize=True, do_image_splitting=True, **sizes)
    for height in (1, 2, 17, 333, 1000, 4095):
        for width in (1, 3, 16, 334, 999, 6000):
            image = np.broadcast_to(np.uint8(0), (3, height, width))
            size = get_resize_output_image_size(image, longest)
            resized = np.broadcast_to(np.uint8(0), (3, *size))
            _, high, wide = image_processor.resize_for_vision_encoder(resized, tile).shape
            grid = (high // tile, wide // tile)
            wanted = grid if max(grid) > 1 else (0, 0)
            assert tile_grid(height, width, image_processor, {}) == wanted, (height, width)

"""The processor: token layout, counts, truncation, saving."""

import copy
import inspect
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoImageProcessor,
    AutoProcessor,
    SiglipImageProcessorPil,
)

from vlmoe import VLMoEConfig
from vlmoe.processing.processing_vlmoe import VLMoEProcessor


def token_ids(processor: VLMoEProcessor, text: str) -> list[int]:
    return processor.tokenizer(text, add_special_tokens=False)["input_ids"]


def test_start_and_end_tokens_wrap_each_image(processor, make_image, seq):
    wrapped = VLMoEProcessor(
        processor.image_processor,
        processor.tokenizer,
        image_seq_len=processor.image_seq_len,
        image_start_token="<|system|>",
        image_end_token="<|user|>",
    )
    output = wrapped(images=[make_image(), make_image(1)], text="a<image><image>b")
    wanted = f"a<|system|>{seq}<|user|><|system|>{seq}<|user|>b"
    assert output["input_ids"] == [token_ids(processor, wanted)]
    tiled = wrapped(images=[make_image()], text="<image>", do_image_splitting=True)
    tokens = wrapped.tokenizer.convert_ids_to_tokens(tiled["input_ids"][0])
    assert (tokens[0], tokens[-1]) == ("<|system|>", "<|user|>")
    assert (tokens.count("<|system|>"), tokens.count("<|user|>")) == (1, 1)


def test_tiled_image_expands_to_markers_and_tokens_in_tile_order(processor, make_image, seq):
    image = make_image(size=(40, 20))
    output = processor(images=image, text="a<image>b", do_image_splitting=True)
    wanted = (
        f"a<row_1_col_1>{seq}<row_1_col_2>{seq}<row_1_col_3>{seq}\n"
        f"<row_2_col_1>{seq}<row_2_col_2>{seq}<row_2_col_3>{seq}\n"
        f"\n<global-img>{seq}b"
    )
    assert output["input_ids"] == [token_ids(processor, wanted)]
    tokens = processor.tokenizer.convert_ids_to_tokens(output["input_ids"][0])
    assert tokens.count("<row_2_col_3>") == tokens.count("<global-img>") == 1


@pytest.mark.parametrize("images", [None, [], [[], []], [None, None]])
def test_a_batch_without_images_has_no_pixel_keys(processor, images):
    output = processor(images=images, text=["a", "b c"], padding=True, return_tensors="pt")
    assert set(output) == {"input_ids", "attention_mask", "mm_token_type_ids"}
    assert not output["mm_token_type_ids"].any()


def test_mm_token_type_ids_mark_image_tokens_and_can_be_left_out(processor, make_image):
    inputs = {"images": make_image(), "text": "a<image>b", "return_tensors": "pt"}
    output = processor(**inputs)
    assert torch.equal(
        output["mm_token_type_ids"], (output["input_ids"] == processor.image_token_id).long()
    )
    assert "mm_token_type_ids" not in processor(**inputs, return_mm_token_type_ids=False)


def test_model_input_names_are_exactly_the_outputs(processor, tokenizer, make_image):
    siglip = VLMoEProcessor(SiglipImageProcessorPil(size={"height": 9, "width": 9}), tokenizer)
    for chosen in (processor, siglip):
        output = chosen(images=make_image(), text="<image>")
        assert set(output) == set(chosen.model_input_names)
        assert len(chosen.model_input_names) == 5


def test_token_type_ids_of_a_tokenizer_are_dropped(processor, make_image):
    tokenizer = copy.deepcopy(processor.tokenizer)
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    other = VLMoEProcessor(processor.image_processor, tokenizer)
    assert "token_type_ids" not in other(images=make_image(), text="<image>")
    assert "token_type_ids" not in other.model_input_names


def test_numpy_and_list_outputs(processor, make_image):
    inputs = {"images": make_image(), "text": ["a<image>"]}
    tensors = processor(**inputs, return_tensors="pt")
    arrays = processor(**inputs, return_tensors="np")
    assert all(isinstance(value, np.ndarray) for value in arrays.values())
    for name, value in tensors.items():
        assert np.array_equal(arrays[name], value.numpy())
    assert processor(**inputs)["input_ids"] == tensors["input_ids"].tolist()


def test_batch_decode_gives_the_text_back(processor, make_image, seq):
    output = processor(images=make_image(), text=["<image>wörd<|end|>"], return_tensors="pt")
    assert processor.batch_decode(output["input_ids"]) == [f"{seq} wörd<|end|>"]
    assert processor.batch_decode(output["input_ids"], skip_special_tokens=True) == ["wörd"]


@pytest.mark.parametrize(
    ("text", "images", "sample", "placeholders", "given"),
    [
        (["<image>", "<image>"], [1, 0], 1, 1, 0),
        (["<image>", "x"], [1, 1], 1, 0, 1),
        (["a", "<image><image>"], [0, 1], 1, 2, 1),
    ],
)
def test_a_wrong_number_of_images_names_the_sample_and_both_counts(
    processor, make_image, text, images, sample, placeholders, given
):
    nested = [[make_image()] * count for count in images]
    message = f"sample {sample}: .* {placeholders} <image> placeholders but {given} images"
    with pytest.raises(ValueError, match=message):
        processor(images=nested, text=text)


def test_flat_images_that_do_not_fit_name_a_sample_too(processor, make_image):
    with pytest.raises(ValueError, match=r"sample 1: .* 1 <image> placeholders but 2 images"):
        processor(images=[make_image()] * 3, text=["<image>", "<image>"])
    with pytest.raises(ValueError, match=r"sample 1: .* 1 <image> placeholders but 0 images"):
        processor(images=[make_image()], text=["<image>", "<image>"])
    with pytest.raises(ValueError, match=r"sample 0: .* 1 <image> placeholders but 0 images"):
        processor(text="<image>")
    with pytest.raises(ValueError, match="`images` has 1 rows but `text` has 2"):
        processor(images=[[make_image()]], text=["<image>", "<image>"])


def test_transformers_tests_see_what_the_processor_takes_and_overrides(processor, make_image):
    """They read it from the signature of a call and from the first base class."""
    assert [*inspect.signature(VLMoEProcessor.__call__).parameters] == [
        *("self", "images", "text", "kwargs")
    ]
    base = VLMoEProcessor.__mro__[1]
    assert base.replace_image_token is not VLMoEProcessor.replace_image_token
    with pytest.raises(ValueError, match=" tokens in the prompts should be the same as the number"):
        processor(images=[[make_image()]] * 3, text=["<image>"] * 2)


def test_videos_are_refused(processor):
    with pytest.raises(ValueError, match="takes images and text"):
        processor(text="a", videos=[np.zeros((2, 4, 4, 3))])


def test_the_callers_lists_stay_as_they_were(processor, make_image):
    image, text = make_image(), ["<image>a"]
    images = [[image]]
    processor(images=images, text=text)
    assert text == ["<image>a"] and images == [[image]]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("return_tensors", [None, "pt"])
def test_truncation_never_cuts_an_image(processor, make_image, monkeypatch, side, return_tensors):
    monkeypatch.setattr(processor.tokenizer, "truncation_side", side)
    wrapped = VLMoEProcessor(
        processor.image_processor,
        processor.tokenizer,
        image_seq_len=processor.image_seq_len,
        image_start_token="<|system|>",
        image_end_token="<|user|>",
    )
    text = "xyz" + "<image>" + "qwv"
    if side == "left":
        keep = processor.image_seq_len + 2 + len(token_ids(processor, "qwv"))
    else:
        keep = processor.image_seq_len + 2 + len(token_ids(processor, "xyz"))
    length = len(wrapped(images=make_image(), text=text)["input_ids"][0])
    for limit in range(1, length + 1):
        options = {"truncation": True, "max_length": limit, "return_tensors": return_tensors}
        call = {"images": [[], [make_image()]], "text": ["a" * 99, text], "padding": True}
        if limit < keep:
            message = f"sample 1: truncation to {limit} tokens .* the sample has {length} tokens"
            with pytest.raises(ValueError, match=message):
                wrapped(**call, **options)
        else:
            output = wrapped(**call, **options)
            assert len(output["input_ids"][1]) == limit
            kept = wrapped.tokenizer.decode(output["input_ids"][1])
            assert f"<|system|>{'<image>' * processor.image_seq_len}<|user|>" in kept


def test_truncation_never_cuts_a_tile_marker(processor, make_image, monkeypatch):
    monkeypatch.setattr(processor.tokenizer, "truncation_side", "left")
    call = {"images": make_image(size=(40, 20)), "text": "<image>", "do_image_splitting": True}
    length = len(processor(**call)["input_ids"][0])
    processor(**call, truncation=True, max_length=length)
    with pytest.raises(ValueError, match=r"sample 0: .* would cut an image"):
        processor(**call, truncation=True, max_length=length - 1)


def test_plain_text_is_truncated_as_usual(processor):
    output = processor(text=["a b c d e f", "a"], truncation=True, max_length=3)
    assert [len(row) for row in output["input_ids"]] == [3, 1]


def test_a_processor_survives_saving_and_auto_loading(processor, make_image, tmp_path):
    AutoProcessor.register(VLMoEConfig, VLMoEProcessor, exist_ok=True)
    saved = VLMoEProcessor(
        processor.image_processor,
        processor.tokenizer,
        image_seq_len=3,
        image_start_token="<|system|>",
        image_end_token="<|user|>",
        global_image_token="<row_4_col_4>",
    )
    saved.save_pretrained(tmp_path)
    call: dict[str, Any] = {"images": make_image(), "text": "a<image>", "return_tensors": "pt"}
    conversation = {"conversation": [{"role": "user", "content": [{"type": "image"}]}]}
    for splitting in (False, True):
        call["do_image_splitting"] = splitting
        wanted = saved(**call)
        for loader in (VLMoEProcessor, AutoProcessor):
            loaded = loader.from_pretrained(tmp_path)
            assert type(loaded) is VLMoEProcessor
            assert loaded.to_dict() == saved.to_dict()
            output = loaded(**call)
            assert set(output) == set(wanted)
            assert all(torch.equal(output[name], wanted[name]) for name in wanted)
            rendered = loaded.apply_chat_template(**conversation)
            assert rendered == saved.apply_chat_template(**conversation)
    auto = AutoImageProcessor.from_pretrained(tmp_path)
    assert type(auto).__name__.startswith("Idefics3ImageProcessor")


def test_an_image_token_that_is_not_one_token_is_refused(processor):
    with pytest.raises(ValueError, match="'<picture>' is not one token"):
        VLMoEProcessor(processor.image_processor, processor.tokenizer, image_token="<picture>")
    with pytest.raises(ValueError, match="`image_seq_len` is 0"):
        VLMoEProcessor(processor.image_processor, processor.tokenizer, image_seq_len=0)


def test_processing_imports_neither_the_model_nor_optional_packages():
    folder = Path(sys.modules[VLMoEProcessor.__module__].__file__).parent
    imports = [line for path in folder.glob("*.py") for line in path.read_text().splitlines()]
    imports = [line.strip() for line in imports if line.strip().startswith(("import ", "from "))]
    assert not [line for line in imports if line.startswith(("from ..modeling_", "from vlmoe"))]
    roots = {line.split()[1].split(".")[0] for line in imports}
    allowed = {"torch", "transformers", "PIL", "numpy", ""} | set(sys.stdlib_module_names)
    assert roots <= allowed


def test_for_config_checks_the_image_token_id(tiny_config, tokenizer):
    with pytest.raises(ValueError, match=r"`image_token_id` is 7 .* token 5 "):
        VLMoEProcessor.for_config(tiny_config(image_token_id=7), tokenizer)


def test_for_config_takes_any_object_with_the_fields(tokenizer, make_image):
    config = SimpleNamespace(
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        pixel_shuffle_factor=1,
        vision_feature_select_strategy="full",
        vision_config=SimpleNamespace(model_type="other", image_size=[12, 12], patch_size=[4, 6]),
    )
    processor = VLMoEProcessor.for_config(config, tokenizer, max_tiles_per_side=2, tiling=True)
    output = processor(images=make_image(size=(99, 98)), text="<image>", return_tensors="pt")
    assert processor.image_seq_len == 6
    assert output["pixel_values"].shape == (1, 5, 3, 12, 12)

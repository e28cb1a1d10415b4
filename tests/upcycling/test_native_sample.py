"""The sample of a native conversion is the processor's, and shows its pictures."""

from pathlib import Path
from typing import Any

import pytest
import torch
from native_dense import IMAGE, VIDEO, dense_model, language_config, vision_config
from native_processors import tiny_processor, tiny_tokenizer

from vlmoe.upcycling.native_sample import drawn_inputs, processed_inputs, source_processor
from vlmoe.upcycling.native_target import NativeTarget
from vlmoe.upcycling.options import Upcycling


@pytest.mark.parametrize("family", ["qwen3_vl", "internvl", "gemma4"])
@pytest.mark.parametrize("with_template", [True, False])
@torch.no_grad()
def test_pictures_and_texts_come_from_the_processor(family: str, with_template: bool) -> None:
    model, processor = dense_model(vision_config(family)), tiny_processor(family)
    if not with_template:
        processor.chat_template = None
    sample = dict(processed_inputs(processor, model))
    ids, mask = sample["input_ids"], sample["attention_mask"].bool()
    assert len(ids) == 3 and not mask[:, 0].all() and bool(mask[:, -1].all())
    images = ((ids == IMAGE) & mask).sum(-1)
    assert images[0] > images[1] > 0 == images[2]
    text = tiny_tokenizer().decode(ids[0][mask[0]])
    assert "Compare the two pictures" in text
    assert text.startswith("<|im_start|>user") == with_template

    logits = model(**sample).logits
    moved = model(**sample | {"pixel_values": -sample["pixel_values"]}).logits - logits
    assert (moved.abs().amax((1, 2)) > 1e-3).tolist() == [True, True, False]
    if family == "qwen3_vl":
        assert int((ids[2] == VIDEO).sum()) == 2 * 2 * 3  # frames, rows, columns
        assert sample["mm_token_type_ids"].unique().tolist() == [0, 1, 2]


def test_a_template_without_a_place_for_pictures_is_not_used(caplog: Any) -> None:
    model, processor = dense_model(vision_config("qwen3_vl")), tiny_processor("qwen3_vl")
    processor.chat_template = None
    expected = processed_inputs(processor, model)
    assert not caplog.text
    processor.chat_template = (
        "{% for m in messages %}{{ m['content'][-1]['text'] }}<|im_end|>{% endfor %}"
    )
    sample = processed_inputs(processor, model)
    assert sample.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in sample.items())
    assert "writes no <image> for a picture" in caplog.text


def test_images_that_follow_each_other_are_counted_apart(tmp_path: Path) -> None:
    """LLaVA's template writes nothing between them."""
    model, processor = dense_model(vision_config("llava", "qwen3")), tiny_processor("llava")
    target = NativeTarget.for_dense(model.config, Upcycling.of(4, 2))
    sample = target.sample(model, processor)
    text = tiny_tokenizer().decode(sample["input_ids"][0], skip_special_tokens=False)
    assert "<image>" * 8 in text, "two images of four tokens"
    assert target.sample_size(sample)["images"] == 3
    given = NativeTarget.for_dense(model.config, Upcycling.of(4, 2))
    assert given.sample_size(sample)["images"] == 2, "runs of tokens"


def test_a_language_model_reads_the_texts() -> None:
    model, tokenizer = dense_model(language_config("llama")), tiny_tokenizer()
    tokenizer.pad_token = None
    sample = processed_inputs(tokenizer, model)
    mask = sample["attention_mask"].bool()
    rows = [tokenizer.decode(i[m]) for i, m in zip(sample["input_ids"], mask, strict=True)]
    assert rows[2] == "Name the capital of France, and count from one to five."


def test_random_words_are_never_a_token_of_an_image() -> None:
    model = dense_model(vision_config("ovis2"))
    inputs = drawn_inputs(model, images=(1, 0), length=400)
    ids = inputs["input_ids"][inputs["attention_mask"].bool()]
    count = len(ids)
    assert int((ids == IMAGE).sum()) < count / 4
    assert not set(ids.tolist()) & set(model.config.visual_indicator_token_ids)


def test_a_processor_that_cannot_be_loaded_is_said(tmp_path: Path, caplog: Any) -> None:
    vision_config("qwen3_vl").save_pretrained(tmp_path)
    assert source_processor(str(tmp_path)) is None
    assert str(tmp_path) in caplog.text and "random pixels" in caplog.text
    tiny_tokenizer().save_pretrained(tmp_path / "text")
    assert source_processor(str(tmp_path / "text")) is not None

"""Chats whose cache is kept from turn to turn: the images come whole, new only, or not at all.

Rows are spelled as in conftest.py: "." is a text token, a letter an image.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, GenerationConfig

from vlmoe import VLMoEForConditionalGeneration

Inputs = dict[str, torch.Tensor]
Batch = Callable[..., Inputs]
Model = Callable[..., VLMoEForConditionalGeneration]

MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "modality experts": {"text": {"modality_experts": {"text": [0, 1], "image": [1, 2, 3]}}},
    "sliding": {"text": {"sliding_window": 5}},
}
TURNS = {"no new image": "....", "a new image": ".d..", "new images": "e.d.."}


def first_turn(
    model: VLMoEForConditionalGeneration, tiny_batch: Batch, rows: list[str]
) -> tuple[torch.Tensor, DynamicCache]:
    output = model.generate(
        **tiny_batch(model.config, rows),
        max_new_tokens=3,
        do_sample=False,
        suppress_tokens=[model.config.image_token_id],
        return_dict_in_generate=True,
    )
    return output.sequences, output.past_key_values


def second_turn(
    model: VLMoEForConditionalGeneration, inputs: Inputs, **options: Any
) -> torch.Tensor:
    suppressed = {"suppress_tokens": [model.config.image_token_id], "do_sample": False}
    return model.generate(**inputs, max_new_tokens=4, **suppressed | options)


def whole_chat(
    config: Any, tiny_batch: Batch, images: str, first: torch.Tensor, rows: list[str], turn: str
) -> Inputs:
    """The tokens of both turns, and the images of both."""
    question = tiny_batch(config, [turn] * len(rows), images="flat")
    both = tiny_batch(config, [row + turn for row in rows], images=images)
    ids = torch.cat([first, question["input_ids"]], 1)
    pixels = {name: both[name] for name in both if name.startswith(("pixel", "image"))}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | pixels


@pytest.mark.parametrize("chunk", [None, 3])
@pytest.mark.parametrize("images", ["padded", "flat", "indexed"])
@pytest.mark.parametrize("turn", TURNS)
@pytest.mark.parametrize("name", MODELS)
def test_a_kept_cache_takes_the_whole_chat_with_all_of_its_images(
    tiny_model: Model, tiny_batch: Batch, name: str, turn: str, images: str, chunk: int | None
) -> None:
    model = tiny_model(**MODELS[name])
    rows = ["..ab.", "c..b."]
    first, cache = first_turn(model, tiny_batch, rows)
    inputs = whole_chat(model.config, tiny_batch, images, first, rows, TURNS[turn])
    expected = second_turn(model, inputs)
    options = {"past_key_values": cache, "prefill_chunk_size": chunk}
    assert torch.equal(second_turn(model, inputs, **options), expected)


def test_a_kept_cache_takes_new_images_only_and_features_computed_before(
    tiny_model: Model, tiny_batch: Batch
) -> None:
    model = tiny_model()
    for given in ("new pixels", "all features", "new tokens"):
        first, cache = first_turn(model, tiny_batch, ["..ab."])
        inputs = whole_chat(model.config, tiny_batch, "flat", first, ["..ab."], ".d.")
        expected = second_turn(model, inputs)[:, -4:]
        pixels = inputs.pop("pixel_values")
        if given == "all features":
            features = model.get_image_features(pixels, return_dict=True)
            inputs["mm_encoder_outputs"] = {"image": features}
        else:
            inputs["pixel_values"] = pixels[-1:]
        if given == "new tokens":
            inputs["input_ids"] = inputs["input_ids"][:, cache.get_seq_length() :]
        assert torch.equal(second_turn(model, inputs, past_key_values=cache)[:, -4:], expected)


def test_images_that_are_not_those_of_the_chat_are_refused(
    tiny_model: Model, tiny_batch: Batch
) -> None:
    model = tiny_model()
    first, cache = first_turn(model, tiny_batch, ["..ab."])
    inputs = whole_chat(model.config, tiny_batch, "flat", first, ["..ab."], ".d.")
    inputs["pixel_values"] = inputs["pixel_values"][:2]
    with pytest.raises(ValueError, match=r"4 image tokens .* 8 features.*cache holds 13 tokens"):
        second_turn(model, inputs, past_key_values=cache)
    del inputs["pixel_values"]
    with pytest.raises(ValueError, match=r"4 image tokens .* 0 features"):
        second_turn(model, inputs, past_key_values=cache)


def test_forward_says_that_the_cache_holds_the_images(tiny_model: Model, tiny_batch: Batch) -> None:
    model = tiny_model()
    inputs = tiny_batch(model.config, ["..a.."], images="flat")
    cache = DynamicCache(config=model.config.text_config)
    model(**inputs, past_key_values=cache, use_cache=True)
    question = tiny_batch(model.config, ["..."])["input_ids"]
    with pytest.raises(ValueError, match=r"0 image tokens .* 4 features.*cache holds 8 tokens"):
        model(question, inputs["pixel_values"], past_key_values=cache)


def test_decoding_looks_for_image_tokens_in_the_prompt_only(
    tiny_model: Model, tiny_batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, looks = tiny_model(), []
    look = type(model.model).is_image_token
    monkeypatch.setattr(
        type(model.model),
        "is_image_token",
        lambda self, *args: looks.append(1) or look(self, *args),
    )
    model.generate(**tiny_batch(model.config, ["....."]), max_new_tokens=6, do_sample=False)
    assert len(looks) == 1


def test_an_image_token_is_never_generated(
    tiny_model: Model, tiny_batch: Batch, tmp_path: Path
) -> None:
    built = tiny_model()
    image = built.config.image_token_id
    built.save_pretrained(tmp_path)
    file = tmp_path / "generation_config.json"
    saved = json.loads(file.read_text())
    assert saved.pop("suppress_tokens") == [image]
    file.write_text(json.dumps(saved))  # as older versions wrote it
    older = VLMoEForConditionalGeneration.from_pretrained(tmp_path)
    file.unlink()
    without_file = VLMoEForConditionalGeneration.from_pretrained(tmp_path)
    settings = GenerationConfig(max_new_tokens=9)
    with_settings = type(built).from_pretrained(tmp_path, generation_config=settings)
    assert settings.suppress_tokens is None
    for model in (built, older, without_file, with_settings):
        with torch.no_grad():  # without suppression nothing else would be chosen
            model.lm_head.weight.zero_()
            model.lm_head.weight[image] = model.model(**tiny_batch(model.config, ["..."]))[0][0, -1]
        for options in ({}, {"generation_config": GenerationConfig(max_new_tokens=3)}):
            new = model.generate(**tiny_batch(model.config, ["..."]), **options, do_sample=False)
            assert new.shape[1] > 3 and image not in new


def test_what_a_user_suppresses_stays(tiny_model: Model, tmp_path: Path) -> None:
    model = tiny_model()
    model.generation_config.suppress_tokens = [7]
    model.save_pretrained(tmp_path)
    assert type(model).from_pretrained(tmp_path).generation_config.suppress_tokens == [7]

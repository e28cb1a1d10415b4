"""An upcycled model says what the dense one says, for every family and text backbone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CLIPConfig,
    CLIPModel,
)

from vlmoe import VLMoEForConditionalGeneration

IMAGE = 5
FAMILIES = ("llava", "llava_siglip", "internvl", "idefics3", "smolvlm")
BACKBONES = (
    *("llama", "llama3_rope_bias", "mistral", "qwen2", "qwen3", "smollm3", "granite", "phi3"),
)
Inputs = dict[str, torch.Tensor]


def batches(dense: Any, family: str) -> tuple[Inputs, Inputs]:
    """The same rows as the dense model and as ours takes them, padded on the left.

    Two images, one, and none; row 0 has a padding tile between its images, and of row 1's image the
    lower rows of patches are padding, where the family can leave them out.
    """
    size, patch = dense.config.vision_config.image_size, dense.config.vision_config.patch_size
    size, patch = (each if isinstance(each, int) else each[0] for each in (size, patch))
    tokens = {"llava": 16, "llava_siglip": 16}.get(family, 4)
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(3, 3, size, size, generator=generator)
    pixels, mask = torch.zeros(3, 3, 3, size, size), torch.zeros(3, 3, size, size).long()
    for image, (row, tile) in zip(images, [(0, 0), (0, 2), (1, 0)], strict=True):
        pixels[row, tile], mask[row, tile] = image, 1
    has_mask = family in ("idefics3", "smolvlm")
    if has_mask:
        pixels[1, 0, :, -patch:], mask[1, 0, -patch:] = 0, 0

    words = torch.randint(6, 99, (3, 9), generator=generator).tolist()
    span = [IMAGE] * tokens
    rows = [
        words[0][:2] + span + words[0][2:4] + span + words[0][4:],
        words[1][:1] + span + words[1][1:6],
        words[2],
    ]
    longest = max(map(len, rows))
    text = {
        "input_ids": torch.tensor([[6] * (longest - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor(
            [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
        ),
    }
    ours = text | {"pixel_values": pixels, "pixel_attention_mask": mask}
    return (ours if has_mask else text | {"pixel_values": images}), ours


def used_experts(router_logits: tuple[torch.Tensor, ...], real: torch.Tensor) -> list[int]:
    """How many experts the real tokens of each layer use."""
    return [
        len(logits[real.flatten()].topk(2, dim=-1).indices.unique()) for logits in router_logits
    ]


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_logits_and_greedy_answers_are_the_dense_models(
    family: str, backbone: str, dense_model: Callable[..., Any]
) -> None:
    dense = dense_model(family, backbone)
    model = VLMoEForConditionalGeneration.from_dense(dense, 4, 2, router_std=1.0)
    dense_inputs, inputs = batches(dense, family)
    real = inputs["attention_mask"].bool()

    theirs = dense(**dense_inputs).logits[real]
    outputs = model(**inputs, output_router_logits=True)
    assert error(outputs.logits[real], theirs) <= 1e-5
    assert min(used_experts(outputs.router_logits, real)) >= 2
    assert len(outputs.router_logits) == 3

    how: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 6}
    how["suppress_tokens"] = [model.config.image_token_id]  # as ours does by itself
    assert torch.equal(model.generate(**inputs, **how), dense.generate(**dense_inputs, **how))


@pytest.mark.parametrize("family", ["idefics3", "smolvlm"])
@torch.no_grad()
def test_a_partial_pixel_mask_shows_in_the_logits(
    family: str, dense_model: Callable[..., Any]
) -> None:
    model = VLMoEForConditionalGeneration.from_dense(dense_model(family), 4, 2)
    _, inputs = batches(model, "idefics3")
    whole = inputs | {"pixel_attention_mask": inputs["pixel_attention_mask"].clone()}
    whole["pixel_attention_mask"][1, 0] = 1
    masked, unmasked = model(**inputs).logits, model(**whole).logits
    assert torch.allclose(masked[0], unmasked[0], atol=1e-5)
    assert error(masked[1], unmasked[1]) > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_saved_and_loaded_model_says_the_same(
    family: str, dense_model: Callable[..., Any], tmp_path: Any
) -> None:
    dense = dense_model(family)
    model = VLMoEForConditionalGeneration.from_dense(dense, 4, 2, router_std=1.0)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    _, inputs = batches(dense, family)
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    assert (tmp_path / "upcycling_report.json").is_file()


@torch.no_grad()
def test_a_folder_and_a_loaded_model_give_the_same_weights(
    dense_model: Callable[..., Any], tmp_path: Any
) -> None:
    dense = dense_model("smolvlm", "qwen3")
    dense.generation_config.max_length = 77
    dense.save_pretrained(tmp_path)
    from_memory = VLMoEForConditionalGeneration.from_dense(dense, 4, 2)
    from_folder = VLMoEForConditionalGeneration.from_dense(tmp_path, 4, 2)
    weights = from_folder.state_dict()
    for name, tensor in from_memory.state_dict().items():
        assert torch.equal(tensor, weights[name]), name
    assert from_folder.generation_config.max_length == 77
    assert from_memory.upcycling_report.source == "SmolVLMForConditionalGeneration"
    assert from_folder.upcycling_report.source == str(tmp_path)


def test_the_dense_model_is_left_as_it_is(dense_model: Callable[..., Any]) -> None:
    dense = dense_model()
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    config = dense.config.to_dict()
    dense.train()
    generation = dense.generation_config.to_dict()
    model = VLMoEForConditionalGeneration.from_dense(dense, 4, 2, router_bias_update_rate=0.01)
    assert model.generation_config.suppress_tokens == [model.config.image_token_id]
    model.generation_config.max_length = 77
    assert dense.training and dense.config.to_dict() == config
    assert dense.generation_config.to_dict() == generation
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    for name, tensor in dense.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@torch.no_grad()
def test_a_dense_vlmoe_is_a_source_too(tiny_model: Callable[..., Any]) -> None:
    dense = tiny_model(text={"mlp_only_layers": [0, 1, 2], "qk_norm": True, "o_bias": True})
    model = VLMoEForConditionalGeneration.from_dense(dense, 4, 2, router_std=1.0)
    assert model.upcycling_report.error <= 1e-5
    kinds = {tensor["kind"] for tensor in model.upcycling_report.tensors}
    assert kinds == {"copied", "repeated", "new"}


@torch.no_grad()
def test_vision_tower_and_connector_get_experts_that_are_copies(
    dense_model: Callable[..., Any],
) -> None:
    dense = dense_model("llava_siglip")
    model = VLMoEForConditionalGeneration.from_dense(
        dense, 4, 2, router_std=1.0, vision_num_experts=3, projector_num_experts=5
    )
    dense_inputs, inputs = batches(dense, "llava_siglip")
    outputs = model(**inputs, output_router_logits=True)
    real = inputs["attention_mask"].bool()
    assert error(outputs.logits[real], dense(**dense_inputs).logits[real]) <= 1e-5
    assert [logits.shape[-1] for logits in outputs.vision_router_logits] == [3, 3, 5]


@torch.no_grad()
def test_the_vision_half_of_a_dual_encoder_is_taken_in_the_language_models_dtype(
    dense_parts: Callable[..., Any], vision_sizes: dict[str, Any], tmp_path: Any
) -> None:
    dual = CLIPModel(CLIPConfig(vision_config=vision_sizes, text_config={"num_hidden_layers": 1}))
    dual.save_pretrained(tmp_path / "dual")
    _, text = dense_parts()
    text.save_pretrained(tmp_path / "text")
    text = AutoModelForCausalLM.from_pretrained(tmp_path / "text", dtype=torch.bfloat16)
    model = VLMoEForConditionalGeneration.from_vision_text(tmp_path / "dual", text, 4, 2)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.upcycling_report.error <= 1e-5
    tower, taken = model.model.vision_tower.state_dict(), dual.vision_model.state_dict()
    assert tower.keys() == taken.keys()
    for name, tensor in tower.items():
        assert torch.equal(tensor, taken[name].bfloat16()), name


@pytest.mark.parametrize("backbone", BACKBONES)
@torch.no_grad()
def test_encoder_and_language_model_join_with_a_new_connector(
    backbone: str, dense_parts: Callable[..., Any]
) -> None:
    vision, text = dense_parts(backbone)
    model = VLMoEForConditionalGeneration.from_vision_text(
        *(vision, text, 4, 2),
        connector={"pixel_shuffle_factor": 2, "vision_feature_select_strategy": "default"},
        router_std=1.0,
    )
    vocabulary = text.config.vocab_size
    assert model.config.image_token_id == vocabulary
    assert model.config.text_config.vocab_size == vocabulary + 1
    assert model.generation_config.suppress_tokens == [vocabulary]
    for new, old in (
        (model.get_input_embeddings(), text.get_input_embeddings()),
        (model.lm_head, text.lm_head),
    ):
        torch.testing.assert_close(new.weight[-1], old.weight.mean(0))

    ids = torch.randint(0, vocabulary, (2, 11), generator=torch.Generator().manual_seed(1))
    ours, theirs = model(ids).logits[..., :vocabulary], text(ids).logits
    assert error(ours, theirs) <= 1e-5
    pixels = torch.randn(1, 3, 16, 16)
    features = model.model.vision_tower(pixels).last_hidden_state
    assert torch.equal(features, vision(pixels).last_hidden_state)
    how = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 6}
    assert torch.equal(model.generate(ids, **how), text.generate(ids, **how))

"""Towers of several families: which features are taken, what is frozen, that the rest trains."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel

from vlmoe import VLMoEForConditionalGeneration
from vlmoe.modeling_vlmoe import modeling_vlmoe, vision_tower
from vlmoe.modeling_vlmoe.vision_tower import unused_vision_parameters, vision_features

Inputs = dict[str, torch.Tensor]
Batch = Callable[..., Inputs]
Model = Callable[..., VLMoEForConditionalGeneration]

NO_CLASS_TOKEN = {"vision_feature_select_strategy": "default"}
LAYER = {"vision_use_last_hidden_state": False}
CLIP = {"vision": {"model_type": "clip_vision_model"}, **NO_CLASS_TOKEN}
DINOV2 = {"vision": {"model_type": "dinov2"}, **NO_CLASS_TOKEN}
EXPERTS = {"vision_num_experts": 5, "projector_num_experts": 3}
# config fields, and what the features do not pass through
TOWERS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "siglip": ({}, []),
    "siglip before its last norm": (LAYER, ["post_layernorm"]),
    "siglip with its head": ({"vision": {"vision_use_head": True}}, ["head"]),
    "clip": (CLIP, ["post_layernorm"]),
    "clip with class token": (
        {**CLIP, "vision_feature_select_strategy": "full"},
        ["post_layernorm"],
    ),
    "clip layer -2": (
        {**CLIP, **LAYER, "vision_feature_layer": [-2]},
        ["encoder.layers.1", "post_layernorm"],
    ),
    "clip layers -2 and -1": (
        {**CLIP, **LAYER, "vision_feature_layer": [-2, -1]},
        ["post_layernorm"],
    ),
    "clip layer 0": (
        {**CLIP, **LAYER, "vision_feature_layer": 0},
        ["encoder", "post_layernorm"],
    ),
    "dinov2": (DINOV2, ["embeddings.mask_token"]),
    "dinov2 layer -2": (
        {**DINOV2, **LAYER, "vision_feature_layer": -2},
        ["embeddings.mask_token", "encoder.layer.1", "layernorm"],
    ),
    "vit": ({**NO_CLASS_TOKEN, "vision": {"model_type": "vit"}}, ["pooler"]),
    "idefics3": ({"vision": {"model_type": "idefics3_vision"}}, []),
    "siglip with experts": (EXPERTS, []),
    "clip layer -2 with experts": (
        {**CLIP, **LAYER, **EXPERTS, "vision_feature_layer": -2},
        ["encoder.layers.1", "post_layernorm"],
    ),
}
towers = pytest.mark.parametrize(("fields", "unused"), TOWERS.values(), ids=TOWERS)
BATCHES = {
    "text": ["....", "..."],
    "image": ["a"],
    "image prompt": ["ab..."],
    "mixed": ["..a.", "...."],
}


def shuffle_where_square(fields: dict[str, Any]) -> dict[str, Any]:
    """A class token beside the patches leaves no square to shuffle."""
    keeps_class_token = fields.get("vision_feature_select_strategy") == "full"
    return {**fields, "pixel_shuffle_factor": 1} if keeps_class_token else fields


@pytest.fixture
def build(tiny_model: Model) -> Model:
    def make(fields: dict[str, Any]) -> VLMoEForConditionalGeneration:
        return tiny_model(**shuffle_where_square(fields))

    return make


def labels_of(inputs: Inputs) -> torch.Tensor:
    text = (inputs["attention_mask"] == 1) & (inputs["mm_token_type_ids"] == 0)
    return inputs["input_ids"].masked_fill(~text, -100)


@towers
def test_features_are_those_of_the_library_tower(
    build: Model, fields: dict[str, Any], unused: list[str]
) -> None:
    model = build(fields)
    config, tower = model.config, model.model.vision_tower
    size = config.vision_config.image_size
    pixels = torch.randn(2, 3, size, size)
    with torch.no_grad():
        outputs = tower(pixels, output_hidden_states=True)
        chosen = fields.get("vision_feature_layer", -1)
        states = [
            outputs.hidden_states[i] for i in (chosen if isinstance(chosen, list) else [chosen])
        ]
        if fields.get("vision_use_last_hidden_state", True):
            states = [outputs.last_hidden_state]
        expected = torch.cat(states, dim=-1)
        if fields.get("vision_feature_select_strategy") == "default":
            expected = expected[:, 1:]
        torch.testing.assert_close(vision_features(tower, pixels, config)[0], expected)


@towers
def test_exactly_what_the_features_do_not_pass_through_is_frozen(
    build: Model, tiny_batch: Batch, fields: dict[str, Any], unused: list[str]
) -> None:
    model = build(fields)
    tower = model.model.vision_tower
    frozen = {name for name, p in tower.named_parameters() if not p.requires_grad}
    assert frozen == {
        name
        for name, _ in tower.named_parameters()
        if any(name == module or name.startswith(f"{module}.") for module in unused)
    }
    inputs = tiny_batch(model.config, ["..ab."])
    model.requires_grad_(True).train()
    model(**inputs, labels=labels_of(inputs)).loss.backward()
    assert {name for name, p in tower.named_parameters() if p.grad is None} == frozen


@towers
def test_one_log_line_names_what_is_frozen(
    build: Model, caplog: pytest.LogCaptureFixture, fields: dict[str, Any], unused: list[str]
) -> None:
    modeling_vlmoe.logger.warning_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        build(fields)
        build(fields)  # as an upcycling does: nothing new to say
    lines = [record.message for record in caplog.records if "Frozen" in record.message]
    assert len(lines) == bool(unused)
    for line in lines:
        assert line.endswith(": " + ", ".join(unused))


@pytest.mark.parametrize("rows", BATCHES)
@towers
def test_every_trainable_parameter_gets_a_gradient_from_any_batch(
    build: Model, tiny_batch: Batch, fields: dict[str, Any], unused: list[str], rows: str
) -> None:
    model = build(fields).train()
    inputs = tiny_batch(model.config, BATCHES[rows])
    loss = model(**inputs, labels=labels_of(inputs)).loss
    loss.backward()
    assert loss.isfinite()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        assert parameter.grad is None or parameter.grad.isfinite().all(), name


@towers
def test_a_text_batch_gives_the_vision_part_zero_gradients_and_keeps_its_loss(
    build: Model, tiny_batch: Batch, fields: dict[str, Any], unused: list[str]
) -> None:
    model = build(fields)
    sliced = {name: value[1:] for name, value in tiny_batch(model.config, ["..a.", "...."]).items()}
    for inputs in (tiny_batch(model.config, ["....", "..."]), sliced):
        labels = labels_of(inputs)
        expected = model.eval()(**inputs, labels=labels).loss
        model.zero_grad()
        loss = model.train()(**inputs, labels=labels).loss
        loss.backward()
        assert torch.equal(loss, expected)
        vision = (model.model.vision_tower, model.model.multi_modal_projector)
        gradients = [p.grad for part in vision for p in part.parameters() if p.requires_grad]
        assert all(torch.count_nonzero(gradient) == 0 for gradient in gradients)
        assert model.lm_head.weight.grad.abs().max() > 0


def test_what_is_frozen_stays_frozen_after_saving_and_loading(build: Model, tmp_path: Path) -> None:
    model = build(TOWERS["clip layer -2"][0])
    model.save_pretrained(tmp_path)
    loaded = VLMoEForConditionalGeneration.from_pretrained(tmp_path)
    expected = {name: p.requires_grad for name, p in model.named_parameters()}
    assert {name: p.requires_grad for name, p in loaded.named_parameters()} == expected
    assert not all(expected.values())


def test_a_tower_keeps_its_own_initialisation(build: Model) -> None:
    """As large as in the tower built by itself: our initialiser touches only our modules."""
    model = build(TOWERS["siglip"][0])
    torch.manual_seed(1)
    alone = AutoModel.from_config(model.config.vision_config)
    for (name, ours), theirs in zip(
        model.model.vision_tower.named_parameters(), alone.parameters(), strict=True
    ):
        assert ours.std().item() == pytest.approx(theirs.std().item(), rel=0.5, abs=1e-6), name


def test_a_tower_that_needs_more_than_pixels_is_refused_by_name(
    tiny_config,
):
    config = tiny_config(vision={"model_type": "siglip2_vision_model", "num_patches": 16})
    config.vision_config.image_size = 16
    with pytest.raises(ValueError, match="'siglip2_vision_model', whose tower needs more than"):
        VLMoEForConditionalGeneration(config)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_unused_parameters_are_found_without_gradients_too(
    mode: Callable[[], Any], tiny_config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vision_tower, "_unused_parameters", {})
    with mode():
        assert unused_vision_parameters(tiny_config()) == []


def test_unused_parameters_are_searched_once_for_each_configuration(
    tiny_config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    make = vision_tower.make_vision_tower
    monkeypatch.setattr(vision_tower, "_unused_parameters", {})
    monkeypatch.setattr(vision_tower, "make_vision_tower", lambda c: made.append(1) or make(c))
    last, before = tiny_config(), tiny_config(**LAYER)
    first, second = (unused_vision_parameters(last) for _ in range(2))
    first.append("the caller's own list")
    assert second == [] == unused_vision_parameters(tiny_config()) and made == [1]
    assert unused_vision_parameters(before) and made == [1, 1]
    before.vision_feature_layer = 0
    assert len(unused_vision_parameters(before)) > 2 and made == [1, 1, 1]

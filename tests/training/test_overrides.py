"""Fields of `model_overrides`: known at any depth, for presets and saved models, or named."""

from pathlib import Path
from typing import Any

import pytest

from vlmoe.training.build import ModelAndProcessor, build_model

TEXTS = ["is it red? yes", "no"] * 3
UNKNOWN = [
    ({"num_layers": 5}, "'num_layers'"),
    ({"text_config": {"num_expert": 2}}, "'text_config.num_expert' (did you mean 'num_experts"),
    (
        {"vision_config": {"num_layers": 5}},
        "'vision_config.num_layers' (did you mean 'num_hidden_layers",
    ),
    (
        {"vision_config": {"model_type": "clip_vision_model", "vision_use_hed": False}},
        "'vision_config.vision_use_hed'",
    ),
    (
        {"text_config": {"rope_parameters": {"rope_type": "default", "rope_teta": 5.0}}},
        "'text_config.rope_parameters.rope_teta' (did you mean 'rope_theta",
    ),
    ({"to_dict": 1}, "'to_dict'"),
]
UNFIT: list[Any] = [
    {"text_config": {"num_experts": "four"}},
    {"text_config": 5},
    {"vision_config": {"hidden_size": -1}},
    {"vision_config": {"hidden_act": "sigmoidish"}},
    {"text_config": {"hidden_act": 5}},
    {"vision_config": {"model_type": "no such tower"}},
]


def build(model: str, overrides: Any) -> ModelAndProcessor:
    return build_model(model, TEXTS, model_overrides=overrides)


@pytest.fixture(params=["preset", "saved"])
def model(request: pytest.FixtureRequest, saved_model: Path) -> str:
    return "tiny" if request.param == "preset" else str(saved_model)


@pytest.mark.parametrize(("overrides", "named"), UNKNOWN)
def test_an_unknown_field_is_named_with_those_that_are_close(
    model: str, overrides: Any, named: str
) -> None:
    with pytest.raises(ValueError) as caught:
        build(model, overrides)
    assert str(caught.value).startswith(f"`model_overrides`: the config has no field {named}")


@pytest.mark.parametrize("overrides", UNFIT)
def test_a_value_that_fits_no_model_is_the_options_fault(model: str, overrides: Any) -> None:
    with pytest.raises(ValueError) as caught:
        build(model, overrides)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(("`model_overrides`: ", f"The weights of {model}: "))


def test_fields_of_every_depth_reach_the_model(saved_model: Path) -> None:
    overrides = {
        "text_config": {"router_aux_loss_coef": 0.5, "rope_parameters": {"rope_theta": 77.0}},
        "vision_config": {"attention_dropout": 0.25},
    }
    config = build(str(saved_model), overrides).model.config
    assert config.text_config.router_aux_loss_coef == 0.5
    assert config.vision_config.attention_dropout == 0.25
    assert config.text_config.rope_parameters["rope_theta"] == 77.0

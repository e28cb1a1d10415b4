"""Configs build, survive saving, and refuse what cannot work, naming field and value."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import (
    AutoConfig,
    CLIPVisionConfig,
    LlamaConfig,
    PreTrainedConfig,
    SiglipConfig,
)

from vlmoe import VLMoEConfig, VLMoETextConfig
from vlmoe.configuration.configuration_vlmoe import PRESETS

PRESET_NAMES = sorted(path.stem for path in PRESETS.glob("*.json"))
HIDDEN_STATES = {"vision_use_last_hidden_state": False}

# (field, value) or (field, value, other fields); the tiny decoder has 3 layers, 4 heads, 4 experts
BAD_TEXT: list[tuple[Any, ...]] = [
    ("num_experts_per_tok", 5),
    ("num_experts_per_tok", 0),
    ("num_experts", 0),
    ("moe_intermediate_size", 0),
    ("num_shared_experts", -1),
    ("decoder_sparse_step", 0),
    ("mlp_only_layers", [3]),
    ("mlp_only_layers", [-1]),
    ("scoring_func", "tanh"),
    ("routed_scaling_factor", 0.0),
    ("router_aux_loss_coef", -0.1),
    ("router_aux_loss_coef", float("nan")),
    ("router_z_loss_coef", -1),
    ("router_bias_update_rate", -0.1),
    ("router_aux_loss_scope", "rank"),
    ("shared_expert_gate", True),
    ("n_group", 0),
    ("n_group", 3),
    ("n_group", 2, {"modality_experts": {"text": [0, 1], "image": [2, 3]}}),
    ("topk_group", 0, {"n_group": 2}),
    ("topk_group", 3, {"n_group": 2}),
    ("topk_group", 1, {"n_group": 4}),
    ("modality_experts", {"text": [0, 1]}),
    ("modality_experts", {"text": [0, 1], "image": [2]}),
    ("modality_experts", {"text": [0, 1], "image": [2, 2]}),
    ("modality_experts", {"text": [0, 1], "image": [2, 4]}),
    ("modality_experts", {"text": [0, 1], "image": [2, 3], "video": [0, 1]}),
    ("router_local_entropy_coef", {"text": -0.1}),
    ("router_global_entropy_coef", {"sound": 0.1}),
    ("router_global_entropy_experts", {"image": 5}),
    ("router_global_entropy_experts", {"image": 0}),
    (
        "router_global_entropy_experts",
        {"image": 3},
        {"modality_experts": {"text": [0, 1], "image": [2, 3]}},
    ),
    ("vocab_size", 0),
    ("num_hidden_layers", 0),
    ("num_attention_heads", 0),
    ("num_attention_heads", 5),
    ("num_key_value_heads", 3),
    ("num_key_value_heads", 0),
    ("head_dim", 0),
    ("head_dim", 7),
    ("hidden_act", "swoosh"),
    ("max_position_embeddings", 0),
    ("attention_dropout", 1.5),
    ("initializer_range", -0.1),
    ("rms_norm_eps", -1e-6),
    ("logits_scaling", 0),
    ("layer_types", ["full_attention"] * 2),
    ("layer_types", ["full_attention", "chunked_attention", "full_attention"]),
    ("sliding_window", 0),
    ("sliding_window", None, {"layer_types": ["sliding_attention"] * 3}),
    ("no_rope_layers", [1, 0]),
    ("no_rope_layers", [1, 0, 2]),
]
# the tiny model has 99 tokens and 2 vision layers
BAD_TOP: list[tuple[Any, ...]] = [
    ("image_token_id", 99),
    ("image_token_id", -1),
    ("vision_feature_layer", 3, HIDDEN_STATES),
    ("vision_feature_layer", -4, HIDDEN_STATES),
    ("vision_feature_layer", [-1, 3], HIDDEN_STATES),
    ("vision_feature_layer", [], HIDDEN_STATES),
    ("vision_feature_layer", -2, {"vision_use_last_hidden_state": True}),
    ("vision_feature_select_strategy", "patches"),
    ("pixel_shuffle_factor", 0),
    ("projector_num_layers", 3),
    ("projector_hidden_act", "swoosh"),
]


def same(first: PreTrainedConfig, second: PreTrainedConfig) -> bool:
    """Whether two configs hold the same, sub-configs included, wherever they were loaded from."""
    nowhere = {"_name_or_path": ""}
    return first.to_dict() | nowhere == second.to_dict() | nowhere and type(first) is type(second)


def test_configs_build_without_arguments() -> None:
    config = VLMoEConfig()
    assert isinstance(config.text_config, VLMoETextConfig)
    assert config.vision_config.model_type == "siglip_vision_model"
    assert config.vision_config.vision_use_head is False
    text = VLMoETextConfig()
    assert text.head_dim == text.hidden_size // text.num_attention_heads
    assert text.num_key_value_heads == text.num_attention_heads
    assert text.moe_intermediate_size == text.intermediate_size
    assert text.layer_types == ["full_attention"] * text.num_hidden_layers
    assert text.no_rope_layers == [1] * text.num_hidden_layers


def test_a_sliding_window_alone_makes_all_layers_slide() -> None:
    assert set(VLMoETextConfig(sliding_window=5).layer_types) == {"sliding_attention"}


def test_tied_embeddings_of_the_text_config_tie_the_model(
    tiny_config: Callable[..., VLMoEConfig],
) -> None:
    assert tiny_config(text={"tie_word_embeddings": True}).tie_word_embeddings
    assert not tiny_config().tie_word_embeddings


@pytest.mark.parametrize(
    ("fields", "sparse"),
    [
        ({}, [0, 1, 2]),
        ({"decoder_sparse_step": 2}, [1]),
        ({"mlp_only_layers": [0, 2]}, [1]),
        ({"decoder_sparse_step": 3, "mlp_only_layers": [2]}, []),
    ],
)
def test_sparse_layers_are_those_of_the_step_less_the_dense_ones(
    fields: dict[str, Any], sparse: list[int], tiny_config: Callable[..., VLMoEConfig]
) -> None:
    text = tiny_config(text=fields).text_config
    assert [i for i in range(3) if text.is_sparse_layer(i)] == sparse


@pytest.mark.parametrize("vision", [{}, {"model_type": "clip_vision_model"}])
def test_config_survives_dict_json_and_disk(
    vision: dict[str, Any], tmp_path: Path, tiny_config: Callable[..., VLMoEConfig]
) -> None:
    text = {"num_experts": 6, "mlp_only_layers": [1], "sliding_window": 4, "qk_norm": True}
    top = HIDDEN_STATES | {"vision_feature_layer": [-2, -1], "projector_num_layers": 1}
    config = tiny_config(text=text, vision=vision, **top)
    assert config.vision_config.model_type == vision.get("model_type", "siglip_vision_model")
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["text_config"]["num_experts"] == 6
    assert saved["text_config"]["mlp_only_layers"] == [1]
    for copy in (
        VLMoEConfig.from_dict(config.to_dict()),
        VLMoEConfig.from_dict(json.loads(config.to_json_string(use_diff=False))),
        VLMoEConfig.from_pretrained(tmp_path),
        AutoConfig.from_pretrained(tmp_path),
    ):
        assert same(copy, config)


def test_text_config_is_found_by_auto_config(tmp_path: Path) -> None:
    text = VLMoETextConfig(num_experts=6, hidden_size=48, num_attention_heads=4)
    text.save_pretrained(tmp_path)
    assert same(AutoConfig.from_pretrained(tmp_path), text)


def test_sub_configs_may_be_objects_or_dicts(tiny_config: Callable[..., VLMoEConfig]) -> None:
    config = tiny_config()
    text, vision = config.text_config, config.vision_config
    rest = {"image_token_id": 5, "pixel_shuffle_factor": 2}
    assert same(VLMoEConfig(text_config=text, vision_config=vision, **rest), config)
    dicts = {"text_config": text.to_dict(), "vision_config": vision.to_dict()}
    assert same(VLMoEConfig(**dicts, **rest), config)
    clip = VLMoEConfig(vision_config=CLIPVisionConfig(num_hidden_layers=2), text_config=text)
    assert type(clip.vision_config) is CLIPVisionConfig


@pytest.mark.parametrize(
    ("field", "value", "others"), [(*case, {})[:3] for case in BAD_TEXT], ids=lambda v: str(v)[:25]
)
def test_a_bad_text_value_is_refused_by_name(
    field: str, value: Any, others: dict[str, Any], tiny_config: Callable[..., VLMoEConfig]
) -> None:
    with pytest.raises(ValueError, match="; allowed: ") as refusal:
        tiny_config(text=others | {field: value})
    assert f"`{field}` is {value!r}" in str(refusal.value)


@pytest.mark.parametrize(
    ("field", "value", "others"), [(*case, {})[:3] for case in BAD_TOP], ids=lambda v: str(v)[:25]
)
def test_a_bad_top_level_value_is_refused_by_name(
    field: str, value: Any, others: dict[str, Any], tiny_config: Callable[..., VLMoEConfig]
) -> None:
    with pytest.raises(ValueError, match="; allowed: ") as refusal:
        tiny_config(**others | {field: value})
    assert f"`{field}` is {value!r}" in str(refusal.value)


@pytest.mark.parametrize(
    ("field", "sub_config"),
    [("text_config", LlamaConfig()), ("vision_config", SiglipConfig())],
    ids=["text_config", "vision_config"],
)
def test_a_sub_config_of_the_wrong_kind_is_refused(field: str, sub_config: Any) -> None:
    with pytest.raises(ValueError, match=f"`{field}` is a {type(sub_config).__name__}; allowed: "):
        VLMoEConfig(**{field: sub_config})


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_experts", "8"), ("num_experts", 8.0), ("norm_topk_prob", "yes"), ("mlp_only_layers", 1)],
)
def test_a_value_of_the_wrong_type_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=field) as refusal:
        VLMoETextConfig(**{field: value})
    assert str(value) in str(refusal.value)


@pytest.mark.parametrize("value", [1, 1.0])
@pytest.mark.parametrize(
    "field",
    [
        *("initializer_range", "rms_norm_eps", "attention_dropout"),
        *("router_aux_loss_coef", "router_z_loss_coef", "routed_scaling_factor"),
        *("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling"),
    ],
)
def test_number_fields_take_int_and_float(field: str, value: float) -> None:
    assert getattr(VLMoETextConfig(**{field: value}), field) == 1


@pytest.mark.parametrize("name", PRESET_NAMES)
def test_a_preset_holds_what_its_file_says(name: str) -> None:
    config = VLMoEConfig.from_preset(name)
    said = json.loads((PRESETS / f"{name}.json").read_text())
    for part in ("text_config", "vision_config"):
        held = getattr(config, part).to_dict()
        sub_config = said.pop(part)
        assert {field: held[field] for field in sub_config} == sub_config
    assert {field: getattr(config, field) for field in said} == said
    assert VLMoEConfig.from_preset(name, image_token_id=7).image_token_id == 7


def test_an_unknown_preset_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="'huge'.*allowed: " + ", ".join(PRESET_NAMES)):
        VLMoEConfig.from_preset("huge")


ONE = {"num_experts_per_tok": 1}
ONE_EVERYWHERE = {
    "vision_num_experts": 4,
    "vision_num_experts_per_tok": 1,
    "projector_num_experts": 4,
    "projector_num_experts_per_tok": 1,
}


def normalizes(config: VLMoEConfig) -> tuple[bool | None, ...]:
    """The fields of decoder, tower and connector."""
    vision = config.vision_norm_topk_prob, config.projector_norm_topk_prob
    return config.text_config.norm_topk_prob, *vision


def test_a_new_config_normalizes_the_weights_of_two_experts_or_more(
    tiny_config: Callable[..., VLMoEConfig],
) -> None:
    assert normalizes(tiny_config()) == (True, True, True)
    assert normalizes(tiny_config(text=ONE, **ONE_EVERYWHERE)) == (False, False, False)
    given = {"vision_norm_topk_prob": True, "projector_norm_topk_prob": True}
    text = ONE | {"norm_topk_prob": True}
    assert normalizes(tiny_config(text=text, **ONE_EVERYWHERE, **given)) == (True, True, True)


def test_a_saved_config_keeps_its_normalization_and_one_without_the_field_normalizes(
    tmp_path: Path, tiny_config: Callable[..., VLMoEConfig]
) -> None:
    for kept in (True, False):
        fields = {"vision_norm_topk_prob": kept, "projector_norm_topk_prob": kept}
        text = ONE | {"norm_topk_prob": kept}
        tiny_config(text=text, **ONE_EVERYWHERE, **fields).save_pretrained(tmp_path)
        read = VLMoEConfig.from_pretrained(tmp_path)
        assert normalizes(read) == normalizes(AutoConfig.from_pretrained(tmp_path)) == (kept,) * 3
    other_k = VLMoEConfig.from_pretrained(tmp_path, num_experts_per_tok=2)
    assert other_k.text_config.norm_topk_prob is False

    path = tmp_path / "config.json"
    older = json.loads(path.read_text())
    del older["vision_norm_topk_prob"], older["projector_norm_topk_prob"]
    del older["text_config"]["norm_topk_prob"]
    path.write_text(json.dumps(older))
    for read in (VLMoEConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert read.text_config.num_experts_per_tok == 1 and normalizes(read) == (True,) * 3
    assert VLMoETextConfig.from_pretrained(tmp_path).norm_topk_prob is True
    chosen = VLMoEConfig.from_pretrained(tmp_path, norm_topk_prob=False)
    assert chosen.text_config.norm_topk_prob is False

"""Misspelled fields, other families' names, wrong types and sizes are refused by name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, GenerationConfig

from vlmoe import VLMoEConfig, VLMoEForConditionalGeneration, VLMoETextConfig
from vlmoe.configuration.field_names import ALIASES

TYPOS = {
    "num_expert_per_tok": "num_experts_per_tok",
    "num_experts_per_toks": "num_experts_per_tok",
    "n_groups": "n_group",
    "router_aux_loss_coeff": "router_aux_loss_coef",
    "moe_intermediat_size": "moe_intermediate_size",
    "modality_expert": "modality_experts",
}
TOP_TYPOS = {
    "image_tokn_id": "image_token_id",
    "vision_feature_layers_": "vision_feature_layer",
    "vision_num_expert": "vision_num_experts",
    "text_confg": "text_config",
}
# What transformers, its Trainer and other versions of it write, and what nobody has heard of.
FOREIGN: dict[str, Any] = {
    "architectures": ["A"],
    "auto_map": {},
    "chunk_size_feed_forward": 0,
    "dtype": "float32",
    "torch_dtype": "float32",
    "_name_or_path": "a",
    "_attn_implementation_autoset": True,
    "transformers_version": "4.0",
    "quantization_config": None,
    "use_cache": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "sep_token_id": 3,
    "vocab_size": 9,
    "num_labels": 2,
    "id2label": {0: "a"},
    "tie_encoder_decoder": False,
    "is_decoder": True,
    "pretraining_tp": 1,
    "my_own_note": "x",
    "gradient_checkpointing": False,
}


@pytest.mark.parametrize(("typo", "meant"), TYPOS.items())
def test_a_misspelled_field_of_the_text_config_names_the_field(typo: str, meant: str) -> None:
    message = f"There is no field `{typo}`; it is called `{meant}`"
    for make in (
        lambda: VLMoETextConfig(**{typo: 1}),
        lambda: setattr(VLMoETextConfig(), typo, 1),
        lambda: VLMoEConfig(text_config={typo: 1}),
        lambda: VLMoEConfig(**{typo: 1}),
        lambda: setattr(VLMoEConfig(), typo, 1),
    ):
        with pytest.raises(ValueError, match=message):
            make()


@pytest.mark.parametrize(("typo", "meant"), TOP_TYPOS.items())
def test_a_misspelled_field_of_the_whole_config_names_the_field(typo: str, meant: str) -> None:
    with pytest.raises(ValueError, match=f"no field `{typo}`; it is called `{meant}`"):
        VLMoEConfig(**{typo: 1})


@pytest.mark.parametrize(("alias", "meant"), ALIASES.items())
def test_another_familys_name_names_ours(alias: str, meant: str) -> None:
    with pytest.raises(ValueError, match=f"no field `{alias}`; it is called `{meant}`"):
        VLMoEConfig(**{alias: 1})


def test_num_local_experts_is_num_experts() -> None:
    """As in transformers, where it is the name that serving engines read."""
    config = VLMoETextConfig(num_local_experts=4)
    assert config.num_experts == config.num_local_experts == 4
    with pytest.raises(ValueError, match="`num_experts` is 'four'"):
        config.num_local_experts = "four"


@pytest.mark.parametrize("field", ["num_experts", "num_experts_per_tok", "router_z_loss_coef"])
def test_a_field_of_the_text_config_set_too_high_is_refused(field: str) -> None:
    message = f"`{field}` is a field of the text config: set it in `text_config`"
    with pytest.raises(ValueError, match=message):
        VLMoEConfig(**{field: 1})
    with pytest.raises(ValueError, match=message):
        setattr(VLMoEConfig(), field, 1)


@pytest.mark.parametrize("config_class", [VLMoEConfig, VLMoETextConfig])
def test_fields_that_libraries_write_stay_allowed(
    config_class: type[VLMoEConfig], tmp_path: Path
) -> None:
    generation = GenerationConfig._get_default_generation_params()
    del generation["top_k"]  # of sampling; in a config of experts it is taken for their k
    config = config_class(**generation | FOREIGN)
    assert config.my_own_note == "x"
    config.a_note_of_mine = 3
    config.save_pretrained(tmp_path)
    assert config_class.from_pretrained(tmp_path).a_note_of_mine == 3


def test_a_typo_in_a_file_or_a_keyword_of_from_pretrained_is_refused(
    tiny_config: Callable[..., VLMoEConfig], tmp_path: Path
) -> None:
    tiny_config().save_pretrained(tmp_path)
    for load in (AutoConfig, VLMoEConfig, VLMoEForConditionalGeneration):
        with pytest.raises(ValueError, match="it is called `num_experts_per_tok`"):
            load.from_pretrained(tmp_path, num_expert_per_tok=1)
    file = tmp_path / "config.json"
    fields = json.loads(file.read_text())
    fields["text_config"]["num_expert_per_tok"] = 1
    file.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="it is called `num_experts_per_tok`"):
        AutoConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("hidden_size", -1), ("patch_size", 0), ("image_size", 0), ("num_channels", 0)),
        *(("image_size", [16, 0]), ("num_attention_heads", 5), ("num_hidden_layers", 0)),
        ("intermediate_size", 0),
    ],
)
def test_sizes_of_the_tower_are_refused_in_the_config(
    tiny_config: Callable[..., VLMoEConfig], field: str, value: Any
) -> None:
    with pytest.raises(ValueError, match=rf"vision_config.*{field}"):
        tiny_config(vision={field: value})


@pytest.mark.parametrize("vision", [{"hidden_size": "wide"}, [1], "siglip", {"model_type": "none"}])
def test_a_vision_config_that_cannot_be_read_is_a_value_error(vision: Any) -> None:
    with pytest.raises(ValueError, match=r"vision_config|subconfig: none"):
        VLMoEConfig(vision_config=vision)


def test_a_value_that_went_wrong_later_is_refused_when_saved(tmp_path: Path) -> None:
    config = VLMoETextConfig()
    config.topk_group = 7
    with pytest.raises(ValueError, match="`topk_group` is 7; allowed: 1 to"):
        config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"`num_experts` is '8' \(str\); allowed: int"):
        config.num_experts = "8"

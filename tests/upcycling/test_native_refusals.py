"""What has no exact native version is refused, with the reason, before anything is converted."""

from pathlib import Path
from typing import Any

import pytest
import torch
from native_dense import dense_model, language_config, vision_config
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from vlmoe.upcycling.conversion import native_model
from vlmoe.upcycling.native_config import native_config
from vlmoe.upcycling.native_pairs import REFUSED, TEXT_PAIRS, Pair
from vlmoe.upcycling.native_plan import NativePlan
from vlmoe.upcycling.options import Upcycling

COPIES = Upcycling(4, 2)
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "attention_bias": False,
    "pad_token_id": 0,
}


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("glm4v", "norms after attention and MLP"),
        ("exaone4", "no norm before attention and MLP"),
        ("olmo", "normalizes queries and keys"),
        ("phimoe", "experts already"),
        ("qwen2_5_vl", "M-RoPE.* biases on q, k, v"),
        ("gemma3", "no sparse class of its family"),
        ("paligemma", "no sparse class of its family"),
        ("mixtral", "experts already"),
        ("qwen3_vl_moe", "experts already"),
        ("gpt2", "no exact conversion is known"),
    ],
)
def test_other_models_are_refused_by_name(model_type: str, reason: str) -> None:
    message = f"'{model_type}' cannot be upcycled into a native sparse class: .*{reason}.*Allowed: "
    with pytest.raises(ValueError, match=message):
        native_config(AutoConfig.for_model(model_type), COPIES)


def test_every_refused_type_is_one_of_transformers() -> None:
    for model_type in REFUSED:
        assert AutoConfig.for_model(model_type).model_type == model_type
        with pytest.raises(ValueError):
            native_config(AutoConfig.for_model(model_type), COPIES)


@pytest.mark.parametrize(
    ("dense", "sparse", "tensor"),
    [
        ("glm4", "glm4_moe", r"post_self_attn_layernorm\.weight"),
        ("exaone4", "exaone_moe", r"input_layernorm\.weight"),
        ("olmo", "olmoe", r"(norm|layernorm)\.weight"),
        ("phi3", "phimoe", r"bias"),
    ],
)
def test_the_plan_finds_what_a_sparse_class_lacks_by_itself(
    dense: str, sparse: str, tensor: str
) -> None:
    """Without an entry in the table of refusals."""

    def tensors(kind: str) -> dict[str, torch.Tensor]:
        known = CONFIG_MAPPING[kind]().to_dict()
        moe = {"moe_intermediate_size": 48, "first_k_dense_replace": 0, "n_shared_experts": 1}
        given = {name: value for name, value in (SIZES | moe).items() if name in known}
        config = CONFIG_MAPPING[kind](**given, head_dim=8)
        with torch.device("meta"):
            return dict(AutoModelForCausalLM.from_config(config).state_dict())

    plan = NativePlan(tensors(dense), Pair(sparse), COPIES, 0.02, torch.float32)
    with pytest.raises(ValueError, match=tensor):
        plan.of(tensors(sparse))


def changed(config: PreTrainedConfig, **fields: Any) -> PreTrainedConfig:
    for name, value in fields.items():
        setattr(config, name, value)
    return config


ROPE = {"rope_type": "default", "rope_theta": 10000.0}
SCALED = ROPE | {"llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("kind", "fields", "reason"),
    [
        ("smollm3", {"no_rope_layers": [1, 1, 0]}, r"`no_rope_layers` is \[1, 1, 0\]"),
        ("llama", {"attention_bias": True}, "`attention_bias` is True"),
        ("llama", {"mlp_bias": True}, "`mlp_bias` is True"),
        (
            "ministral",
            {"layer_types": ["full_attention", "full_attention", "sliding_attention"]},
            "`layer_types` is",
        ),
        ("phi3", {"rope_parameters": ROPE | {"partial_rotary_factor": 0.5}}, "a part of each head"),
        ("phi3", {"rope_parameters": ROPE | {"rope_type": "longrope"}}, "longrope"),
        ("ministral3", {"rope_parameters": SCALED}, "beyond position 64.*llama_4_scaling_beta"),
        ("llama", {"rope_parameters": ROPE | {"alpha": 3.0}}, "have alpha"),
        ("gemma4_text", {"enable_moe_block": True}, "experts already"),
    ],
)
def test_a_field_that_the_sparse_class_lacks_is_refused_unless_it_is_neutral(
    kind: str, fields: dict[str, Any], reason: str
) -> None:
    config = changed(language_config(kind), **fields)
    with pytest.raises(ValueError, match=f"'{kind}' cannot be upcycled.*{reason}"):
        native_config(config, COPIES)


def test_a_bias_that_the_sparse_class_knows_but_places_elsewhere_is_found_by_the_plan() -> None:
    """Llama's `attention_bias` is on the output projection, too, GLM's is not."""
    dense = dense_model(language_config("llama", attention_bias=True))
    with pytest.raises(ValueError, match=r"o_proj\.bias.*cannot hold"):
        native_model(dense, 4, 2, sparse_type="glm4_moe")


@pytest.mark.parametrize(
    ("fields", "lost"),
    [
        ({}, {"pretraining_tp": 1, "attention_bias": False, "mlp_bias": False}),
        ({"pretraining_tp": 2}, {"pretraining_tp": 2, "attention_bias": False, "mlp_bias": False}),
    ],
)
def test_fields_without_effect_are_named_as_lost(
    fields: dict[str, Any], lost: dict[str, Any]
) -> None:
    dense = dense_model(language_config("llama", **fields))
    assert native_model(dense, 4, 2).report.lost_fields == lost


def test_what_every_config_may_carry_is_carried() -> None:
    dense = language_config("qwen3", rope_parameters=ROPE | {"rope_theta": 777.0})
    dense.my_own_field = {"of": "a reader"}
    config = native_config(dense, Upcycling.of(4, 2, router_aux_loss_coef=0.5)).config
    assert config.rope_parameters["rope_theta"] == 777.0 and config.head_dim == dense.head_dim
    assert config.my_own_field == {"of": "a reader"} and config.router_aux_loss_coef == 0.5
    assert config.norm_topk_prob and config.num_local_experts == 4
    assert (config.bos_token_id, config.eos_token_id) == (dense.bos_token_id, dense.eos_token_id)


@pytest.mark.parametrize(
    ("kind", "sparse"), [(kind, p.sparse) for kind, pairs in TEXT_PAIRS.items() for p in pairs]
)
def test_rotation_and_other_common_fields_are_carried_and_saved(
    kind: str, sparse: str, tmp_path: Path
) -> None:
    full = (
        {"layer_types": ["full_attention"] * 3} if (kind, sparse) == ("qwen2", "glm4_moe") else {}
    )
    dense = language_config(kind, **full)
    if "rope_theta" in dense.rope_parameters:
        dense.rope_parameters = dense.rope_parameters | {"rope_theta": 777.0}
    common = {"max_position_embeddings": 333, "attention_dropout": 0.25, "initializer_range": 0.03}
    changed(dense, **common)
    config = native_config(dense, Upcycling(4, 2, sparse_type=sparse)).config
    assert dense.rope_parameters.items() <= config.rope_parameters.items()
    assert getattr(config, "rope_theta", 777.0) == 777.0
    for name, value in common.items():
        assert getattr(config, name) == value
    config.save_pretrained(tmp_path)
    assert type(config).from_pretrained(tmp_path).to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("qwen3_vl", {"expert_split": 3}, "twice the width would be 32, the hidden size"),
        ("mistral", {"expert_init": "shared"}, "'mixtral' has no shared expert"),
        ("mistral", {"sparse_layers": [1, 2]}, "'mixtral' allows: all layers"),
        ("lfm2", {"sparse_layers": [0, 1]}, "layers up to the last, without a gap"),
        ("qwen3", {"sparse_type": "mixtral"}, "allowed for a model of type 'qwen3': qwen3_moe, gl"),
        ("qwen3", {"n_group": 2}, "'n_group'; the native class 'qwen3_moe' allows: router_aux_lo"),
        ("qwen3", {"expert_split": 5}, "divisors of the dense model's `intermediate_size`, 48"),
        ("qwen3", {"num_experts_per_tok": 9}, "`num_experts_per_tok` is 9; allowed: 1 to"),
    ],
)
def test_options_that_a_sparse_class_cannot_have_are_refused(
    kind: str, options: dict[str, Any], message: str
) -> None:
    config = vision_config(kind) if kind == "qwen3_vl" else language_config(kind)
    with pytest.raises(ValueError) as caught:
        native_config(
            config, Upcycling.of(**{"num_experts": 4, "num_experts_per_tok": 2} | options)
        )
    assert message in str(caught.value)


def test_a_model_without_a_head_is_refused() -> None:
    backbone = dense_model(language_config("qwen3")).model
    with pytest.raises(ValueError, match="Qwen3Model has no language modeling head"):
        native_model(backbone, 4, 2)


def test_square_banks_of_qwen3_vl_moe_are_refused() -> None:
    """transformers would load their published layout without transposing it."""
    for split, width in ((1, 32), (1, 16), (2, 64)):
        config = vision_config("qwen3_vl", intermediate_size=width)
        with pytest.raises(ValueError, match="the hidden size"):
            native_config(config, Upcycling(4, 2, split))


def test_each_field_that_a_sparse_class_adds_is_set_or_without_effect() -> None:
    """A default of a new release could otherwise change the function; see `Pair.fields`."""
    harmless = {
        *("output_router_logits", "router_aux_loss_coef"),
        *("bos_token_id", "eos_token_id", "tie_word_embeddings"),  # carried where the dense has one
        *("head_dim", "sep_token_id", "rope_theta", "rope_scaling", "rms_norm_eps"),
        # of layers that are dense, or whose attention follows from `layer_types`
        *("mlp_layer_types", "prefix_dense_sliding_window_pattern"),
        *("prefix_dense_intermediate_size", "sliding_window_pattern"),
    }
    for kind, pairs in TEXT_PAIRS.items():
        declared = set(CONFIG_MAPPING[kind]().to_dict())
        for pair in pairs:
            added = set(CONFIG_MAPPING[pair.sparse]().to_dict()) - declared - harmless
            options = Upcycling(4, 2)
            made = native_config(language_config(kind, layer_types=None), options)
            sizes = {pair.num_experts, pair.top_k, pair.width, "decoder_sparse_step"}
            shared = pair.shared
            sizes |= {shared.width, shared.count} if shared else set()
            layers = pair.sparse_layers
            sizes |= {layers} if isinstance(layers, str) else set(layers or ())
            assert added <= sizes | set(pair.fields), (kind, pair.sparse)
            assert made.pair in pairs

"""With the same weights VLMoE computes what transformers' dense models compute, in fp32.

One expert, identical experts and layers without experts are three ways of writing a dense model.
A family is described by its own config and by the fields of ours that say the same in other words.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from dense_fields import (
    GRANITE,
    HALF_ROPE,
    LLAMA3_ROPE,
    TEXT_SIZES,
    VISION_SIZES,
    randomised,
)
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    GraniteConfig,
    Idefics3Config,
    InternVLConfig,
    LlamaConfig,
    LlavaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from vlmoe import VLMoEForConditionalGeneration

BATCH, LENGTH, WINDOW = 3, 13, 5
PER_LAYER = ["full_attention", "sliding_attention", "full_attention"]

# family: its config class, its own fields, our fields that are not simply of the same name
FAMILIES: dict[str, tuple[type[PreTrainedConfig], dict[str, Any], dict[str, Any]]] = {
    "llama": (LlamaConfig, {}, {}),
    "llama3_rope": (LlamaConfig, {"rope_parameters": LLAMA3_ROPE}, {}),
    "llama_bias": (LlamaConfig, {"attention_bias": True}, {"qkv_bias": True, "o_bias": True}),
    "llama_head_dim": (LlamaConfig, {"head_dim": 12}, {}),
    "mistral": (MistralConfig, {"sliding_window": None}, {}),
    "mistral_sliding": (MistralConfig, {"sliding_window": WINDOW}, {}),
    "qwen2": (Qwen2Config, {}, {"qkv_bias": True}),
    "qwen2_sliding": (
        Qwen2Config,
        {"use_sliding_window": True, "sliding_window": WINDOW, "layer_types": PER_LAYER},
        {"qkv_bias": True},
    ),
    "qwen3": (Qwen3Config, {"head_dim": 12}, {"qk_norm": True}),
    "smollm3": (SmolLM3Config, {"no_rope_layers": [1, 0, 1]}, {}),
    "granite": (GraniteConfig, GRANITE, {}),
    "phi3": (Phi3Config, {}, {}),
    "phi3_partial_rotary": (Phi3Config, {"rope_parameters": HALF_ROPE}, {}),
}
SAME_NAME = (
    *("head_dim", "rope_parameters", "sliding_window", "layer_types", "no_rope_layers"),
    *("rms_norm_eps", "hidden_act", "tie_word_embeddings", *GRANITE),
)
# name: our fields, and the layers that they make sparse
SPARSITY: dict[str, tuple[dict[str, Any], list[int]]] = {
    "one_expert": ({"num_experts": 1, "num_experts_per_tok": 1}, [0, 1, 2]),
    "identical_experts": ({"num_experts": 4, "num_experts_per_tok": 2}, [0, 1, 2]),
    "no_sparse_layer": ({"mlp_only_layers": [0, 1, 2]}, []),
    "every_other_layer_sparse": ({"decoder_sparse_step": 2}, [1]),
}


def split_fused(
    name: str, tensor: torch.Tensor, config: PreTrainedConfig
) -> Iterator[tuple[str, torch.Tensor]]:
    """Phi-3's fused projections, one by one; any other weight as it is."""
    fused = {
        "qkv_proj": [
            ("q_proj", config.num_attention_heads),
            ("k_proj", config.num_key_value_heads),
            ("v_proj", config.num_key_value_heads),
        ],
        "gate_up_proj": [("gate_proj", 1), ("up_proj", 1)],
    }
    for key, parts in fused.items():
        if key in name:
            shares = [share for _, share in parts]
            pieces = tensor.split([len(tensor) * share // sum(shares) for share in shares])
            yield from (
                (name.replace(key, part), piece)
                for (part, _), piece in zip(parts, pieces, strict=True)
            )
            return
    yield name, tensor


def renamed(name: str) -> str:
    """A dense model's weight name in VLMoE: language models, LLaVA, InternVL, Idefics3."""
    for old, new in (
        ("model.vision_model.", "model.vision_tower."),
        ("model.connector.modality_projection.proj.", "model.multi_modal_projector.linear_1."),
        ("model.text_model.", "model.language_model."),
        *(
            (f"model.{part}", f"model.language_model.{part}")
            for part in ("layers.", "norm.", "embed_tokens.")
        ),
    ):
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def copy_dense_weights(dense: PreTrainedModel, model: VLMoEForConditionalGeneration) -> None:
    """Give `model` the weights of `dense`: experts are copies of the MLP, routers stay random."""
    weights = {
        part: tensor
        for name, fused in dense.state_dict().items()
        for part, tensor in split_fused(renamed(name), fused, dense.config.get_text_config())
    }
    for name, parameter in model.state_dict().items():
        mlp = name.partition("experts.")[0]
        if name.endswith("experts.gate_up_proj"):
            gate_up = torch.cat(
                [weights[f"{mlp}gate_proj.weight"], weights[f"{mlp}up_proj.weight"]]
            )
            weights[name] = gate_up.expand_as(parameter)
        elif name.endswith("experts.down_proj"):
            weights[name] = weights[f"{mlp}down_proj.weight"].expand_as(parameter)
    for name in set(weights) - set(model.state_dict()):
        assert ".mlp." in name, f"no place for {name}"
        del weights[name]
    left = model.load_state_dict(weights, strict=False).missing_keys
    routers_and_vision = ("router.weight", "vision_tower", "multi_modal_projector")
    assert all(any(part in name for part in routers_and_vision) for name in left), left


def text_fields(dense: PreTrainedConfig, **ours: Any) -> dict[str, Any]:
    """`VLMoETextConfig` fields of a dense text config, with experts as wide as its MLP."""
    same = {
        name: getattr(dense, name) for name in SAME_NAME if getattr(dense, name, None) is not None
    }
    return same | {"moe_intermediate_size": dense.intermediate_size, "pad_token_id": None} | ours


def text_sizes(tiny_config: Callable[..., Any]) -> dict[str, Any]:
    """The tiny sizes under the names that dense text configs share with ours."""
    text = tiny_config().text_config
    return {name: getattr(text, name) for name in TEXT_SIZES} | {"pad_token_id": None}


def relative_difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """max|d| / max|theirs|."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.mark.parametrize("sparsity", SPARSITY)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_logits_equal_the_dense_model(
    family: str, sparsity: str, tiny_config: Callable[..., Any], tiny_model: Callable[..., Any]
) -> None:
    config_class, theirs, ours = FAMILIES[family]
    config = config_class(**text_sizes(tiny_config) | theirs)
    dense = randomised(AutoModelForCausalLM.from_config(config))
    fields, sparse_layers = SPARSITY[sparsity]
    model = tiny_model(text=text_fields(config, **ours, **fields))
    layers = model.model.language_model.layers
    assert [i for i in range(3) if hasattr(layers[i].mlp, "experts")] == sparse_layers
    copy_dense_weights(dense, model)

    input_ids = torch.randint(6, config.vocab_size, (BATCH, LENGTH))
    for padding in (slice(9, None), slice(None, 4)):  # right, left
        attention_mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
        attention_mask[1, padding] = 0
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        real = attention_mask.bool()
        difference = relative_difference(model(**inputs).logits[real], dense(**inputs).logits[real])
        assert difference <= 1e-5, f"{padding}: {difference:.1e}"


def llava(text: dict[str, Any], vision: dict[str, Any]) -> tuple[PreTrainedConfig, dict[str, Any]]:
    """CLIP tower, features of the last layer but one, class token dropped."""
    sub_configs = {"text_config": LlamaConfig(**text), "vision_config": CLIPVisionConfig(**vision)}
    config = LlavaConfig(image_token_index=5, **sub_configs)
    top = {
        "vision_use_last_hidden_state": False,
        "vision_feature_layer": -2,
        "pixel_shuffle_factor": 1,
    }
    return config, top | {"vision_feature_select_strategy": "default"}


def llava_two_layers(
    text: dict[str, Any], vision: dict[str, Any]
) -> tuple[PreTrainedConfig, dict[str, Any]]:
    """LLaVA with the features of two layers side by side, before the tower's final norm."""
    config, top = llava(text, vision)
    config.vision_feature_layer = [-2, -1]
    return config, top | {"vision_feature_layer": [-2, -1]}


def internvl(
    text: dict[str, Any], vision: dict[str, Any]
) -> tuple[PreTrainedConfig, dict[str, Any]]:
    """InternVL's tower, pixel shuffle, LayerNorm and two linears; tied embeddings."""
    sub_configs = {"text_config": LlamaConfig(**text), "vision_config": vision}
    top = {"vision_feature_select_strategy": "default", "projector_layer_norm": True}
    return InternVLConfig(image_token_id=5, **sub_configs), top | {"tie_word_embeddings": True}


def idefics3(
    text: dict[str, Any], vision: dict[str, Any]
) -> tuple[PreTrainedConfig, dict[str, Any]]:
    """Idefics3's and SmolVLM's tower, pixel shuffle and one linear without bias."""
    sub_configs = {"text_config": LlamaConfig(**text), "vision_config": vision}
    return Idefics3Config(image_token_id=5, scale_factor=2, **sub_configs), {
        "projector_num_layers": 1,
        "multimodal_projector_bias": False,
    }


@pytest.mark.parametrize("family", [llava, llava_two_layers, internvl, idefics3])
@torch.no_grad()
def test_logits_with_images_equal_the_dense_vision_language_model(
    family: Callable[..., Any], tiny_config: Callable[..., Any], tiny_model: Callable[..., Any]
) -> None:
    tiny_vision = tiny_config().vision_config
    vision = {name: getattr(tiny_vision, name) for name in VISION_SIZES}
    config, top = family(text_sizes(tiny_config), vision)
    dense = randomised(AutoModelForImageTextToText.from_config(config))
    # `to_dict` carries the tower's `model_type` and any field that the family's config fills in.
    vision = config.vision_config.to_dict()
    model = tiny_model(
        text=text_fields(config.text_config, tie_word_embeddings=False), vision=vision, **top
    )
    copy_dense_weights(dense, model)

    tokens = 4 if model.config.pixel_shuffle_factor == 2 else 16
    input_ids = torch.randint(6, 99, (2, 2 * tokens + 5))
    input_ids[0, 1 : 1 + tokens] = input_ids[0, 3 + tokens : 3 + 2 * tokens] = 5  # two images
    input_ids[1, 2 : 2 + tokens] = 5  # one image
    images = torch.randn(3, 3, 16, 16)
    padded = images.new_zeros(2, 2, 3, 16, 16)
    padded[0], padded[1, 0] = images[:2], images[2]
    theirs = dense(input_ids, pixel_values=padded if family is idefics3 else images).logits
    for pixel_inputs in (
        {"pixel_values": images},
        {"pixel_values": padded, "pixel_attention_mask": (padded != 0).any(2).long()},
    ):
        assert relative_difference(model(input_ids, **pixel_inputs).logits, theirs) <= 1e-5
    no_images = model(torch.where(input_ids == 5, 6, input_ids)).logits
    assert relative_difference(no_images, theirs) > 1e-2, "the images do not show in the logits"

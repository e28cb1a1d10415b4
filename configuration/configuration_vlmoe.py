# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Configuration of VLMoE: a vision tower, a connector and a sparse mixture-of-experts decoder.

- `VLMoETextConfig` describes the decoder. With one expert it is Llama, Mistral, Qwen2, Qwen3,
  SmolLM3, Granite or Phi-3, field by field; the expert fields are named as in the rest of the
  field.
- `VLMoEConfig` joins it with any vision encoder that `AutoModel` knows and says how image features
  become tokens.
"""

import json
from pathlib import Path
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.configuration_utils import SubConfigSpec

from .hub_code import HubCodeMixin

PRESETS = Path(__file__).parent / "presets"
ATTENTION_TYPES = ("full_attention", "sliding_attention")


def _require(config: PreTrainedConfig, field: str, ok: bool, allowed: str) -> None:
    if not ok:
        raise ValueError(f"`{field}` is {getattr(config, field)!r}; allowed: {allowed}.")


class _OwnModelTypes:
    """Refuses the configuration of another model, which transformers would read with a warning."""

    model_type: ClassVar[str]

    @classmethod
    def get_config_dict(cls, source: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """As in transformers; raises `ValueError` naming the file for a foreign `model_type`."""
        fields, kwargs = super().get_config_dict(source, **kwargs)  # type: ignore[misc]
        given = fields.get("model_type", VLMoEConfig.model_type)
        if given not in (VLMoEConfig.model_type, VLMoETextConfig.model_type):
            raise ValueError(
                f"{source}/config.json: `model_type` is {given!r}; allowed: "
                f"{VLMoEConfig.model_type!r}, {VLMoETextConfig.model_type!r}. "
                "Load another model with AutoModel, or with its own class."
            )
        return fields, kwargs

    def _refuse_foreign(self, fields: dict[str, Any]) -> None:
        given = fields.get("model_type", self.model_type)
        if given != self.model_type:
            raise ValueError(
                f"`model_type` of a {type(self).__name__} is {given!r}; allowed: "
                f"{self.model_type!r}."
            )


@strict
class VLMoETextConfig(_OwnModelTypes, HubCodeMixin, PreTrainedConfig):
    r"""Configuration of the sparse decoder.

    Args:
        intermediate_size: width of the dense gated MLP of layers without experts.
        head_dim: size of one attention head; by default `hidden_size // num_attention_heads`.
        qkv_bias, o_bias: biases of the attention projections (Qwen2: True, False).
        qk_norm: RMSNorm over each head's queries and keys before RoPE (Qwen3).
        layer_types: `"full_attention"` or `"sliding_attention"` for each layer; by default all
            sliding where `sliding_window` is set (Mistral), all full otherwise.
        no_rope_layers: for each layer 1 where rotary positions are applied and 0 where not
            (SmolLM3); by default all 1.
        embedding_multiplier, residual_multiplier, attention_multiplier, logits_scaling: Granite's
            factors on the input embeddings, on each residual branch, the softmax scale (by default
            `head_dim ** -0.5`), and the divisor of the logits.
        num_experts: routed experts of a sparse layer.
        num_experts_per_tok: experts that each token is sent to (k).
        moe_intermediate_size: width of one expert; by default `intermediate_size`.
        num_shared_experts: experts of the same width that every token passes through, as one fused
            MLP.
        decoder_sparse_step: every n-th layer is sparse, counted from 1, as in Qwen3-MoE.
        mlp_only_layers: indices of layers that stay dense whatever `decoder_sparse_step` says.
        norm_topk_prob: divide the k routing weights by their sum.
        scoring_func: `"softmax"` over the experts or an independent `"sigmoid"` for each.
        routed_scaling_factor: multiplies the routed experts' output (DeepSeek-V3).
        router_aux_loss_coef: weight of the load balancing loss (Switch Transformer,
            https://arxiv.org/abs/2101.03961), taken per layer and per row; in force whenever labels
            are given; 0 switches it off.
        router_z_loss_coef: weight of the router z-loss (ST-MoE, https://arxiv.org/abs/2202.08906);
            0 switches it off.
        router_bias_update_rate: with more than 0 each expert has a bias that counts where experts
            are chosen and not in their weights; by this much it rises for experts with less than
            the mean load and falls for those with more, once per optimizer step
            (training/router_bias.py). DeepSeek-V3 takes 0.001, with sigmoid scores.
        output_router_logits: return `router_logits`; the losses do not depend on it.

    Raises:
        ValueError: a field has a value that is not allowed; the message names field, value and what
            is allowed.
    """

    model_type = "vlmoe_text"
    hub_classes = {  # noqa: RUF012 - declared in HubCodeMixin
        "AutoConfig": "configuration.configuration_vlmoe.VLMoETextConfig",
        "AutoModel": "modeling_vlmoe.modeling_vlmoe_text.VLMoETextModel",
    }
    base_config_key = "text_config"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 - Trainer wants a list
    attribute_map = {"num_local_experts": "num_experts"}  # noqa: RUF012 - transformers' own declaration
    base_model_tp_plan = {  # noqa: RUF012
        "embed_tokens": "embedding_rowwise",
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.q_norm": "replicated_with_grad_allreduce",
        "layers.*.self_attn.k_norm": "replicated_with_grad_allreduce",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.experts.gate_up_proj": "packed_colwise",
        "layers.*.mlp.experts.down_proj": "rowwise",
        "layers.*.mlp.experts": "moe_tp_experts",
        "layers.*.mlp.shared_experts.gate_proj": "colwise",
        "layers.*.mlp.shared_experts.up_proj": "colwise",
        "layers.*.mlp.shared_experts.down_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    base_model_ep_plan = {  # noqa: RUF012
        "layers.*.mlp.experts.gate_up_proj": "grouped_gemm",
        "layers.*.mlp.experts.down_proj": "grouped_gemm",
        "layers.*.mlp.experts": "ep_dispatch_experts",
    }
    base_model_pp_plan = {  # noqa: RUF012
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 32000
    hidden_size: int = 1536
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 32768
    initializer_range: float | int = 0.02
    rms_norm_eps: float | int = 1e-6
    use_cache: bool = True
    tie_word_embeddings: bool = False
    rope_parameters: dict | None = None
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: bool = False
    attention_dropout: float | int = 0.0
    layer_types: list[str] | None = None
    sliding_window: int | None = None
    no_rope_layers: list[int] | None = None
    embedding_multiplier: float | int = 1.0
    residual_multiplier: float | int = 1.0
    attention_multiplier: float | int | None = None
    logits_scaling: float | int = 1.0
    num_experts: int = 8
    num_experts_per_tok: int = 2
    moe_intermediate_size: int | None = None
    num_shared_experts: int = 0
    decoder_sparse_step: int = 1
    mlp_only_layers: list[int] | None = None
    norm_topk_prob: bool = True
    scoring_func: str = "softmax"
    routed_scaling_factor: float | int = 1.0
    output_router_logits: bool = False
    router_aux_loss_coef: float | int = 0.001
    router_z_loss_coef: float | int = 0.0
    router_bias_update_rate: float | int = 0.0
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Fill in what follows from other fields, then check all of them."""
        self._refuse_foreign(kwargs)
        _require(self, "num_attention_heads", self.num_attention_heads > 0, "1 or more")
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            divides = self.hidden_size % self.num_attention_heads == 0
            allowed = f"a divisor of hidden_size={self.hidden_size}, or set `head_dim`"
            _require(self, "num_attention_heads", divides, allowed)
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.moe_intermediate_size is None:
            self.moe_intermediate_size = self.intermediate_size
        if self.mlp_only_layers is None:
            self.mlp_only_layers = []
        if self.layer_types is None:
            kind = "full_attention" if self.sliding_window is None else "sliding_attention"
            self.layer_types = [kind] * self.num_hidden_layers
        if self.no_rope_layers is None:
            self.no_rope_layers = [1] * self.num_hidden_layers
        super().__post_init__(**kwargs)
        self.validate_architecture()

    def validate_architecture(self) -> None:
        """Check every field that has a range; also run by transformers before saving."""
        self._check_numbers()
        heads, k = self.num_attention_heads, self.num_experts_per_tok
        divides = heads % self.num_key_value_heads == 0
        _require(self, "num_key_value_heads", divides, f"a divisor of num_attention_heads={heads}")
        in_range = 1 <= k <= self.num_experts
        _require(self, "num_experts_per_tok", in_range, f"1 to num_experts={self.num_experts}")
        known = self.scoring_func in ("softmax", "sigmoid")
        _require(self, "scoring_func", known, "softmax, sigmoid")
        self._check_layers()

    def _check_numbers(self) -> None:
        """Sizes, coefficients and factors, each by itself, and the activation."""
        for field in (
            *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
            *("num_key_value_heads", "head_dim", "num_experts", "moe_intermediate_size"),
            *("decoder_sparse_step", "max_position_embeddings"),
        ):
            _require(self, field, getattr(self, field) > 0, "1 or more")
        for field in (
            *("router_aux_loss_coef", "router_z_loss_coef", "router_bias_update_rate"),
            "num_shared_experts",
            *("initializer_range", "rms_norm_eps"),
        ):
            _require(self, field, getattr(self, field) >= 0, "0 or more")
        for field in ("logits_scaling", "routed_scaling_factor"):
            _require(self, field, getattr(self, field) > 0, "more than 0")
        _require(self, "attention_dropout", 0 <= self.attention_dropout <= 1, "0 to 1")
        _require(self, "head_dim", self.head_dim % 2 == 0, "an even number: RoPE turns pairs")
        _require(self, "hidden_act", self.hidden_act in ACT2FN, ", ".join(ACT2FN))

    def _check_layers(self) -> None:
        """Fields with an entry for each layer, or that name layers."""
        layers, kinds, ropes = self.num_hidden_layers, self.layer_types, self.no_rope_layers
        named = all(0 <= i < layers for i in self.mlp_only_layers)
        _require(self, "mlp_only_layers", named, f"layer indices from 0 to {layers - 1}")
        known = len(kinds) == layers and set(kinds) <= set(ATTENTION_TYPES)
        each = f"{layers} entries, each one of {', '.join(ATTENTION_TYPES)}"
        _require(self, "layer_types", known, each)
        if self.sliding_window is None:
            window_ok = "sliding_attention" not in kinds
        else:
            window_ok = self.sliding_window > 0
        needed = "1 or more; needed where `layer_types` has sliding_attention"
        _require(self, "sliding_window", window_ok, needed)
        binary = len(ropes) == layers and set(ropes) <= {0, 1}
        _require(self, "no_rope_layers", binary, f"{layers} entries, each 0 or 1")

    @property
    def logit_scale(self) -> float:
        """What vLLM multiplies logits by: 1 / `logits_scaling`."""
        return 1 / self.logits_scaling

    def is_sparse_layer(self, layer_idx: int) -> bool:
        """Whether layer `layer_idx` (from 0) holds experts."""
        return (
            layer_idx not in self.mlp_only_layers
            and (layer_idx + 1) % self.decoder_sparse_step == 0
        )


@strict
class VLMoEConfig(_OwnModelTypes, HubCodeMixin, PreTrainedConfig):
    r"""Configuration of the whole model.

    Args:
        vision_config: config (or dict with `model_type`) of any vision encoder that `AutoModel`
            knows; SigLIP by default, without its pooling head, which would get no gradient.
        text_config: `VLMoETextConfig` or dict.
        image_token_id: the token that each image feature replaces.
        vision_feature_layer: which `hidden_states` of the tower become image features, one index or
            several (concatenated on the channels), as in LLaVA.
        vision_use_last_hidden_state: take `last_hidden_state` (after the tower's final norm;
            InternVL, SmolVLM) instead of `hidden_states[-1]` (before it; LLaVA). Needs
            `vision_feature_layer=-1`.
        vision_feature_select_strategy: `"default"` drops the first (class) token, `"full"` keeps
            all.
        pixel_shuffle_factor: joins r x r neighbouring features into one token of r * r times the
            channels.
        projector_layer_norm: LayerNorm before the connector's first linear (InternVL).
        projector_num_layers: one linear (SmolVLM) or two with `projector_hidden_act` between them
            (LLaVA).
        multimodal_projector_bias: biases in the connector's linears.

    Raises:
        ValueError: a field has a value that is not allowed; the message names field, value and what
            is allowed.

    Example:
        >>> from vlmoe import VLMoEConfig, VLMoEForConditionalGeneration
        >>> config = VLMoEConfig.from_preset("tiny")
        >>> model = VLMoEForConditionalGeneration(config)
    """

    model_type = "vlmoe"
    hub_classes = {  # noqa: RUF012 - declared in HubCodeMixin
        "AutoConfig": "configuration.configuration_vlmoe.VLMoEConfig",
        "AutoModel": "modeling_vlmoe.modeling_vlmoe.VLMoEModel",
        "AutoModelForImageTextToText": "modeling_vlmoe.modeling_vlmoe"
        ".VLMoEForConditionalGeneration",
    }
    keys_to_ignore_at_inference = [  # noqa: RUF012 - Trainer wants a list
        "past_key_values",
        "aux_loss",
        "z_loss",
        "router_logits",
        "image_hidden_states",
    ]
    sub_configs_defaults = {  # noqa: RUF012 - transformers' own declaration
        "vision_config": SubConfigSpec(
            config_class=AutoConfig,
            model_type="siglip_vision_model",
            init_kwargs={"vision_use_head": False},
        ),
        "text_config": VLMoETextConfig,
    }

    vision_config: Any = None  # PreTrainedConfig; a dict or None becomes one
    text_config: Any = None  # VLMoETextConfig; a dict or None becomes one
    image_token_id: int = 4
    vision_feature_layer: int | list[int] = -1
    vision_use_last_hidden_state: bool = True
    vision_feature_select_strategy: str = "full"
    pixel_shuffle_factor: int = 1
    projector_layer_norm: bool = False
    projector_num_layers: int = 2
    projector_hidden_act: str = "gelu"
    multimodal_projector_bias: bool = True
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        """Build the sub-configs, take over the text config's tying, then check the fields."""
        self._refuse_foreign(kwargs)
        super().__post_init__(**kwargs)
        self.tie_word_embeddings = self.tie_word_embeddings or self.text_config.tie_word_embeddings
        self.validate_architecture()

    def validate_architecture(self) -> None:
        """Check every field that has a range; also run by transformers before saving."""
        text, last = self.text_config, self.vision_use_last_hidden_state
        if not isinstance(text, VLMoETextConfig):
            raise ValueError(
                f"`text_config` is a {type(text).__name__}; "
                "allowed: VLMoETextConfig or a dict of its fields."
            )
        vision = self.vision_config
        if not hasattr(vision, "num_hidden_layers"):
            raise ValueError(
                f"`vision_config` is a {type(vision).__name__}; allowed: the config of a vision "
                "encoder alone, such as a SiglipVisionConfig, or a dict of its fields."
            )
        layers = vision.num_hidden_layers
        chosen = self.vision_feature_layers
        in_range = bool(chosen) and all(-layers - 1 <= layer <= layers for layer in chosen)
        allowed = f"{-layers - 1} to {layers}, one or several"
        _require(self, "vision_feature_layer", in_range, allowed)
        allowed = "-1 where `vision_use_last_hidden_state` is True"
        _require(self, "vision_feature_layer", not last or chosen == [-1], allowed)
        strategy_ok = self.vision_feature_select_strategy in ("default", "full")
        _require(self, "vision_feature_select_strategy", strategy_ok, "default, full")
        act_ok = self.projector_hidden_act in ACT2FN
        _require(self, "projector_hidden_act", act_ok, ", ".join(ACT2FN))
        _require(self, "pixel_shuffle_factor", self.pixel_shuffle_factor > 0, "1 or more")
        _require(self, "projector_num_layers", self.projector_num_layers in (1, 2), "1, 2")
        in_vocabulary = 0 <= self.image_token_id < text.vocab_size
        allowed = f"0 to {text.vocab_size - 1} (text_config.vocab_size - 1)"
        _require(self, "image_token_id", in_vocabulary, allowed)

    @property
    def vision_feature_layers(self) -> list[int]:
        """`vision_feature_layer` as a list."""
        layer = self.vision_feature_layer
        return [layer] if isinstance(layer, int) else list(layer)

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> "VLMoEConfig":
        """The configuration of a named size; `overrides` replace top-level fields.

        Raises:
            ValueError: there is no preset of that name, or no presets in a copy from the Hub.
        """
        if not PRESETS.is_dir():
            raise ValueError(
                "This is a copy of VLMoE's code from a model folder, which has no presets; "
                "they come with the package: `from vlmoe import VLMoEConfig`."
            )
        names = sorted(path.stem for path in PRESETS.glob("*.json"))
        if name not in names:
            raise ValueError(f"There is no preset {name!r}; allowed: {', '.join(names)}.")
        return cls(**json.loads((PRESETS / f"{name}.json").read_text()) | overrides)


__all__ = ["VLMoEConfig", "VLMoETextConfig"]

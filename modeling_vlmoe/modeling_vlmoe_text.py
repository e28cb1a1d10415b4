# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""The decoder: pre-norm attention and (sparse) feed-forward layers.

- Llama's blocks, plus what Mistral, Qwen2, Qwen3, SmolLM3, Granite and Phi-3 differ by, each behind
  one config field.
- Every layer that `config.is_sparse_layer` names holds experts in place of the dense MLP.
- Experts run through `@use_experts_implementation` (transformers looks for these words in this
  file).

Shapes: batch, length, hidden, heads, head_dim.
"""

from collections.abc import Callable
from typing import Any, Self

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_masks_for_generate
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeModelOutputWithPast
from transformers.modeling_utils import (
    ALL_ATTENTION_FUNCTIONS,
    LoadStateDictConfig,
    LoadStateDictInfo,
    PreTrainedModel,
)
from transformers.models.llama.modeling_llama import (
    LlamaRMSNorm,
    apply_rotary_pos_emb,
    eager_attention_forward,
)
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding
from transformers.models.phi3.modeling_phi3 import (
    apply_rotary_pos_emb as apply_partial_rotary_pos_emb,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, logging
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.import_utils import is_torchdynamo_compiling
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from ..configuration.configuration_vlmoe import VLMoEConfig
from ..configuration.configuration_vlmoe_text import VLMoETextConfig
from .experts_auto import default_experts
from .input_checks import check_token_inputs
from .quantization import (
    check_experts_implementation,
    check_quantization_config,
    check_quantized_experts,
    quantized_experts,
)
from .sparse_moe import VLMoEExperts, VLMoEMLP, VLMoESparseMoeBlock
from .vision_experts import init_router_or_bank
from .whole_weights import caller_judges, damaged_file, require_whole_weights

logger = logging.get_logger(__name__)


class VLMoERMSNorm(LlamaRMSNorm):
    """Root mean square norm over the last dimension."""


class VLMoERotaryEmbedding(Phi3RotaryEmbedding):
    """Rotary tables for `head_dim`, or for `rope_parameters["partial_rotary_factor"]` of it."""


class VLMoEAttention(nn.Module):
    """Grouped-query attention."""

    def __init__(self, config: VLMoETextConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.is_causal = True

        query_size = config.num_attention_heads * self.head_dim
        key_value_size = config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, key_value_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, key_value_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=config.o_bias)
        norm = VLMoERMSNorm if config.qk_norm else nn.Identity
        self.q_norm = norm(self.head_dim, eps=config.rms_norm_eps)
        self.k_norm = norm(self.head_dim, eps=config.rms_norm_eps)

    @property
    def scaling(self) -> float:
        """Factor of the scores before the softmax."""
        multiplier = self.config.attention_multiplier
        return self.head_dim**-0.5 if multiplier is None else multiplier

    @property
    def sliding_window(self) -> int | None:
        """Number of tokens that this layer looks back; None for all."""
        slides = self.config.layer_types[self.layer_idx] == "sliding_attention"
        return self.config.sliding_window if slides else None

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(batch, length, hidden) -> the same, and (batch, heads, length, keys) or None."""
        batch_and_length = hidden_states.shape[:-1]
        per_head = (*batch_and_length, -1, self.head_dim)
        # (batch, heads, length, head_dim)
        query = self.q_norm(self.q_proj(hidden_states).view(per_head)).transpose(1, 2)
        key = self.k_norm(self.k_proj(hidden_states).view(per_head)).transpose(1, 2)
        value = self.v_proj(hidden_states).view(per_head).transpose(1, 2)

        if self.config.no_rope_layers[self.layer_idx]:
            cos, sin = position_embeddings  # (batch, length, rotary_dim)
            is_partial = cos.shape[-1] < self.head_dim
            rotate = apply_partial_rotary_pos_emb if is_partial else apply_rotary_pos_emb
            query, key = rotate(query, key, cos, sin)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)

        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, attention_weights = attention(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.config.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        return self.o_proj(output.reshape(*batch_and_length, -1)), attention_weights


class VLMoEDecoderLayer(GradientCheckpointingLayer):
    """Attention, then experts or a dense MLP, each on a normalized input and added to it."""

    def __init__(self, config: VLMoETextConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.self_attn = VLMoEAttention(config, layer_idx)
        self.is_sparse = config.is_sparse_layer(layer_idx)
        self.mlp = VLMoESparseMoeBlock(config) if self.is_sparse else VLMoEMLP(config)
        self.input_layernorm = VLMoERMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = VLMoERMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        mm_token_type_ids: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(batch, length, hidden) -> the same, router logits (batch * length, experts) or None.

        Logits are returned, because under re-entrant checkpointing only a layer's output has a
        gradient. `mm_token_type_ids` (batch, length) is for the router.
        """
        attended, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + self._scaled(attended)
        normalized = self.post_attention_layernorm(hidden_states)
        if self.is_sparse:
            output, router_logits = self.mlp(normalized, mm_token_type_ids)
        else:
            output, router_logits = self.mlp(normalized), None
        return hidden_states + self._scaled(output), router_logits

    def _scaled(self, branch: torch.Tensor) -> torch.Tensor:
        multiplier = self.config.residual_multiplier
        return branch if multiplier == 1 else branch * multiplier


class VLMoEPreTrainedModel(PreTrainedModel):
    """Declarations to transformers, loading and initialization of all VLMoE models."""

    config: VLMoEConfig
    base_model_prefix = "model"
    input_modalities: tuple[str, ...] = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ("VLMoEDecoderLayer",)
    _skip_keys_device_placement = ("past_key_values",)
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @property
    def learns(self) -> bool:
        """Whether a call is a step of training: not evaluation, not generation."""
        return self.training and torch.is_grad_enabled()

    @classmethod
    def is_custom_code(cls) -> bool:
        """Return False, or transformers skips `_init_weights` on modules without parameters."""
        return False

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Self:
        """Load as transformers does, but keep unused vision parameters frozen.

        Raises:
            OSError: a weights file is missing or damaged; the message names it.
            ValueError: the weights do not fit the model (see whole_weights.py), a quantization
                skips the experts, or an experts implementation cannot multiply quantized ones.
        """
        check_quantization_config(kwargs.get("quantization_config"))
        try:
            with caller_judges(kwargs.get("output_loading_info", False)):
                loaded = super().from_pretrained(*args, **kwargs)
        except SafetensorError as error:
            source = args[0] if args else kwargs.get("pretrained_model_name_or_path")
            raise OSError(damaged_file(source, error)) from error
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        for module in model.modules():
            if hasattr(module, "freeze_unused_vision_parameters"):
                module.freeze_unused_vision_parameters()
        if getattr(model, "hf_quantizer", None) is not None:
            check_quantized_experts(model)
        if quantized_experts(model):
            # The Auto classes pass theirs on in the config.
            of_config = getattr(kwargs.get("config"), "_experts_implementation", None)
            chosen = kwargs.get("experts_implementation") or of_config or "eager"
            model.set_experts_implementation(chosen)
        return loaded

    @staticmethod
    def _finalize_model_loading(
        model: PreTrainedModel, load_config: LoadStateDictConfig, loading_info: LoadStateDictInfo
    ) -> LoadStateDictInfo:
        """Refuse missing weights, which transformers would initialize at random."""
        require_whole_weights(model, load_config, loading_info)
        return PreTrainedModel._finalize_model_loading(model, load_config, loading_info)

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """Return what transformers does, but by default "auto" for sizes that grouped_mm refuses.

        transformers' default is grouped_mm, which would fail in the first forward pass.
        """
        asked = default_experts(requested_experts, self.config.expert_sizes)
        return super().get_correct_experts_implementation(asked)

    def set_experts_implementation(self, experts_implementation: str | dict) -> None:
        """Set it as transformers does; quantized experts take only `eager` and `auto`."""
        check_experts_implementation(self, experts_implementation)
        super().set_experts_implementation(experts_implementation)

    def save_pretrained(
        self, *args: Any, save_original_format: bool = False, **kwargs: Any
    ) -> None:
        """Save as transformers does, but always under the in-memory names.

        transformers would save some towers (DINOv2, ViT) under the names of their first release.
        Trainer resumes without translating names and would silently skip such a tower.
        """
        has_bias = any(name.endswith("e_score_correction_bias") for name, _ in self.named_buffers())
        moves = has_bias and self.config.get_text_config().router_bias_update_rate
        if moves and any(getattr(module, "has_learned", False) for module in self.modules()):
            logger.warning_once(
                "The saved router bias is out of date: tokens were routed in training since its "
                "last update, or it never had one. VLMoETrainer updates it; with another Trainer "
                "add vlmoe.routing.balancing.RouterBiasCallback, in a custom loop call "
                "update_router_bias(model) after each optimizer step."
            )
        super().save_pretrained(*args, save_original_format=save_original_format, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.get_text_config().initializer_range
        if isinstance(module, VLMoEExperts):
            init.normal_(module.gate_up_proj, mean=0.0, std=std)
            init.normal_(module.down_proj, mean=0.0, std=std)
        else:
            init_router_or_bank(module, std)


def real_tokens(attention_mask: torch.Tensor | dict | None, tokens: torch.Tensor) -> torch.Tensor:
    """(batch, length): True for real tokens, not padding; without a 2-D mask all are real."""
    if isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2:
        return attention_mask[:, -tokens.shape[1] :].bool()
    return torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)


class VLMoETextModel(VLMoEPreTrainedModel):
    """The decoder without a language modeling head."""

    config: VLMoETextConfig
    input_modalities = ("text",)
    _can_record_outputs = {  # noqa: RUF012 - transformers' own declaration
        "router_logits": OutputRecorder(VLMoEDecoderLayer, index=1),
        "hidden_states": VLMoEDecoderLayer,
        "attentions": VLMoEAttention,
    }

    def __init__(self, config: VLMoETextConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(
            VLMoEDecoderLayer(config, i) for i in range(config.num_hidden_layers)
        )
        self.norm = VLMoERMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = VLMoERotaryEmbedding(config)
        self.gradient_checkpointing = False
        if config.router_bias_update_rate:
            self._keep_in_fp32_modules_strict = {"e_score_correction_bias"}
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MoeModelOutputWithPast:
        """(batch, length) ids or (batch, length, hidden) embeddings -> (batch, length, hidden).

        `mm_token_type_ids` (batch, length): 1 for image tokens, for routers that distinguish
        modalities; without it all tokens are text. With `output_router_logits` also return one
        (batch * length, experts) fp32 tensor per sparse layer.
        """
        tokens = input_ids, inputs_embeds, attention_mask, position_ids, past_key_values
        check_token_inputs(*tokens, mm_token_type_ids, self.config.hidden_size)
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)
            position_ids = (position_ids + seen).unsqueeze(0)
        if not is_torchdynamo_compiling():
            self.config.check_routing()
        hidden_states = inputs_embeds
        if self.config.embedding_multiplier != 1:
            hidden_states = hidden_states * self.config.embedding_multiplier
        masks = attention_mask
        if not isinstance(masks, dict):  # `generate` may have made one for each type of attention
            of_tokens = hidden_states, attention_mask, past_key_values, position_ids
            masks = create_masks_for_generate(self.config, *of_tokens)
        position_embeddings = self.rotary_emb(hidden_states, position_ids)
        for layer, attention_type in zip(self.layers, self.config.layer_types, strict=True):
            output = layer(
                hidden_states,
                attention_mask=masks[attention_type],
                position_embeddings=position_embeddings,
                position_ids=position_ids,
                past_key_values=past_key_values,
                mm_token_type_ids=mm_token_type_ids,
                **kwargs,
            )
            # A layer that belongs to another pipeline stage passes its input on.
            hidden_states = output[0] if isinstance(output, tuple) else output
        return MoeModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states),
            past_key_values=past_key_values if use_cache else None,
        )


__all__ = ["VLMoEPreTrainedModel", "VLMoETextModel"]

# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""The decoder: pre-norm attention and (sparse) feed-forward layers.

- Llama's blocks, plus what Mistral, Qwen2, Qwen3, SmolLM3, Granite and Phi-3 differ by, each behind
  one config field.
- Every layer that `config.is_sparse_layer` names holds experts in place of the dense MLP.
- Experts dispatch through `@use_experts_implementation` (transformers looks for these words in this
  file).

Shapes: batch, length, hidden, heads, head_dim.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
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
from .input_checks import check_token_inputs
from .quantization import (
    check_experts_implementation,
    check_quantization_config,
    check_quantized_experts,
    quantized_experts,
)
from .router import VLMoERouter
from .sparse_moe import VLMoEExperts, VLMoEMLP, VLMoESparseMoeBlock, sparse_layers
from .vision_experts import VLMoEBiasedExperts, init_biased_experts
from .whole_weights import caller_judges, require_whole_weights

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
        self.q_norm = (
            VLMoERMSNorm(self.head_dim, eps=config.rms_norm_eps)
            if config.qk_norm
            else nn.Identity()
        )
        self.k_norm = (
            VLMoERMSNorm(self.head_dim, eps=config.rms_norm_eps)
            if config.qk_norm
            else nn.Identity()
        )

    @property
    def scaling(self) -> float:
        """What scores are multiplied by before the softmax."""
        multiplier = self.config.attention_multiplier
        return self.head_dim**-0.5 if multiplier is None else multiplier

    @property
    def sliding_window(self) -> int | None:
        """How many tokens back this layer sees; None for all."""
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
        query = self.q_norm(self.q_proj(hidden_states).view(per_head)).transpose(
            1, 2
        )  # (batch, heads, length, head_dim)
        key = self.k_norm(self.k_proj(hidden_states).view(per_head)).transpose(1, 2)
        value = self.v_proj(hidden_states).view(per_head).transpose(1, 2)

        if self.config.no_rope_layers[self.layer_idx]:
            cos, sin = position_embeddings  # (batch, length, rotary_dim)
            rotate = (
                apply_rotary_pos_emb
                if cos.shape[-1] == self.head_dim
                else apply_partial_rotary_pos_emb
            )
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
    """Attention, then experts or a dense MLP, each on a normalised input and added to it."""

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
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """(batch, length, hidden) -> the same, router logits (batch * length, experts) or None, and
        the chosen experts (batch * length, k) or None.

        The logits are returned, as only what a layer returns has a gradient under re-entrant
        checkpointing. `mm_token_type_ids` (batch, length) is for the router.
        """
        attended, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + self._scaled(attended)
        normalised = self.post_attention_layernorm(hidden_states)
        router_logits = top_k_index = None
        if self.is_sparse:
            output, router_logits, top_k_index = self.mlp(normalised, mm_token_type_ids)
        else:
            output = self.mlp(normalised)
        return hidden_states + self._scaled(output), router_logits, top_k_index

    def _scaled(self, branch: torch.Tensor) -> torch.Tensor:
        multiplier = self.config.residual_multiplier
        return branch if multiplier == 1 else branch * multiplier


class VLMoEPreTrainedModel(PreTrainedModel):
    """What all VLMoE models declare to transformers, and how their weights are initialised."""

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
        """Return False: for custom code transformers skips `_init_weights` on modules without
        parameters of their own.
        """
        return False

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, but loading does not make the unused vision parameters trainable.

        Raises:
            OSError: a weights file is missing or damaged; the message names it.
            ValueError: the weights are not those of the model (see whole_weights.py for what is
                allowed), a quantisation leaves the experts as they are, or an experts
                implementation cannot multiply quantised ones.
        """
        check_quantization_config(kwargs.get("quantization_config"))
        try:
            with caller_judges(kwargs.get("output_loading_info", False)):
                loaded = super().from_pretrained(*args, **kwargs)
        except SafetensorError as error:
            source = args[0] if args else kwargs.get("pretrained_model_name_or_path")
            raise OSError(damaged_file(source, error)) from error
        model = (
            loaded[0] if isinstance(loaded, tuple) else loaded
        )  # a tuple with `output_loading_info`
        for module in model.modules():
            if hasattr(module, "freeze_unused_vision_parameters"):
                module.freeze_unused_vision_parameters()
        if getattr(model, "hf_quantizer", None) is not None:
            check_quantized_experts(model)
        if quantized_experts(model):
            # The Auto classes hand on in the config what they were given.
            chosen = getattr(kwargs.get("config"), "_experts_implementation", None)
            model.set_experts_implementation(
                kwargs.get("experts_implementation") or chosen or "eager"
            )
        return loaded

    @staticmethod
    def _finalize_model_loading(model: Any, load_config: Any, loading_info: Any) -> Any:
        """As in transformers, but what is missing is refused in place of being made up."""
        require_whole_weights(model, load_config, loading_info)
        return PreTrainedModel._finalize_model_loading(model, load_config, loading_info)

    def set_experts_implementation(self, experts_implementation: str | dict) -> None:
        """As in transformers; quantised experts take `eager` and `auto` only (`ValueError`)."""
        check_experts_implementation(self, experts_implementation)
        super().set_experts_implementation(experts_implementation)

    def save_pretrained(self, *args: Any, save_original_format: bool = False, **kwargs: Any) -> Any:
        """As in transformers, but always under the in-memory names.

        transformers would save the parameters of some towers (DINOv2, ViT) under the names of their
        first release; Trainer resumes without translating names, and would silently leave such a
        tower as it was.
        """
        layers = sparse_layers(self).values()
        if any(layer.expert_load is not None and layer.expert_load.any() for layer in layers):
            logger.warning_once(
                "Saving a model whose router bias waits for an update: tokens were routed in "
                "training after the last one, or there never was one. With Trainer add "
                "vlmoe.routing.balancing.RouterBiasCallback; in a loop of your own call "
                "update_router_bias(model) after each optimizer step."
            )
        return super().save_pretrained(*args, save_original_format=save_original_format, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.get_text_config().initializer_range
        if isinstance(module, VLMoEExperts):
            init.normal_(module.gate_up_proj, mean=0.0, std=std)
            init.normal_(module.down_proj, mean=0.0, std=std)
        elif isinstance(module, VLMoERouter):
            init.normal_(module.weight, mean=0.0, std=std)
            for bias in (module.e_score_correction_bias, module.modality_bias):
                if bias is not None:
                    init.zeros_(bias)
            if module.allowed_experts is not None:  # not saved
                init.copy_(module.allowed_experts, module.modality_mask())
        elif isinstance(module, VLMoEBiasedExperts):
            init_biased_experts(module)


def damaged_file(source: Any, error: Exception) -> str:
    """Which weights file of a folder cannot be read."""
    for file in sorted(Path(str(source)).glob("*.safetensors")):
        try:
            with safe_open(file, "pt"):
                pass
        except SafetensorError as reason:
            return f"{file} is damaged ({reason}); copy or download it again."
    return f"A weights file of {source} is damaged ({error}); download it again."


def _token_mask(
    attention_mask: torch.Tensor | dict | None, inputs_embeds: torch.Tensor
) -> torch.Tensor:
    """(batch * length,): True for real tokens; without a 2-D mask all are."""
    if isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2:
        return attention_mask[:, -inputs_embeds.shape[1] :].flatten().bool()
    return torch.ones_like(inputs_embeds[..., 0], dtype=torch.bool).flatten()


class VLMoETextModel(VLMoEPreTrainedModel):
    """The decoder without a language modelling head."""

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

        `mm_token_type_ids` (batch, length): 1 for image tokens, for routers that tell modalities
        apart; without it all tokens are text.

        With `output_router_logits`, also `router_logits`: one (batch * length, experts) fp32 tensor
            per sparse layer.
        """
        tokens = input_ids, inputs_embeds, attention_mask, position_ids, past_key_values
        check_token_inputs(*tokens, mm_token_type_ids, self.config.hidden_size)
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (
                torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + seen
            ).unsqueeze(0)

        if not is_torchdynamo_compiling():
            self.config.check_routing()
        hidden_states = inputs_embeds
        if self.config.embedding_multiplier != 1:
            hidden_states = hidden_states * self.config.embedding_multiplier
        masks = self._attention_masks(attention_mask, hidden_states, past_key_values, position_ids)
        position_embeddings = self.rotary_emb(hidden_states, position_ids)
        learns = self.learns
        token_mask = _token_mask(attention_mask, inputs_embeds) if learns else None
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
            # A layer that a pipeline stage left to another stage passes its input on.
            hidden_states = output[0] if isinstance(output, tuple) else output
            if learns and isinstance(output, tuple) and output[1] is not None:
                layer.mlp.update_stats(*output[1:], token_mask)
        return MoeModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states),
            past_key_values=past_key_values if use_cache else None,
        )

    def _attention_masks(
        self,
        attention_mask: torch.Tensor | dict | None,
        inputs_embeds: torch.Tensor,
        past_key_values: Cache | None,
        position_ids: torch.Tensor,
    ) -> dict[str, Any]:
        """One mask per attention type in use; `generate` may have made them already."""
        if isinstance(attention_mask, dict):
            return attention_mask
        make = {
            "full_attention": create_causal_mask,
            "sliding_attention": create_sliding_window_causal_mask,
        }
        return {
            attention_type: make[attention_type](
                config=self.config,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                position_ids=position_ids,
            )
            for attention_type in sorted(set(self.config.layer_types))
        }


__all__ = ["VLMoEPreTrainedModel", "VLMoETextModel"]

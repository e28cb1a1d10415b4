# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Experts in the blocks of the vision tower and in the connector.

As in CuMo (https://arxiv.org/abs/2405.05949) and VL-MoE (https://arxiv.org/abs/2303.07226), a
router and a bank of MLPs replace an MLP of two linears with biases. The bank has the parameters
- `up_proj` (experts, inner, in), `up_proj_bias` (experts, inner)
- `down_proj` (experts, out, inner), `down_proj_bias` (experts, out)

Routing is softmax, top-k, and renormalize where k is 2 or more: with identical experts it is then
the dense model's function.

The sparse towers are transformers' own with some layers replaced. Like those of the decoder these
return their routing: under re-entrant checkpointing only a layer's output has a gradient, and
recomputation does not repeat a recording outside of the layer.

Shapes: tiles, patches (of one tile), channels (of the tower), tokens = tiles * patches.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import CLIPVisionModel, PreTrainedConfig, PreTrainedModel, SiglipVisionModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.integrations import use_experts_implementation
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.clip.modeling_clip import CLIPAttention, CLIPEncoderLayer
from transformers.models.siglip.modeling_siglip import SiglipAttention, SiglipEncoderLayer
from transformers.utils.output_capturing import OutputRecorder

from ..configuration.configuration_vlmoe import VLMoEConfig
from .experts_auto import default_experts, is_torchao
from .router import Routing, VLMoERouter


@use_experts_implementation(has_gate=False, has_bias=True)
class VLMoEBiasedExperts(nn.Module):
    """Fused bank of MLPs without gate projection: linear, activation, linear.

    (tokens, in), indices (tokens, k), weights (tokens, k) -> (tokens, out)

    `config` is the one whose `_experts_implementation` counts; `sizes` are in, inner, out.
    """

    config: PreTrainedConfig

    def __init__(
        self,
        config: PreTrainedConfig,
        num_experts: int,
        sizes: tuple[int, int, int],
        hidden_act: str,
    ) -> None:
        super().__init__()
        size_in, inner, size_out = sizes
        self.num_experts = num_experts
        self.act_fn = ACT2FN[hidden_act]
        self.up_proj = nn.Parameter(torch.empty(num_experts, inner, size_in))
        self.up_proj_bias = nn.Parameter(torch.empty(num_experts, inner))
        self.down_proj = nn.Parameter(torch.empty(num_experts, size_out, inner))
        self.down_proj_bias = nn.Parameter(torch.empty(num_experts, size_out))

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Compute what `eager` does: one expert after the other, each on its tokens."""
        output = hidden_states.new_zeros(hidden_states.shape[0], self.down_proj.shape[1])
        for e in top_k_index.unique().tolist():
            token, choice = torch.where(top_k_index == e)
            inner = F.linear(hidden_states[token], self.up_proj[e], self.up_proj_bias[e])
            result = F.linear(self.act_fn(inner), self.down_proj[e], self.down_proj_bias[e])
            result = result * top_k_weights[token, choice, None]
            output.index_add_(0, token, result.to(output.dtype))
        return output


class _Bank:  # not a SimpleNamespace, which torch.compile cannot trace
    """A bank's attributes that implementations read, to be changed while the bank stays."""

    NAMES = (
        "config num_experts act_fn _is_expert_parallel has_gate has_bias has_post_expert_norm "
        "is_transposed is_concatenated up_proj up_proj_bias down_proj down_proj_bias"
    ).split()

    def __init__(self, experts: VLMoEBiasedExperts):
        for name in self.NAMES:
            setattr(self, name, getattr(experts, name))


class VLMoEConnectorExperts(VLMoEBiasedExperts):
    """Biased experts whose output width differs from their input width.

    The library's implementations take the output width from the tokens. For all but `eager` the
    narrower side, tokens or result, is padded with zeros, and so are the weights that meet it: at
    most twice the multiplications. Quantized weights are multiplied expert by expert, unpadded.
    """

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """(tokens, in), indices (tokens, k), weights (tokens, k) -> (tokens, out)."""
        size_in, size_out = hidden_states.shape[1], self.down_proj.shape[1]
        one_by_one = self.config._experts_implementation == "eager" or is_torchao(self.up_proj)
        if size_in == size_out or one_by_one:
            return super().forward(hidden_states, top_k_index, top_k_weights)
        bank: Any = _Bank(self)
        missing = abs(size_in - size_out)
        if size_in < size_out:
            hidden_states = F.pad(hidden_states, (0, missing))
            bank.up_proj = F.pad(self.up_proj, (0, missing))
        else:
            bank.down_proj = F.pad(self.down_proj, (0, 0, 0, missing))
            bank.down_proj_bias = F.pad(self.down_proj_bias, (0, missing))
        output = VLMoEBiasedExperts.forward(bank, hidden_states, top_k_index, top_k_weights)
        return output[:, :size_out]


@torch.no_grad()
def init_router_or_bank(module: nn.Module, router_std: float) -> bool:
    """Initialize a router or biased experts; return False for any other module.

    Each expert's weights get Xavier's deviation; all biases are zero.
    """
    if isinstance(module, VLMoERouter):
        init.normal_(module.weight, mean=0.0, std=router_std)
        biases = [module.e_score_correction_bias, module.modality_bias]
        if module.allowed_experts is not None:  # not saved
            init.copy_(module.allowed_experts, module.modality_mask())
    elif isinstance(module, VLMoEBiasedExperts):
        for weight in (module.up_proj, module.down_proj):
            init.normal_(weight, mean=0.0, std=(2 / (weight.shape[1] + weight.shape[2])) ** 0.5)
        biases = [module.up_proj_bias, module.down_proj_bias]
    else:
        return False
    for bias in biases:
        if bias is not None:
            init.zeros_(bias)
    return True


class VisionRouting(Routing):
    """Softmax and top-k, with the current values of the config's fields for a place."""

    def __init__(self, config: VLMoEConfig, place: str):
        self.config, self.place = config, place

    @property
    def num_experts_per_tok(self) -> int:  # type: ignore[override]
        """The field's value."""
        return getattr(self.config, f"{self.place}_num_experts_per_tok")

    @property
    def norm_topk_prob(self) -> bool:  # type: ignore[override]
        """The field's value."""
        return getattr(self.config, f"{self.place}_norm_topk_prob")


class VLMoEVisionSparseMoeBlock(nn.Module):
    """A router and its experts in place of an MLP of the tower or of the connector's linears.

    `place` is "vision" or "projector": the start of the names of its fields.
    """

    def __init__(self, experts: VLMoEBiasedExperts, config: VLMoEConfig, place: str):
        super().__init__()
        size_in, routing = experts.up_proj.shape[2], VisionRouting(config, place)
        bias = {"has_selection_bias": config.text_config.router_bias_update_rate != 0}
        self.router = VLMoERouter(size_in, experts.num_experts, routing, **bias)
        self.experts = experts

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(tiles, patches, in) -> (..., out), router logits (..., experts)."""
        tokens = hidden_states.flatten(0, 1)
        router_logits, top_k_weights, top_k_index = self.router(tokens)
        output = self.experts(tokens, top_k_index, top_k_weights)
        per_tile = hidden_states.shape[:2]
        return output.unflatten(0, per_tile), router_logits.unflatten(0, per_tile)


class VLMoEVisionLayer(GradientCheckpointingLayer):
    """A SigLIP or CLIP block, which are alike, with experts in place of its MLP."""

    def __init__(self, dense: SiglipEncoderLayer | CLIPEncoderLayer, config: VLMoEConfig):
        super().__init__()
        self.layer_norm1, self.self_attn = dense.layer_norm1, dense.self_attn
        self.layer_norm2 = dense.layer_norm2
        vision = config.vision_config
        sizes = (vision.hidden_size, vision.intermediate_size, vision.hidden_size)
        experts = VLMoEBiasedExperts(vision, config.vision_num_experts, sizes, vision.hidden_act)
        self.mlp = VLMoEVisionSparseMoeBlock(experts, config, "vision")

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(tiles, patches, channels) -> the same, router logits as its `mlp` returns them."""
        attended, _ = self.self_attn(
            self.layer_norm1(hidden_states), attention_mask=attention_mask, **kwargs
        )
        hidden_states = hidden_states + attended
        output, router_logits = self.mlp(self.layer_norm2(hidden_states))
        return hidden_states + output, router_logits


class VLMoEVisionEncoder(nn.Module):
    """The encoder of a SigLIP or CLIP tower, with some of its layers made sparse."""

    def __init__(self, dense: Any, config: VLMoEConfig):
        super().__init__()
        self.layers = nn.ModuleList(
            VLMoEVisionLayer(layer, config) if config.is_sparse_vision_layer(i) else layer
            for i, layer in enumerate(dense.layers)
        )

    def forward(
        self, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutput:
        """(tiles, patches, channels) -> the same."""
        hidden_states = inputs_embeds
        for layer in self.layers:
            output = layer(hidden_states, attention_mask, **kwargs)
            hidden_states = output[0] if isinstance(output, tuple) else output
        return BaseModelOutput(last_hidden_state=hidden_states)


class _SparseTower(PreTrainedModel):
    """Make a tower of transformers sparse.

    It can also output `router_logits`, one for each sparse layer.
    """

    encoder: Any

    def __init__(self, config: PreTrainedConfig, whole: VLMoEConfig):
        self.router_std = whole.text_config.initializer_range  # for the dense tower's `post_init`
        super().__init__(config)
        self.encoder = VLMoEVisionEncoder(self.encoder, whole)
        self.post_init()

    @classmethod
    def is_custom_code(cls) -> bool:
        """Return False, as `VLMoEPreTrainedModel` does."""
        return False

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        """Return True: transformers' cached answer is inherited from the dense tower."""
        return True

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """Return what transformers does, but "auto" where its default refuses the sizes."""
        sizes = self.config.hidden_size, self.config.intermediate_size
        asked = default_experts(requested_experts, sizes)
        return super().get_correct_experts_implementation(asked)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if not init_router_or_bank(module, self.router_std):
            super()._init_weights(module)


def _records(dense_layer: type[nn.Module], attention: type[nn.Module]) -> dict[str, Any]:
    return {
        "router_logits": OutputRecorder(VLMoEVisionLayer, index=1),
        "hidden_states": [OutputRecorder(dense_layer), OutputRecorder(VLMoEVisionLayer)],
        "attentions": attention,
    }


class VLMoESiglipVisionModel(_SparseTower, SiglipVisionModel):
    """SigLIP's tower with experts."""

    _no_split_modules = (*SiglipVisionModel._no_split_modules, "VLMoEVisionLayer")
    _can_record_outputs = _records(SiglipEncoderLayer, SiglipAttention)


class VLMoECLIPVisionModel(_SparseTower, CLIPVisionModel):
    """CLIP's tower with experts."""

    _no_split_modules = (*CLIPVisionModel._no_split_modules, "VLMoEVisionLayer")
    _can_record_outputs = _records(CLIPEncoderLayer, CLIPAttention)


SPARSE_TOWERS: dict[str, type[_SparseTower]] = {
    tower.config_class.model_type: tower for tower in (VLMoESiglipVisionModel, VLMoECLIPVisionModel)
}


def sparse_vision_blocks(tower: nn.Module, connector: Any) -> list[VLMoEVisionSparseMoeBlock]:
    """Return the blocks with experts of the tower, then of the connector."""
    layers = tower.encoder.layers if isinstance(tower, _SparseTower) else ()
    blocks = [layer.mlp for layer in layers if isinstance(layer, VLMoEVisionLayer)]
    return blocks if connector.mlp is None else [*blocks, connector.mlp]

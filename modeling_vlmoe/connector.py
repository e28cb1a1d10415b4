# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""From the vision tower's output to image tokens of the decoder's width.

Shapes: tiles, patches (of one tile), channels (of the tower), hidden (of the decoder).
"""

import copy
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModel, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_outputs import ModelOutput
from transformers.utils import logging

from ..configuration.configuration_vlmoe import TOWERS_WITH_EXPERTS, VLMoEConfig
from .model_outputs import VLMoEImageFeatures
from .vision_experts import SPARSE_TOWERS, VLMoEConnectorExperts, VLMoEVisionSparseMoeBlock

logger = logging.get_logger(__name__)

TOWERS_WITH_PATCH_MASK = ("idefics3_vision", "smolvlm_vision")


def make_vision_tower(config: VLMoEConfig) -> PreTrainedModel:
    """The tower; with experts of ours where the config says so.

    Experts of its own keep their default implementation: what is chosen for ours may not fit them.
    """
    if config.vision_num_experts:
        tower = SPARSE_TOWERS[config.vision_config.model_type]
        return tower._from_config(config.vision_config, whole=config)
    return AutoModel.from_config(config.vision_config, experts_implementation=None)


def vision_features(
    tower: nn.Module, pixel_values: torch.Tensor, config: VLMoEConfig, **kwargs: Any
) -> tuple[torch.Tensor, ModelOutput]:
    """(tiles, 3, height, width) -> (tiles, patches, channels), what the config selects.

    With it comes the tower's whole output; of its hidden states those selected, unless
    `output_hidden_states` asks for more.
    """
    if config.vision_use_last_hidden_state:
        outputs = tower(pixel_values, return_dict=True, **kwargs)
        features = [outputs.last_hidden_state]
    else:
        layers = config.vision_feature_layers
        kwargs["output_hidden_states"] = kwargs.get("output_hidden_states") or layers
        outputs = tower(pixel_values, return_dict=True, **kwargs)
        features = [outputs.hidden_states[layer] for layer in layers]
    if config.vision_feature_select_strategy == "default":
        features = [feature[:, 1:] for feature in features]
    return torch.cat(features, dim=-1), outputs


def encode_tiles(
    tower: Any, connector: nn.Module, tiles: torch.Tensor, config: VLMoEConfig, **kwargs: Any
) -> VLMoEImageFeatures:
    """(tiles, 3, height, width) -> (tiles, image tokens, hidden), as `pooler_output`.

    With `output_router_logits` the routing of tower and connector comes along.
    """
    record = kwargs.pop("output_router_logits", False)
    if record and config.vision_num_experts:
        kwargs |= {"output_router_logits": True, "output_chosen_experts": True}
    features, outputs = vision_features(tower, tiles.to(tower.dtype), config, **kwargs)
    projected, *routing = _as_tuple(connector(features))
    if record and (config.vision_num_experts or config.projector_num_experts):
        logits, chosen = outputs.get("router_logits", ()), outputs.get("chosen_experts", ())
        if routing:
            logits, chosen = (*logits, routing[0]), (*chosen, routing[1])
    else:
        logits = chosen = None
    return VLMoEImageFeatures(
        last_hidden_state=outputs.last_hidden_state,
        pooler_output=projected,
        hidden_states=outputs.hidden_states,
        attentions=outputs.attentions,
        router_logits=logits,
        chosen_experts=chosen,
    )


def _as_tuple(output: Any) -> tuple[Any, ...]:
    return output if isinstance(output, tuple) else (output,)


def patch_mask(pixel_mask: torch.Tensor, patch_size: int) -> torch.Tensor:
    """(tiles, height, width), 1 for real pixels -> (tiles, rows, columns).

    True where a patch holds a real pixel, as in Idefics3: the `patch_attention_mask` of
    `TOWERS_WITH_PATCH_MASK`. A tile that is all padding, which while compiling is still there,
    counts as whole: attention to nothing would be NaN.
    """
    patches = pixel_mask.unfold(1, patch_size, patch_size).unfold(2, patch_size, patch_size)
    real = patches.flatten(-2).any(-1)  # (tiles, rows, columns)
    return real | ~real.flatten(1).any(-1)[:, None, None]


def blank_image(config: VLMoEConfig, tower: PreTrainedModel) -> torch.Tensor:
    """(1, channels, height, width): zeros of the size, dtype and device that the tower takes."""
    size = pixel_size(config)
    return torch.zeros(1, *size, dtype=tower.dtype, device=tower.device)


def pixel_size(config: VLMoEConfig) -> tuple[int, int, int]:
    """(channels, height, width) of one tile, as the tower's config has it."""
    vision = config.vision_config
    size = vision.image_size
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return getattr(vision, "num_channels", 3), height, width


def expected_pixels(config: VLMoEConfig, any_size: bool) -> tuple[int, int | None, int | None]:
    """(channels, height, width) that the tower takes; None for a size that it leaves open."""
    channels, height, width = pixel_size(config)
    if any_size or config.vision_config.model_type not in TOWERS_WITH_EXPERTS:
        return channels, None, None
    return channels, height, width


class _MetaValuesAreTrue(TorchDispatchMode):
    """On the meta device, answers 1 where code asks for a tensor's value.

    Idefics3's and SmolVLM's towers ask whether their patch mask is all true, and of a whole image
    it is.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return 1
        return func(*args, **(kwargs or {}))


def unused_vision_parameters(config: VLMoEConfig) -> list[str]:
    """Names of the tower's parameters that the selected features do not depend on.

    Found by a backward pass on the meta device, which computes nothing and holds for every tower.
    Left trainable, such parameters never get a gradient, and DistributedDataParallel fails at the
    second step.

    Raises:
        ValueError: the tower cannot be run on pixel values alone.
    """
    vision = config.vision_config
    if config.vision_num_experts:  # the one implementation that has no step on real values only
        config = copy.deepcopy(config)
        config.vision_config._experts_implementation = "batched_mm"
    with torch.device("meta"), torch.enable_grad(), _MetaValuesAreTrue():
        tower = make_vision_tower(config)
        try:
            features, _ = vision_features(tower, blank_image(config, tower), config)
        except TypeError as error:
            raise ValueError(
                f"`vision_config` is of type {vision.model_type!r}, whose tower needs more than "
                f"pixel values ({error}); choose one of fixed resolution, such as SigLIP or CLIP."
            ) from error
        names, parameters = zip(*tower.named_parameters(), strict=True)
        gradients = torch.autograd.grad(features.sum(), parameters, allow_unused=True)
    return [name for name, gradient in zip(names, gradients, strict=True) if gradient is None]


def unused_vision_modules(tower: nn.Module, unused: list[str]) -> list[str]:
    """The parameters `unused`, with one name for a module whose parameters are all unused."""
    names = set()
    for name in unused:
        while (module := name.rpartition(".")[0]) and all(
            f"{module}.{parameter}" in unused
            for parameter, _ in tower.get_submodule(module).named_parameters()
        ):
            name = module
        names.add(name)
    return sorted(names)


def pixel_shuffle(features: torch.Tensor, factor: int) -> torch.Tensor:
    """(tiles, patches, channels) -> (tiles, patches / factor**2, channels * factor**2).

    Each output token holds a square of `factor` x `factor` patches, row by row, as in InternVL and
    Idefics3.
    """
    tiles, patches, channels = features.shape
    side = int(patches**0.5)
    if side * side != patches or side % factor:
        raise ValueError(
            f"pixel_shuffle_factor={factor} needs a square grid of patches whose side it divides; "
            f"got {patches} patches. "
            "Choose another factor, or vision_feature_select_strategy='default' for a tower with a "
            "class token."
        )
    grid = features.view(tiles, side // factor, factor, side // factor, factor, channels)
    return grid.transpose(2, 3).reshape(tiles, patches // factor**2, channels * factor**2)


class VLMoEConnector(nn.Module):
    """Optional pixel shuffle and LayerNorm, then one linear (SmolVLM) or two (LLaVA, InternVL).

    With `projector_num_experts` a router and experts of two linears each take the place of the two
    (CuMo).
    """

    def __init__(self, config: VLMoEConfig):
        super().__init__()
        self.pixel_shuffle_factor = config.pixel_shuffle_factor
        hidden, bias = config.text_config.hidden_size, config.multimodal_projector_bias
        width = (
            config.vision_config.hidden_size
            * len(config.vision_feature_layers)
            * self.pixel_shuffle_factor**2
        )
        self.layer_norm = nn.LayerNorm(width) if config.projector_layer_norm else nn.Identity()
        self.mlp = self.linear_2 = None
        if config.projector_num_experts:
            experts = VLMoEConnectorExperts(
                config,
                config.projector_num_experts,
                (width, hidden, hidden),
                config.projector_hidden_act,
            )
            self.mlp = VLMoEVisionSparseMoeBlock(experts, config, "projector_num_experts_per_tok")
            return
        self.linear_1 = nn.Linear(width, hidden, bias=bias)
        if config.projector_num_layers == 2:
            self.act = ACT2FN[config.projector_hidden_act]
            self.linear_2 = nn.Linear(hidden, hidden, bias=bias)

    def forward(self, features: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """(tiles, patches, channels) -> (tiles, image tokens, hidden).

        With experts also router logits (tiles, image tokens, experts) and the chosen experts.
        """
        if self.pixel_shuffle_factor > 1:
            features = pixel_shuffle(features, self.pixel_shuffle_factor)
        features = self.layer_norm(features)
        if self.mlp is not None:
            return self.mlp(features)
        features = self.linear_1(features)
        return features if self.linear_2 is None else self.linear_2(self.act(features))

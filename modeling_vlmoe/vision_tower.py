# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""The vision tower: how it is made, which of its features are taken, which parameters they use.

Shapes: tiles, patches (of one tile), channels (of the tower).
"""

import copy
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModel, PreTrainedModel
from transformers.modeling_outputs import ModelOutput

from ..configuration.configuration_vlmoe import VLMoEConfig
from ..configuration.tower_facts import tower_facts, tower_image_size
from .vision_experts import SPARSE_TOWERS


def make_vision_tower(config: VLMoEConfig) -> PreTrainedModel:
    """Make the tower, with our experts where the config says so.

    A tower's own experts keep their default implementation: the one chosen for ours may not fit.
    """
    if config.vision_num_experts:
        tower = SPARSE_TOWERS[config.vision_config.model_type]
        return tower._from_config(config.vision_config, whole=config)
    return AutoModel.from_config(config.vision_config, experts_implementation=None)


def vision_features(
    tower: nn.Module, pixel_values: torch.Tensor, config: VLMoEConfig, **kwargs: Any
) -> tuple[torch.Tensor, ModelOutput]:
    """(tiles, 3, height, width) -> (tiles, patches, channels), as the config selects them.

    Return the tower's whole output, too; of its hidden states only the selected ones, unless
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


def patch_mask(pixel_mask: torch.Tensor, patch_size: int) -> torch.Tensor:
    """(tiles, height, width), 1 for real pixels -> (tiles, rows, columns).

    True where a patch holds a real pixel, as in Idefics3. A tile that is all padding, which is
    still there while compiling, counts as whole: attention to nothing would be NaN.
    """
    patches = pixel_mask.unfold(1, patch_size, patch_size).unfold(2, patch_size, patch_size)
    real = patches.flatten(-2).any(-1)  # (tiles, rows, columns)
    return real | ~real.flatten(1).any(-1)[:, None, None]


def tile_size(config: VLMoEConfig) -> tuple[int, int, int]:
    """Return (channels, height, width) of one tile, as the tower's config has it."""
    vision = config.vision_config
    return getattr(vision, "num_channels", 3), *tower_image_size(vision)


def expected_pixels(config: VLMoEConfig, any_size: bool) -> tuple[int, int | None, int | None]:
    """Return the (channels, height, width) that the tower takes; None for an open size."""
    size = tile_size(config)
    is_fixed = tower_facts(config.vision_config).has_fixed_size and not any_size
    return size if is_fixed else (size[0], None, None)


def blank_image(config: VLMoEConfig, tower: PreTrainedModel) -> torch.Tensor:
    """Return zeros of the size, dtype and device that the tower takes."""
    return torch.zeros(1, *tile_size(config), dtype=tower.dtype, device=tower.device)


class _MetaValuesAreTrue(TorchDispatchMode):
    """Answer 1 where code asks for the value of a tensor on the meta device.

    Idefics3's and SmolVLM's towers ask whether their patch mask is all true; for a whole image it
    is.
    """

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> object:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return 1
        return func(*args, **(kwargs or {}))


_unused_parameters: dict[str, tuple[str, ...]] = {}  # by the fields that they follow from


def unused_vision_parameters(config: VLMoEConfig) -> list[str]:
    """Name the tower's parameters that the selected features do not depend on.

    Left trainable, such parameters never get a gradient, and DistributedDataParallel fails at the
    second step. They are found in the graph of a forward pass on the meta device, which computes
    nothing and works for every tower; once for each configuration. Raise `ValueError` for a tower
    that cannot be run on pixel values alone.
    """
    fields = {name: value for name, value in vars(config).items() if name.startswith("vision_")}
    key = repr(fields | {"vision_config": config.vision_config.to_dict()})
    if key not in _unused_parameters:
        _unused_parameters[key] = _find_unused_parameters(config)
    return list(_unused_parameters[key])


def _find_unused_parameters(config: VLMoEConfig) -> tuple[str, ...]:
    if config.vision_num_experts:  # the one implementation that has no step on real values only
        config = copy.deepcopy(config)
        config.vision_config._experts_implementation = "batched_mm"
        config.vision_norm_topk_prob = False  # of one expert a router would warn
    with (
        torch.device("meta"),
        torch.inference_mode(False),
        torch.enable_grad(),
        _MetaValuesAreTrue(),
    ):
        tower = make_vision_tower(config)
        try:
            features, _ = vision_features(tower, blank_image(config, tower), config)
        except TypeError as error:
            raise ValueError(
                f"`vision_config` is of type {tower.config.model_type!r}, whose tower needs more "
                f"than pixel values ({error}); choose one of fixed resolution, such as SigLIP or "
                "CLIP."
            ) from error
    seen, waiting, used = set(), [features.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        used.add(getattr(node, "variable", None))  # that of a leaf
        waiting += [before for before, _ in node.next_functions]
    return tuple(name for name, parameter in tower.named_parameters() if parameter not in used)


def unused_vision_modules(tower: nn.Module, unused: list[str]) -> list[str]:
    """Return `unused` with one name for a module whose parameters are all unused."""
    names = set()
    for name in unused:
        while (module := name.rpartition(".")[0]) and all(
            f"{module}.{parameter}" in unused
            for parameter, _ in tower.get_submodule(module).named_parameters()
        ):
            name = module
        names.add(name)
    return sorted(names)

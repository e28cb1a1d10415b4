# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""How many training tokens each expert got, of models with a selection bias.

The counts are integers on the model's device, of the tokens of one optimizer step without padding.
They belong to no module: buffers would be saved, and DistributedDataParallel would overwrite them
with rank 0's.
"""

from collections import defaultdict
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..modeling_vlmoe.modeling_vlmoe_text import real_tokens
from .kinds import PADDING, token_kinds, vision_bank_tokens
from .record import Inputs, Listener, Routing, find_backbone
from .routed_layers import Place, RoutedLayer, is_vlmoe, routed_layers, selection_bias

_TILED = ("tower", "connector")


class SelectionLoads:
    """Counts the choices of a model whose routers have a selection bias, until `remove`.

    Args:
        model: of transformers, or a wrapper around it; not yet compiled.
        listen: hand the passes over; without, a `Listener` of the caller's does so.

    Attributes:
        layers: those with a bias.
        loads: (experts,) int64 for each of them, of this rank; None before the first pass.

    Raises:
        ValueError: the model has no experts, or its routers have no selection bias.
    """

    def __init__(self, model: nn.Module, listen: bool = True):
        every = routed_layers(model)
        self.layers = [layer for layer in every if selection_bias(layer) is not None]
        if not self.layers:
            raise ValueError(
                f"{type(find_backbone(model)).__name__} has no selection bias that could be moved: "
                f"{type(every[0].router).__name__} chooses by its scores alone, and one that was "
                "added would be unknown to other programs. Balance it by `SparseLoss`, or take a "
                "family with a bias: DeepSeek-V3, GLM-4-MoE and GLM-4V-MoE, ERNIE-4.5-VL, "
                "MiniMax-M3-VL, LFM2-MoE, VLMoE with `router_bias_update_rate`."
            )
        self.loads: list[torch.Tensor | None] = [None] * len(self.layers)
        self._positions = {layer.name: i for i, layer in enumerate(self.layers)}
        self._chosen: dict[int, torch.Tensor] = {}
        self._real = torch.ones(())
        self._is_vision: torch.Tensor | None = None
        self._config = find_backbone(model).config.get_text_config()
        self._is_vlmoe = is_vlmoe(model)
        self._listener = Listener(model, [self], self.layers) if listen else None

    @property
    def rate(self) -> float | None:
        """How far a VLMoE's biases move, by the current value of its config; None of others."""
        return self._config.router_bias_update_rate if self._is_vlmoe else None

    def biases(self) -> list[torch.Tensor]:
        """(experts,) or (1, experts) each, the model's own tensors."""
        return [bias for bias in map(selection_bias, self.layers) if bias is not None]

    def widen(self) -> bool:
        """Make biases of a lower precision fp32, in place; return whether there were any."""
        narrow = [bias for bias in self.biases() if bias.dtype != torch.float32]
        for bias in narrow:
            bias.data = bias.data.float()
        return bool(narrow)

    def forget(self) -> None:
        """Count from zero."""
        for load in self.loads:
            if load is not None:
                load.zero_()

    def remove(self) -> None:
        """Stop counting."""
        if self._listener is not None:
            self._listener.remove()

    def begin(self, backbone: PreTrainedModel, inputs: Inputs) -> bool:
        """Count passes of training alone."""
        self._chosen = {}
        if not (backbone.training and torch.is_grad_enabled()) or self.rate == 0:
            return False
        if self._is_vlmoe:  # takes any mask
            embeds = inputs.get("inputs_embeds")
            tokens = inputs["input_ids"] if embeds is None else embeds
            self._real = real_tokens(inputs.get("attention_mask"), tokens).flatten()
        else:
            self._real = (token_kinds(inputs, backbone.config) != PADDING).flatten()
        self._is_vision = vision_bank_tokens(inputs)
        return True

    def read(self, layer: RoutedLayer, routing: Routing) -> None:
        """Keep the choice until the end of the pass."""
        if (position := self._positions.get(layer.name)) is not None:
            self._chosen[position] = routing.chosen.detach()

    def read_outside(self, layer: RoutedLayer, routing: Routing) -> None:
        """Leave out what checkpointing computes again."""

    @torch.no_grad()
    def end(self, output: object) -> None:
        """Add the pass to the loads, all layers of the same tokens at once."""
        together: dict[tuple[Place, bool | None, int], list[int]] = defaultdict(list)
        for i in self._chosen:
            layer = self.layers[i]
            together[layer.place, self._bank(layer), layer.num_experts].append(i)
        for (place, bank, experts), positions in together.items():
            same = [self._chosen[i] for i in positions]
            device = same[0].device  # layers may lie on several
            chosen = torch.stack([each.to(device) for each in same])  # (layers, tokens, k)
            if place in _TILED and self._is_vlmoe:
                times = _tile_counts(chosen.shape[1], output)
            else:
                times = self._of_bank(bank)
            counts = times.to(device).expand(chosen.shape[-1], -1).T.expand_as(chosen).flatten(1)
            load = torch.zeros(len(positions), experts, dtype=torch.long, device=device)
            load.scatter_add_(1, chosen.flatten(1), counts.contiguous())
            for i, of_layer in zip(positions, load, strict=True):
                self._add(i, of_layer.to(self._chosen[i].device))
        self._chosen = {}

    def _add(self, position: int, load: torch.Tensor) -> None:
        before = self.loads[position]
        if before is None or before.device != load.device:
            self.loads[position] = load.clone()
        else:
            before.add_(load)

    def _bank(self, layer: RoutedLayer) -> bool | None:
        """Whether a layer sees tokens of vision alone; None: all tokens."""
        if self._is_vision is None or not layer.is_one_of_two:
            return None
        return layer.place == "vision"

    def _of_bank(self, bank: bool | None) -> torch.Tensor:
        """(tokens,) long: 1 for real tokens, 0 for padding, of those that the bank sees."""
        real = self._real
        if bank is not None and self._is_vision is not None:
            real = real[self._is_vision.flatten() == bank]
        return real.long()


def _tile_counts(tokens: int, output: Any) -> torch.Tensor:
    """(tokens,) long: how often rows show the tile of each token; `output` of VLMoE's backbone."""
    if output.shown_tiles is None:  # features that were given
        return torch.zeros(tokens, dtype=torch.long)
    tiles = len(output.vision_router_logits[0])
    tile, row = output.shown_tiles
    times = torch.zeros(tiles, dtype=torch.long, device=tile.device)
    times = times.index_add(0, tile, (row >= 0).long())
    return times[:, None].expand(-1, tokens // tiles).flatten()

# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Count which experts each kind of token is routed to, layer by layer, and the router's entropy.

Each forward pass, also those of `generate`, is added to counters of a few numbers per layer, kind
of token and expert, on the model's device and without waiting for it. Neither logits nor choices
are kept beyond the forward pass; padding is left out. The counters belong to no module:
DistributedDataParallel would overwrite buffers with those of rank 0.

Experts of VLMoE's vision tower and connector are counted, too: the tiles of images that rows show,
each once for each time it is encoded, also where `generate` encodes them before the backbone's
forward pass. Recomputation under gradient checkpointing has a gradient; outside of the forward pass
nothing counts that has one.

Shapes: L sparse layers, M kinds of tokens, E experts, k experts per token, T tokens.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..configuration.configuration_vlmoe_text import Modality
from ..hub.json_files import JsonObject
from .kinds import KINDS, PADDING, Inputs, has_video, token_kinds, vision_bank_tokens
from .record import Listener, Routing, find_backbone
from .routed_layers import RoutedLayer, routed_layers, without_wrappers
from .scoring import Kind, router_scoring

DEAD_BELOW = 0.1  # of a fair share


@dataclass
class ExpertLoad:
    """Counters of the routing, and the figures that follow from them.

    A fair share of a layer's assignments is `1 / E`, or where modalities have experts of their own
    what an expert gets if each modality is spread evenly over those that it may use. In a layer
    that saw no token of a modality the shares are 0 and what follows from them is None.

    Attributes:
        layers: the index of each sparse layer, of the decoder or of the tower; 0 for the connector.
        top_k: experts per token.
        assignments: (L, M, E) long: how often tokens of each kind were sent to each expert. Kinds
            are text, image and, of models that take videos, video, as in `KINDS`.
        entropy_sums: (L, M): entropies of the routing distributions, in nats, summed over tokens;
            NaN where the distribution does not follow from the router's output.
        allowed: (M, E) bool: which experts each kind of token may use.
        vision: the same of other places with experts, by name: `"tower"`, `"connector"`, and the
            bank `"vision"` that ERNIE-4.5-VL has for images and videos; no tokens of text.
    """

    layers: tuple[int, ...]
    top_k: int
    assignments: torch.Tensor
    entropy_sums: torch.Tensor
    allowed: torch.Tensor
    vision: dict[str, "ExpertLoad"] = field(default_factory=dict)

    @property
    def image_counts(self) -> torch.Tensor:
        """Assignments of image tokens, (L, E) long, on the CPU."""
        return self.assignments[:, Modality.image].clone().cpu()

    @property
    def text_counts(self) -> torch.Tensor:
        """Assignments of text tokens, (L, E) long, on the CPU."""
        return self.assignments[:, Modality.text].clone().cpu()

    @property
    def counts(self) -> torch.Tensor:
        """Assignments of all tokens, (L, E) long, on the CPU."""
        return self.assignments.sum(1).cpu()

    def reset(self) -> None:
        """Start again from zero."""
        self.assignments.zero_()
        self.entropy_sums.zero_()
        for load in self.vision.values():
            load.reset()

    def summed_over_ranks(self) -> "ExpertLoad":
        """Return the counters of all processes together; all of them must call this."""
        distributed = torch.distributed
        if not (distributed.is_available() and distributed.is_initialized()):
            return self
        assignments, entropy_sums = self.assignments.clone(), self.entropy_sums.clone()
        distributed.all_reduce(assignments)
        distributed.all_reduce(entropy_sums)
        vision = {place: load.summed_over_ranks() for place, load in self.vision.items()}
        counted = assignments, entropy_sums
        return ExpertLoad(self.layers, self.top_k, *counted, self.allowed, vision)

    def as_dict(self) -> JsonObject:
        """Return figures for a JSON file.

        Lists have one item per sparse layer, in the order of `layers`. Those under `text`, `image`,
        `video` and `all` are of the tokens of one kind, or of all:
        - `tokens`: how many were counted
        - `router_entropy`: mean over tokens of the entropy of the routing distribution (the
          softmax, or the sigmoid scores over their sum; without selection bias), in nats: 0 if
          sure, log(E) if undecided
        - `load_entropy`: entropy of the shares, in nats: log(E) if even, log(k) if collapsed
        - `max_violation`: largest share over fair share, less 1
          (https://arxiv.org/abs/2408.15664, section 2): 0 if even, E / k - 1 if collapsed
        - `dead_experts`: experts with less than a tenth of their fair share

        Shares are `(L, E)`. `overlap` is the part of the load that image and text tokens have in
        common, the sum over experts of the smaller share: 1 if they use the experts alike, 0 if
        they share none.

        `vision` holds the same figures of the other places with experts.
        """
        by_modality = self.assignments.double().cpu()
        counts = torch.cat([by_modality, by_modality.sum(1, keepdim=True)], 1)  # (L, M + 1, E)
        entropies = self.entropy_sums.double().cpu()
        entropies = torch.cat([entropies, entropies.sum(1, keepdim=True)], 1)  # (L, M + 1)
        experts, tokens = counts.shape[-1], counts.sum(-1) / self.top_k
        shares, fair = load_shares(counts), self._fair_shares(tokens)
        over_fair = torch.where(fair > 0, shares / fair, 0.0)
        figures = {
            "router_entropy": entropies / tokens,
            "load_entropy": torch.special.entr(shares).sum(-1),
            "max_violation": over_fair.amax(-1) - 1,
            "dead_experts": ((fair > 0) & (over_fair < DEAD_BELOW)).sum(-1),
        }
        overlap = torch.minimum(shares[:, 0], shares[:, 1]).sum(-1)
        kinds = (*KINDS[: by_modality.shape[1]], "all")
        vision = {place: load.as_dict() for place, load in self.vision.items()}
        return {
            "layers": list(self.layers),
            "fair_share": 1 / experts,
            **{f"{kind}_share": shares[:, i].tolist() for i, kind in enumerate(kinds)},
            "max_over_mean": over_fair[:, -1].amax(-1).tolist(),
            "unused_experts": (counts[:, -1] == 0).sum(-1).tolist(),
            "tokens": {kind: tokens[:, i].long().tolist() for i, kind in enumerate(kinds)},
            **{
                name: {kind: _known(of[:, i], tokens[:, i]) for i, kind in enumerate(kinds)}
                for name, of in figures.items()
            },
            "overlap": _known(overlap, tokens[:, :2].amin(-1)),
            **({"vision": vision} if vision else {}),
        }

    def _fair_shares(self, tokens: torch.Tensor) -> torch.Tensor:
        """(L, M + 1) numbers of tokens -> the same by expert, each kind even over those allowed."""
        allowed = self.allowed.double().cpu()
        even = (allowed / allowed.sum(-1, keepdim=True)).expand(len(tokens), -1, -1)  # (L, M, E)
        mix = load_shares(tokens[:, :-1])[..., None]  # (L, M, 1)
        return torch.cat([even, (even * mix).sum(1, keepdim=True)], 1)


def load_shares(counts: torch.Tensor) -> torch.Tensor:
    """Turn counts `(..., E)` into shares of each layer's assignments.

    A layer that saw no token has zeros.
    """
    return counts.double() / counts.sum(-1, keepdim=True).clamp(min=1)


def _known(values: torch.Tensor, tokens: torch.Tensor) -> list[float | None]:
    """(L,) values; None where there was no token, or where the logits were not finite."""
    is_known = (tokens > 0) & values.isfinite()
    pairs = zip(values.tolist(), is_known.tolist(), strict=True)
    return [value if known else None for value, known in pairs]


@contextmanager
def record_expert_load(model: nn.Module, training_only: bool = False) -> Iterator[ExpertLoad]:
    """Record the load of every forward pass of `model` inside the block.

    Args:
        model: a VLMoE or another sparse model of transformers, also inside
            DistributedDataParallel or a PEFT model.
        training_only: leave out forward passes in evaluation mode and those without gradient.

    Yields:
        An `ExpertLoad` that grows with each forward pass.

    Raises:
        ValueError: the model has no sparse layer, or computes its experts in a way of its own.

    Example:
        >>> with record_expert_load(model) as load:
        ...     model(**batch)
        >>> load.image_counts.shape
        torch.Size([2, 8])
    """
    layers = routed_layers(model)
    reader = LoadReader(find_backbone(model), layers, training_only)
    with Listener(model, [reader], layers):
        yield reader.load


class _Place:
    """The counters of one place, and the choices of the forward pass so far."""

    def __init__(self, layers: list[RoutedLayer], kinds: int):
        self.layers = layers
        device, bins = next(layers[0].experts.parameters()).device, PADDING + 1
        experts = layers[0].num_experts
        sums_dtype = torch.float32 if device.type == "mps" else torch.float64
        self._counts = torch.zeros(len(layers), bins, experts, dtype=torch.long, device=device)
        self._sums = torch.zeros(len(layers), bins, dtype=sums_dtype, device=device)
        self._first_bins = torch.arange(len(layers), device=device)[:, None] * bins  # (L, 1)
        self.load = ExpertLoad(
            layers=tuple(layer.index for layer in layers),
            top_k=layers[0].top_k,
            assignments=self._counts[:, :kinds],
            entropy_sums=self._sums[:, :kinds],
            allowed=_allowed_experts(layers[0], kinds),
        )
        self._scoring = _scoring(layers[0])
        self.chosen: list[torch.Tensor] = []  # of each layer so far, (T, k)
        self._entropies: list[torch.Tensor] = []  # of each layer so far, (T,)

    def forget(self) -> None:
        """Nothing was chosen yet."""
        self.chosen, self._entropies = [], []

    @torch.no_grad()  # else recomputing, which skips this, would save fewer tensors
    def note(self, routing: Routing) -> None:
        """Keep the choice and the entropy of one bank."""
        self._entropies.append(_entropies(routing, self._scoring))
        self.chosen.append(routing.chosen)

    @torch.no_grad()
    def count(self, kinds: torch.Tensor) -> None:
        """Count the choices so far; `kinds` (T,) as `token_kinds` gives them."""
        device = self._counts.device
        bins = self._first_bins + kinds.to(device)  # (L, T)
        chosen = torch.stack([of_layer.to(device) for of_layer in self.chosen])  # (L, T, k)
        entropies = torch.stack([of_layer.to(device) for of_layer in self._entropies])  # (L, T)
        self.forget()
        cells = (chosen + bins[..., None] * self._counts.shape[-1]).flatten()
        self._counts.view(-1).scatter_add_(0, cells, torch.ones_like(cells))
        self._sums.view(-1).scatter_add_(
            0, bins.flatten(), entropies.to(self._sums.dtype).flatten()
        )


class LoadReader:
    """Counts the routing of each forward pass; a `Reader`.

    Args:
        backbone: of the model.
        layers: its sparse layers.
        training_only: as in `record_expert_load`.
    """

    def __init__(
        self, backbone: PreTrainedModel, layers: list[RoutedLayer], training_only: bool = False
    ):
        kinds = len(KINDS) if has_video(backbone.config) else len(KINDS) - 1
        by_place: dict[str, list[RoutedLayer]] = {}
        for layer in layers:
            by_place.setdefault(layer.place, []).append(layer)
        self._places = {name: _Place(of, kinds) for name, of in by_place.items()}
        loads: dict[str, ExpertLoad] = {name: of.load for name, of in self._places.items()}
        self.load = loads.pop("decoder") if "decoder" in loads else _no_layers()
        self.load.vision = loads
        self._training_only = training_only
        self._kinds = torch.empty(0)
        self._vision_tokens: torch.Tensor | None = None

    def begin(self, backbone: PreTrainedModel, inputs: Inputs) -> bool:
        """Find the kinds of the tokens."""
        for place in self._places.values():
            place.forget()
        if self._training_only and not (backbone.training and torch.is_grad_enabled()):
            return False
        self._kinds = token_kinds(inputs, backbone.config).flatten()
        self._vision_tokens = vision_bank_tokens(inputs)
        return True

    def read(self, layer: RoutedLayer, routing: Routing) -> None:
        """Keep a choice until the end of the forward pass."""
        self._places[layer.place].note(routing)

    def read_outside(self, layer: RoutedLayer, routing: Routing) -> None:
        """Count images that are encoded before the forward pass."""
        if (
            self._training_only
            or torch.is_grad_enabled()
            or layer.place not in ("tower", "connector")
        ):
            return
        place = self._places[layer.place]
        place.note(routing)
        if len(place.chosen) == len(place.layers):
            place.count(torch.full((len(place.chosen[0]),), Modality.image.value))

    def end(self, output: object) -> None:
        """Count the forward pass."""
        for name, place in self._places.items():
            if not place.chosen:
                continue  # no image, no token of this bank
            if name in ("tower", "connector"):
                place.count(_tile_kinds(len(place.chosen[0]), output))
            else:
                place.count(self._kinds_of_bank(name, len(place.chosen[0])))

    def _kinds_of_bank(self, name: str, tokens: int) -> torch.Tensor:
        """(T,): the kinds of the tokens that a bank of the decoder got."""
        if tokens == len(self._kinds) or self._vision_tokens is None:
            return self._kinds
        is_vision = self._vision_tokens.flatten().to(self._kinds.device)
        return self._kinds[is_vision if name == "vision" else ~is_vision]


def _no_layers() -> ExpertLoad:
    """Return the load of a decoder without experts."""
    kinds = len(Modality)
    none = torch.zeros(0, kinds, 1, dtype=torch.long)
    allowed = torch.ones(kinds, 1, dtype=torch.bool)
    return ExpertLoad((), 1, none, none[..., 0].double(), allowed)


def _allowed_experts(layer: RoutedLayer, kinds: int) -> torch.Tensor:
    """(M, E) bool: which experts each kind of token may use."""
    allowed = getattr(layer.router, "allowed_experts", None)  # of VLMoE, by modality
    if allowed is None:
        return torch.ones(kinds, layer.num_experts, dtype=torch.bool)
    return allowed.cpu()


def _scoring(layer: RoutedLayer) -> Kind | None:
    """Return how scores follow from a router's output; None if they do not."""
    own = getattr(without_wrappers(layer.router), "scoring_func", None)  # of VLMoE
    if own in ("softmax", "sigmoid"):
        return own
    try:
        return router_scoring(layer).kind
    except ValueError:
        return None


def _entropies(routing: Routing, scoring: Kind | None) -> torch.Tensor:
    """(T,): the entropy of each token's routing distribution, in nats."""
    logits = routing.logits
    if logits is None or scoring is None:
        return torch.full((len(routing.chosen),), torch.nan, device=routing.chosen.device)
    if scoring == "softmax":  # over few experts several times faster than `softmax`
        scores = (logits - logits.amax(-1, keepdim=True)).exp()
    else:
        scores = logits.sigmoid() if scoring == "sigmoid" else logits
    probabilities = scores / scores.sum(-1, keepdim=True)
    return torch.special.entr(probabilities).sum(-1)


def _tile_kinds(tokens: int, output: Any) -> torch.Tensor:
    """(tokens,): `PADDING` for tokens of tiles that no row shows, image for others.

    In evaluation there are no such tiles.
    """
    image = Modality.image.value
    if getattr(output, "shown_tiles", None) is None:
        return torch.full((tokens,), image)
    (tile, row), tiles = output.shown_tiles, len(output.vision_router_logits[0])
    kinds = torch.full((tiles,), PADDING, device=tile.device)
    kinds = kinds.scatter_reduce(0, tile, torch.where(row >= 0, image, PADDING), "amin")
    return kinds.repeat_interleave(tokens // tiles)

# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Which experts image and text tokens are routed to, layer by layer, and how sure the router is.

Forward hooks add each forward, also those of `generate`, to counters of a few numbers per layer,
modality and expert, on the model's device and without waiting for it. Neither logits nor choices
are kept beyond the forward; padding is left out. Counting takes place between the start and the
end of the backbone's forward, so that what checkpointing computes again in the backward pass,
re-entrant or not, counts once. The counters belong to no module: DistributedDataParallel would
overwrite buffers with those of rank 0.

Experts of the vision tower and of the connector are counted, too: the tiles of images that rows
show, each once for each time it is encoded, also where `generate` encodes them before the
backbone's forward. What checkpointing computes again has a gradient; there nothing counts that has.

Under torch.compile the hooks that are there when the model is first traced become part of its one
graph; hooks placed on a model that is compiled already are not called, as with any hook.

Shapes: L sparse layers, E experts, k experts per token, T tokens (batch * length).
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from ..configuration.configuration_vlmoe_text import MODALITIES, Modality

BACKBONE_CLASS, ROUTER_CLASS = "VLMoEModel", "VLMoERouter"  # by name: also those of Hub code
PADDING = len(Modality)  # the kind of a token that is of no modality
PLACES = {  # where the name of a router has the index of its layer
    "decoder": re.compile(r"\blanguage_model\.layers\.(\d+)\."),
    "tower": re.compile(r"\bvision_tower\..*\blayers\.(\d+)\."),
    "connector": re.compile(r"\bmulti_modal_projector\.()"),
}
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
        assignments: (L, 2, E) long: how often text and image tokens were sent to each expert; the
            order is that of `Modality`, as below.
        entropy_sums: (L, 2): entropies of the routing distributions, in nats, summed over tokens.
        allowed: (2, E) bool: which experts text and image tokens may use.
        vision: the same of `"tower"` and `"connector"`, for those with experts; no tokens of text.
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
        """The counters of all processes together, the same on each; all of them must call this."""
        distributed = torch.distributed
        if not (distributed.is_available() and distributed.is_initialized()):
            return self
        assignments, entropy_sums = self.assignments.clone(), self.entropy_sums.clone()
        distributed.all_reduce(assignments)
        distributed.all_reduce(entropy_sums)
        vision = {place: load.summed_over_ranks() for place, load in self.vision.items()}
        counted = assignments, entropy_sums
        return ExpertLoad(self.layers, self.top_k, *counted, self.allowed, vision)

    def as_dict(self) -> dict[str, Any]:
        """Figures for a JSON file.

        Lists have one item per sparse layer, in the order of `layers`. Those under `image`, `text`
        and `all` are of the tokens of one modality, or of both:
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

        `vision` holds the same figures of `tower` and `connector`, for those with experts.
        """
        by_modality = self.assignments.double().cpu()
        counts = torch.cat([by_modality, by_modality.sum(1, keepdim=True)], 1)  # (L, 3, E)
        entropies = self.entropy_sums.double().cpu()
        entropies = torch.cat([entropies, entropies.sum(1, keepdim=True)], 1)  # (L, 3)
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
        kinds = (*MODALITIES, "all")
        vision = {place: load.as_dict() for place, load in self.vision.items()}
        return {
            "layers": list(self.layers),
            "fair_share": 1 / experts,
            **{f"{kind}_share": shares[:, i].tolist() for i, kind in enumerate(kinds)},
            "max_over_mean": over_fair[:, 2].amax(-1).tolist(),
            "unused_experts": (counts[:, 2] == 0).sum(-1).tolist(),
            "tokens": {kind: tokens[:, i].long().tolist() for i, kind in enumerate(kinds)},
            **{
                name: {kind: _known(of[:, i], tokens[:, i]) for i, kind in enumerate(kinds)}
                for name, of in figures.items()
            },
            "overlap": _known(overlap, tokens[:, :2].amin(-1)),
            **({"vision": vision} if vision else {}),
        }

    def _fair_shares(self, tokens: torch.Tensor) -> torch.Tensor:
        """(L, 3) numbers of tokens -> (L, 3, E), each modality evenly over what it may use."""
        allowed = self.allowed.double().cpu()
        even = (allowed / allowed.sum(-1, keepdim=True)).expand(len(tokens), -1, -1)  # (L, 2, E)
        mix = load_shares(tokens[:, :2])[..., None]  # (L, 2, 1)
        return torch.cat([even, (even * mix).sum(1, keepdim=True)], 1)


def load_shares(counts: torch.Tensor) -> torch.Tensor:
    """Counts `(..., E)` to the share of its layer's assignments that each expert got; zeros where a
    layer saw no token."""
    return counts.double() / counts.sum(-1, keepdim=True).clamp(min=1)


def _known(values: torch.Tensor, tokens: torch.Tensor) -> list[float | None]:
    """(L,) values; None where there was no token, or where the logits were not finite."""
    is_known = (tokens > 0) & values.isfinite()
    pairs = zip(values.tolist(), is_known.tolist(), strict=True)
    return [value if known else None for value, known in pairs]


@contextmanager
def record_expert_load(model: nn.Module, training_only: bool = False) -> Iterator[ExpertLoad]:
    """Record the routing of every forward of `model` inside the block.

    Args:
        model: a VLMoE, also inside DistributedDataParallel or a PEFT model.
        training_only: leave out forwards in evaluation mode and those without gradient.

    Yields:
        An `ExpertLoad` that grows with each forward.

    Raises:
        ValueError: the model has no sparse layer.

    Example:
        >>> with record_expert_load(model) as load:
        ...     model(**batch)
        >>> load.image_counts.shape
        torch.Size([2, 8])
    """
    recorder = _LoadRecorder(model, training_only)
    try:
        yield recorder.load
    finally:
        recorder.remove()


def sparse_routers(model: nn.Module, place: str = "decoder") -> dict[int, nn.Module]:
    """The router of each sparse layer by the layer's index.

    Args:
        model: as in `record_expert_load`.
        place: `"decoder"`, `"tower"` or `"connector"`, whose only layer is 0.
    """
    path = PLACES[place]
    return {
        int(match[1] or 0): module
        for name, module in model.named_modules()
        if type(module).__name__ == ROUTER_CLASS and (match := path.search(name))
    }


def has_experts(model: nn.Module) -> bool:
    """Whether any layer of decoder, tower or connector is sparse."""
    return any(sparse_routers(model, place) for place in PLACES)


def find_backbone(model: nn.Module) -> nn.Module:
    """The module whose forward is that of tower, connector and decoder.

    Raises:
        ValueError: there is none, or it has no sparse layer.
    """
    backbone = next((m for m in model.modules() if type(m).__name__ == BACKBONE_CLASS), None)
    if backbone is None or not has_experts(backbone):
        raise ValueError(
            f"{type(model).__name__} has no {BACKBONE_CLASS} with a {ROUTER_CLASS}: "
            "it has no experts."
        )
    return backbone


class _PlaceRecorder:
    """The routers of one place: what they chose in the forward so far, and the counters."""

    def __init__(self, routers: dict[int, nn.Module]):
        router: Any = next(iter(routers.values()))
        self.routers = routers
        device, bins = router.weight.device, len(MODALITIES) + 1  # one for padding, never read
        sums_dtype = torch.float32 if device.type == "mps" else torch.float64
        self._counts = torch.zeros(
            len(routers), bins, router.weight.shape[0], dtype=torch.long, device=device
        )
        self._sums = torch.zeros(len(routers), bins, dtype=sums_dtype, device=device)
        self._first_bins = torch.arange(len(routers), device=device)[:, None] * bins  # (L, 1)
        self.load = ExpertLoad(
            layers=tuple(routers),
            top_k=router.top_k,
            assignments=self._counts[:, :-1],
            entropy_sums=self._sums[:, :-1],
            allowed=_allowed_experts(router),
        )
        self._is_softmax = router.scoring_func == "softmax"
        self.chosen: list[torch.Tensor] = []  # of each layer so far, (T, k)
        self._entropies: list[torch.Tensor] = []  # of each layer so far, (T,)

    def forget(self) -> None:
        """Nothing was chosen yet."""
        self.chosen, self._entropies = [], []

    @torch.no_grad()  # else recomputing, which skips this, would save fewer tensors
    def note(self, output: tuple) -> None:
        """Keep what a router returned."""
        logits, _, chosen = output  # (T, E), (T, k), (T, k)
        if self._is_softmax:  # over few experts several times faster than `softmax`
            scores = (logits - logits.amax(-1, keepdim=True)).exp()
        else:
            scores = logits.sigmoid()
        probabilities = scores / scores.sum(-1, keepdim=True)
        self._entropies.append(torch.special.entr(probabilities).sum(-1))
        self.chosen.append(chosen)

    @torch.no_grad()
    def count(self, kinds: torch.Tensor) -> None:
        """Count what was kept; `kinds` (T,) as `token_kinds` gives them."""
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


class _LoadRecorder:
    """Hooks on the backbone, which tell what each position holds and count when all layers have
    run, and on the routers, which hand over their choices.

    The backbone, since PEFT calls its base model's `forward` past all hooks.
    """

    def __init__(self, model: nn.Module, training_only: bool):
        backbone = find_backbone(model)
        routers = {place: sparse_routers(model, place) for place in PLACES}
        self._places = {place: _PlaceRecorder(of) for place, of in routers.items() if of}
        loads: dict[str, ExpertLoad] = {name: of.load for name, of in self._places.items()}
        self.load = loads.pop("decoder") if "decoder" in loads else _no_layers()
        self.load.vision = loads
        self._training_only = training_only
        self._kinds: torch.Tensor | None = None  # (T,), in a forward
        self._in_forward = False
        self._handles = [
            backbone.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            *(
                router.register_forward_hook(partial(self._after_router, name))
                for name, place in self._places.items()
                for router in place.routers.values()
            ),
            backbone.register_forward_hook(self._after_forward),
        ]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _before_forward(self, backbone: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        self._kinds, self._in_forward = None, True
        for place in self._places.values():
            place.forget()
        if self._training_only and not (backbone.training and torch.is_grad_enabled()):
            return
        inputs = {"input_ids": args[0]} | kwargs if args else kwargs
        self._kinds = token_kinds(inputs, backbone.config).flatten()

    def _after_router(self, name: str, router: nn.Module, args: tuple, output: tuple) -> None:
        place = self._places[name]
        if self._in_forward:
            if self._kinds is not None:
                place.note(output)
        elif not (self._training_only or torch.is_grad_enabled() or name == "decoder"):
            place.note(output)  # images encoded before the forward
            if len(place.chosen) == len(place.routers):
                place.count(torch.full((len(place.chosen[0]),), Modality.image.value))

    def _after_forward(self, backbone: nn.Module, args: tuple, output: Any) -> None:
        kinds, self._kinds, self._in_forward = self._kinds, None, False
        if kinds is None:
            return
        for name, place in self._places.items():
            if name == "decoder":
                place.count(kinds)
            elif place.chosen:
                place.count(_tile_kinds(len(place.chosen[0]), output))


def _no_layers() -> ExpertLoad:
    """The load of a decoder without experts."""
    none = torch.zeros(0, len(MODALITIES), 1, dtype=torch.long)
    allowed = torch.ones(len(MODALITIES), 1, dtype=torch.bool)
    return ExpertLoad((), 1, none, none[..., 0].double(), allowed)


def _allowed_experts(router: Any) -> torch.Tensor:
    """(2, E) bool: which experts text and image tokens may use."""
    allowed = getattr(router, "allowed_experts", None)
    if allowed is None:
        return torch.ones(len(MODALITIES), router.weight.shape[0], dtype=torch.bool)
    return allowed.cpu()


def token_kinds(inputs: dict[str, Any], config: Any) -> torch.Tensor:
    """Return each token's modality, or `PADDING`, (batch, length).

    Args:
        inputs: the keyword arguments of a forward of the backbone.
        config: the backbone's.
    """
    tokens = inputs.get("input_ids")
    if tokens is None:
        tokens = inputs["inputs_embeds"][..., 0]
    is_image = _image_tokens(inputs, tokens, config.image_token_id)
    padding = _padding(inputs, tokens, config.text_config.pad_token_id)
    return is_image.long() if padding is None else torch.where(padding, PADDING, is_image)


def _image_tokens(
    inputs: dict[str, Any], tokens: torch.Tensor, image_token_id: int
) -> torch.Tensor:
    """(batch, length): True for image tokens; a token decoded with a cache is text."""
    if inputs.get("input_ids") is not None:
        return tokens == image_token_id
    types = inputs.get("mm_token_type_ids")
    if types is not None and types.shape == tokens.shape:
        return types == Modality.image.value
    return torch.zeros_like(tokens, dtype=torch.bool)


def _tile_kinds(tokens: int, output: Any) -> torch.Tensor:
    """(tokens,): `PADDING` for tokens of tiles that no row shows, image for others.

    In evaluation there are no such tiles.
    """
    image = Modality.image.value
    if output.shown_tiles is None:
        return torch.full((tokens,), image)
    (tile, row), tiles = output.shown_tiles, len(output.vision_router_logits[0])
    kinds = torch.full((tiles,), PADDING, device=tile.device)
    kinds = kinds.scatter_reduce(0, tile, torch.where(row >= 0, image, PADDING), "amin")
    return kinds.repeat_interleave(tokens // tiles)


def _padding(
    inputs: dict[str, Any], tokens: torch.Tensor, pad_token_id: int | None
) -> torch.Tensor | None:
    """(batch, length): True for padding; None if there is none.

    `generate` fills rows that have ended with the padding token, and its mask calls it real.
    """
    mask = inputs.get("attention_mask")
    if mask is None:
        return None
    if not isinstance(mask, torch.Tensor) or mask.dim() != 2:
        raise ValueError("Expert load needs a (batch, length) attention mask to leave out padding.")
    seen = mask.shape[1] - tokens.shape[1]  # by the cache
    padding = (mask[:, seen:] if seen else mask) == 0
    if seen and tokens.shape[1] == 1 and inputs.get("input_ids") is not None:
        padding = padding | (tokens == (-1 if pad_token_id is None else pad_token_id))
    return padding

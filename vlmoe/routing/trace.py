# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Record which experts every single token went to, and with what weights.

Unlike load.py, which counts, this keeps each choice: for looking at a few samples, or at one batch
after another; of plain forward passes and of `generate`, where each forward pass holds the tokens
that are new.

Shapes: B rows, T tokens of a forward pass, n tokens of a sequence, L sparse layers of the decoder,
E experts, k experts per token.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet

import torch
from torch import nn
from transformers import PreTrainedModel

from ..configuration.configuration_vlmoe_text import Modality
from ..data.answers import end_tokens, greedy_answers
from ..data.native_chat import tokenizer_of
from .kinds import PADDING, Inputs, token_kinds, vision_bank_tokens
from .load import ExpertLoad, LoadReader
from .record import Listener, Routing, find_backbone
from .routed_layers import RoutedLayer, routed_layers

_recorded: WeakSet[nn.Module] = WeakSet()  # backbones inside a `record_routing` block
_guard = threading.Lock()


@dataclass
class TokenRouting:
    """The routing of one sequence, padding left out.

    Attributes:
        layers: the decoder's index of each sparse layer.
        num_experts: E.
        token_ids: (n,) long.
        kinds: (n,) long, positions in `KINDS`: text, image, video.
        experts: (L, n, k) long, by falling weight.
        weights: (L, n, k) float32, what the experts' outputs are multiplied by.
    """

    layers: tuple[int, ...]
    num_experts: int
    token_ids: torch.Tensor
    kinds: torch.Tensor
    experts: torch.Tensor
    weights: torch.Tensor

    @property
    def is_image(self) -> torch.Tensor:
        """(n,) bool."""
        return self.kinds == Modality.image.value

    @property
    def first_choices(self) -> torch.Tensor:
        """(L, n): the expert with the largest weight."""
        return self.experts[..., 0]

    def first(self, tokens: int) -> "TokenRouting":
        """Return the routing of the first `tokens` tokens."""
        return TokenRouting(
            self.layers,
            self.num_experts,
            self.token_ids[:tokens],
            self.kinds[:tokens],
            self.experts[:, :tokens],
            self.weights[:, :tokens],
        )


@dataclass
class ForwardRouting:
    """The routing of one forward pass, on the CPU.

    Attributes:
        token_ids, kinds: (B, T); see `token_kinds`.
        experts, weights: (L, B, T, k), by falling weight. ERNIE-4.5-VL numbers the experts of its
            bank for images and videos from 0, too.
    """

    token_ids: torch.Tensor
    kinds: torch.Tensor
    experts: torch.Tensor
    weights: torch.Tensor


@dataclass
class RoutingTrace:
    """The recorded routing of a `record_routing` block.

    Attributes:
        layers: the decoder's index of each sparse layer.
        num_experts: E.
        load: counts of all forward passes, also by kind of token, of vision towers and connectors
            with experts too, and the figures that follow from them.
        forwards: the choices of each forward pass, in order; empty with `choices=False`.
    """

    layers: tuple[int, ...]
    num_experts: int
    load: ExpertLoad
    forwards: list[ForwardRouting] = field(default_factory=list)

    def sequences(self) -> list[TokenRouting]:
        """Join the forward passes along the tokens, as the steps of `generate` follow each other.

        One entry per row.

        Raises:
            ValueError: there was no forward, or the forwards differ in their number of rows.
        """
        rows = {len(forward.token_ids) for forward in self.forwards}
        if len(rows) != 1:
            raise ValueError(
                f"The recorded forwards have {sorted(rows)} rows; record one `generate` at a time, "
                "without beams."
            )
        token_ids = torch.cat([forward.token_ids for forward in self.forwards], 1)
        kinds = torch.cat([forward.kinds for forward in self.forwards], 1)
        experts = torch.cat([forward.experts for forward in self.forwards], 2)
        weights = torch.cat([forward.weights for forward in self.forwards], 2)
        return [
            TokenRouting(
                self.layers,
                self.num_experts,
                token_ids[row, real],
                kinds[row, real],
                experts[:, row, real],
                weights[:, row, real],
            )
            for row, real in enumerate(kinds != PADDING)
        ]


@contextmanager
def record_routing(model: nn.Module, choices: bool = True) -> Iterator[RoutingTrace]:
    """Record the routing of every forward pass of `model` inside the block.

    Args:
        model: any sparse model under transformers' experts interface, VLMoE or another; also
            inside a PEFT model or DistributedDataParallel, sharded by FSDP2, or about to be
            compiled (then with `choices=False`).
        choices: keep the choices of every token, for which it must be given `input_ids`. Memory
            grows with the tokens: clear `forwards` between batches, or keep the counts alone.

    Yields:
        A `RoutingTrace` that grows with each forward pass.

    Raises:
        ValueError: the model has no sparse layer, or computes its experts in its own way; in the
            block, it is given no `input_ids`, or weights are NaN or infinite.
        RuntimeError: another block, also one of another thread, records this model.

    Example:
        >>> with record_routing(model) as routing, torch.no_grad():
        ...     model(**batch)
        >>> routing.sequences()[0].experts.shape
        torch.Size([2, 23, 2])
        >>> routing.load.as_dict()["max_violation"]["image"]
        [0.31, 0.12]
    """
    layers, backbone = routed_layers(model), find_backbone(model)
    load, tracer = LoadReader(backbone, layers), TraceReader(layers)
    decoder = tracer.layers or tuple(layer.index for layer in layers)
    if choices and not tracer.layers:
        raise ValueError(
            f"The decoder of {type(model).__name__} has no experts: record with choices=False."
        )
    trace = RoutingTrace(decoder, tracer.num_experts, load.load, tracer.forwards)
    with _alone(backbone), Listener(model, [load, tracer] if choices else [load], layers):
        yield trace


class TraceReader:
    """Keeps the choices of each forward pass in `forwards`; a `Reader`.

    Args:
        layers: of the model; those of towers and connectors are passed over.
    """

    def __init__(self, layers: list[RoutedLayer]):
        banks = [layer for layer in layers if layer.place in ("decoder", "vision")]
        self.layers = tuple(dict.fromkeys(layer.index for layer in banks))
        self.num_experts = max((layer.num_experts for layer in banks), default=0)
        self.forwards: list[ForwardRouting] = []
        self._token_ids = self._kinds = torch.empty(0)
        self._vision_tokens: torch.Tensor | None = None
        self._chosen: dict[int, list[tuple[RoutedLayer, torch.Tensor, torch.Tensor]]] = {}

    def begin(self, backbone: PreTrainedModel, inputs: Inputs) -> bool:
        """Keep the tokens."""
        if inputs.get("input_ids") is None:
            raise ValueError("Recording the routing of each token needs `input_ids`.")
        self._chosen = {index: [] for index in self.layers}
        self._token_ids = inputs["input_ids"].cpu()
        self._kinds = token_kinds(inputs, backbone.config).cpu()
        self._vision_tokens = vision_bank_tokens(inputs)
        return True

    def read(self, layer: RoutedLayer, routing: Routing) -> None:
        """Keep the choice of one bank, by falling weight."""
        if layer.place not in ("decoder", "vision"):
            return
        # With a selection bias the order of choice is not that of the weights.
        weights = routing.weights.detach()
        order = weights.argsort(dim=-1, descending=True, stable=True)
        experts = routing.chosen.gather(-1, order).cpu()
        weights = weights.gather(-1, order).float().cpu()
        if not weights.isfinite().all():
            raise ValueError(
                f"The router of layer {layer.index} gives weights that are NaN or infinite."
            )
        self._chosen[layer.index].append((layer, experts, weights))

    def read_outside(self, layer: RoutedLayer, routing: Routing) -> None:
        """Leave out images that are encoded before, and recomputation."""

    def end(self, output: object) -> None:
        """Keep the forward pass."""
        joined = [self._of_all_tokens(parts) for parts in self._chosen.values()]
        shape = (len(joined), *self._kinds.shape, -1)
        self.forwards.append(
            ForwardRouting(
                self._token_ids,
                self._kinds,
                torch.stack([experts for experts, _ in joined]).view(shape),
                torch.stack([weights for _, weights in joined]).view(shape),
            )
        )
        self._chosen = {}

    def _of_all_tokens(
        self, parts: list[tuple[RoutedLayer, torch.Tensor, torch.Tensor]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Experts and weights (B * T, k) of a layer, from those of each of its banks."""
        if self._vision_tokens is None or len(parts[0][1]) == self._kinds.numel():
            return parts[0][1:]
        is_vision = self._vision_tokens.flatten().cpu()
        shape = (self._kinds.numel(), parts[0][1].shape[-1])
        experts, weights = torch.zeros(shape, dtype=torch.long), torch.zeros(shape)
        for layer, chosen, of_bank in parts:
            rows = is_vision if layer.place == "vision" else ~is_vision
            experts[rows], weights[rows] = chosen, of_bank
        return experts, weights


@contextmanager
def _alone(backbone: nn.Module) -> Iterator[None]:
    """Refuse a second recording of one model: the forwards of two threads would be mixed."""
    with _guard:
        if backbone in _recorded:
            raise RuntimeError(
                f"The routing of this {type(backbone).__name__} is being recorded already, here or "
                "in another thread. Leave that block first, or record a copy of the model."
            )
        _recorded.add(backbone)
    try:
        yield
    finally:
        _recorded.discard(backbone)


@torch.inference_mode()
def trace_answers(
    model: Any, processor: Any, inputs: dict[str, torch.Tensor], max_new_tokens: int
) -> list[tuple[TokenRouting, torch.Tensor]]:
    """Answer prompts greedily and record the routing of prompts and answers.

    Args:
        model: in eval mode.
        processor: its processor.
        inputs: of one or several prompts, padded on the left.
        max_new_tokens: the longest answer, in tokens.

    Returns:
        For each prompt the routing and the answer's ids (new tokens,), up to and with the end
        token. The answer's last token is not fed back to the model: the routing ends before it.
    """
    inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    tokenizer = tokenizer_of(processor)
    ends = end_tokens(model, tokenizer)
    with record_routing(model) as trace:
        answers = greedy_answers(model, tokenizer, inputs, max_new_tokens).cpu()  # (B, new tokens)
    prompt_lengths = inputs["attention_mask"].sum(-1).tolist()
    traced = []
    for routing, answer, length in zip(trace.sequences(), answers, prompt_lengths, strict=True):
        is_end = torch.isin(answer, torch.tensor(ends))
        if is_end.any():
            answer = answer[: int(is_end.int().argmax()) + 1]
        traced.append((routing.first(length + len(answer) - 1), answer))
    return traced

# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Which experts every single token went to, and with what weights.

Unlike `expert_load.py`, which counts, this keeps each choice: for looking at a few samples, or at
one batch after another. Hooks on the routers hand over what they chose, in plain forwards and in
`generate`, where each forward holds the tokens that are new.

Shapes: B rows, T tokens of a forward, n tokens of a sequence, L sparse layers, E experts, k experts
per token.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet

import torch
from torch import nn

from ..configuration.configuration_vlmoe_text import Modality
from ..data.answers import greedy_answers
from .expert_load import PADDING, find_backbone, sparse_routers, token_kinds

_recorded: WeakSet[nn.Module] = WeakSet()  # backbones inside a `record_routing` block
_guard = threading.Lock()


@dataclass
class TokenRouting:
    """The routing of one sequence, padding left out.

    Attributes:
        layers: the decoder's index of each sparse layer.
        num_experts: E.
        token_ids: (n,) long.
        is_image: (n,) bool.
        experts: (L, n, k) long, by falling weight.
        weights: (L, n, k) float32, what the experts' outputs are multiplied by.
    """

    layers: tuple[int, ...]
    num_experts: int
    token_ids: torch.Tensor
    is_image: torch.Tensor
    experts: torch.Tensor
    weights: torch.Tensor

    @property
    def first_choices(self) -> torch.Tensor:
        """(L, n): the expert with the largest weight."""
        return self.experts[..., 0]

    def first(self, tokens: int) -> "TokenRouting":
        """The same of the first `tokens` tokens."""
        return TokenRouting(
            self.layers,
            self.num_experts,
            self.token_ids[:tokens],
            self.is_image[:tokens],
            self.experts[:, :tokens],
            self.weights[:, :tokens],
        )


@dataclass
class ForwardRouting:
    """The routing of one forward, on the CPU: `token_ids` and `kinds` (B, T; see `token_kinds`),
    `experts` and `weights` (L, B, T, k), by falling weight."""

    token_ids: torch.Tensor
    kinds: torch.Tensor
    experts: torch.Tensor
    weights: torch.Tensor


@dataclass
class RoutingTrace:
    """What `record_routing` has seen: one `ForwardRouting` for each forward, in order."""

    layers: tuple[int, ...]
    num_experts: int
    forwards: list[ForwardRouting] = field(default_factory=list)

    def sequences(self) -> list[TokenRouting]:
        """The forwards joined along the tokens, as the steps of `generate` follow each other, one
        entry per row.

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
                kinds[row, real] == Modality.image.value,
                experts[:, row, real],
                weights[:, row, real],
            )
            for row, real in enumerate(kinds != PADDING)
        ]


@contextmanager
def record_routing(model: nn.Module) -> Iterator[RoutingTrace]:
    """Record the choices for every token of every forward of `model` inside the block.

    Memory grows with the tokens: clear `forwards` between batches.

    Args:
        model: a VLMoE, also inside a PEFT model, that is given `input_ids`.

    Yields:
        A `RoutingTrace` that grows with each forward.

    Raises:
        ValueError: the decoder has no sparse layer; in the block, it is given no `input_ids`.
        RuntimeError: another block, also one of another thread, records this model.

    Example:
        >>> with record_routing(model) as trace, torch.no_grad():
        ...     model(**batch)
        >>> trace.sequences()[0].experts.shape
        torch.Size([2, 23, 2])
    """
    backbone, routers = find_backbone(model), sparse_routers(model)
    if not routers:
        raise ValueError(f"The decoder of {type(model).__name__} has no sparse layer.")
    router: Any = next(iter(routers.values()))
    trace = RoutingTrace(tuple(routers), router.weight.shape[0])
    choices: list[tuple[torch.Tensor, torch.Tensor]] = []  # (B * T, k) each, of the layers so far
    tokens: dict[str, torch.Tensor] = {}

    def before_forward(backbone: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        inputs = {"input_ids": args[0]} | kwargs if args else kwargs
        if inputs.get("input_ids") is None:
            raise ValueError("Recording the routing of each token needs `input_ids`.")
        choices.clear()
        tokens["token_ids"] = inputs["input_ids"].cpu()
        tokens["kinds"] = token_kinds(inputs, backbone.config).cpu()

    def after_router(router: nn.Module, args: tuple, output: tuple) -> None:
        _, weights, experts = (tensor.detach() for tensor in output)
        # With a selection bias the order of choice is not that of the weights.
        order = weights.argsort(dim=-1, descending=True, stable=True)
        chosen = experts.gather(-1, order).cpu(), weights.gather(-1, order).float().cpu()
        if not chosen[1].isfinite().all():
            layer = list(routers)[len(choices)]
            raise ValueError(f"The router of layer {layer} gives weights that are NaN or infinite.")
        choices.append(chosen)

    def after_forward(backbone: nn.Module, args: tuple, output: Any) -> None:
        shape = (len(choices), *tokens["kinds"].shape, -1)
        experts = torch.stack([experts for experts, _ in choices]).view(shape)
        weights = torch.stack([weights for _, weights in choices]).view(shape)
        trace.forwards.append(ForwardRouting(**tokens, experts=experts, weights=weights))

    with _alone(backbone):
        handles = [
            backbone.register_forward_pre_hook(before_forward, with_kwargs=True),
            *(module.register_forward_hook(after_router) for module in routers.values()),
            backbone.register_forward_hook(after_forward),
        ]
        try:
            yield trace
        finally:
            for handle in handles:
                handle.remove()


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
    tokenizer = processor.tokenizer
    with record_routing(model) as trace:
        answers = greedy_answers(model, tokenizer, inputs, max_new_tokens).cpu()  # (B, new tokens)
    prompt_lengths = inputs["attention_mask"].sum(-1).tolist()
    traced = []
    for routing, answer, length in zip(trace.sequences(), answers, prompt_lengths, strict=True):
        ids = answer.tolist()
        if tokenizer.eos_token_id in ids:
            answer = answer[: ids.index(tokenizer.eos_token_id) + 1]
        traced.append((routing.first(length + len(answer) - 1), answer))
    return traced

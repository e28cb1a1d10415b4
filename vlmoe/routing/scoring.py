# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""How a router of any family gets from logits to its choice, found by asking it.

A copy of the router with drawn weights is called once with drawn tokens. Of the known ways that one
is taken which explains both outputs, weights and choice: softmax or sigmoid scores, or an output
that is probabilities already (Gemma 4). With the router's own weights the answer would not be
certain: at logits near 0 all ways agree.
"""

import copy
import inspect
from collections import OrderedDict
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import nn

from ..modeling_vlmoe.router import choose_experts
from .routed_layers import RoutedLayer, without_wrappers

Kind = Literal["softmax", "sigmoid", "probabilities"]

_TOKENS, _TOLERANCE = 64, 1e-4


@dataclass(frozen=True)
class Scoring:
    """How scores follow from a router's output and choices from scores.

    Attributes:
        kind: softmax or sigmoid of the output, or the output itself.
        top_k, n_group, topk_group: as in `choose_experts`.
    """

    kind: Kind
    top_k: int
    n_group: int = 1
    topk_group: int = 1

    def logits(self, output: torch.Tensor) -> torch.Tensor:
        """(tokens, experts) -> the same as logits: probabilities become their logarithm."""
        if self.kind != "probabilities":
            return output
        return output.clamp(min=torch.finfo(output.dtype).tiny).log()

    @property
    def of_logits(self) -> Literal["softmax", "sigmoid"]:
        """The function that makes scores of `logits`."""
        return "sigmoid" if self.kind == "sigmoid" else "softmax"

    def scores(self, output: torch.Tensor) -> torch.Tensor:
        """(tokens, experts) -> the same as scores, float32."""
        logits = self.logits(output.float())
        return logits.sigmoid() if self.kind == "sigmoid" else logits.softmax(-1)


def router_logits_of(output: object, num_experts: int) -> torch.Tensor | None:
    """Return the first floating-point tensor (tokens, experts) of a router's output."""
    for part in output if isinstance(output, tuple | list) else (output,):
        if isinstance(part, torch.Tensor) and part.is_floating_point():
            if part.dim() == 2 and part.shape[-1] == num_experts:
                return part
    return None


@torch.no_grad()
def router_scoring(layer: RoutedLayer) -> Scoring:
    """Find how a layer's router scores and chooses.

    Raises:
        ValueError: none of the known ways explains its outputs, or several do (a single expert
            whose weight is always 1).
    """
    # Of one expert, where the router normalizes, the weight is always 1, whatever the scores.
    top_k = 2 if layer.top_k == 1 and layer.num_experts > 1 else layer.top_k
    output, weights, choice = _asked(layer, top_k=top_k)
    router = without_wrappers(layer.router)
    groups = _number(router, "num_group", "n_group"), _number(router, "topk_group")
    given = weights / weights.sum(-1, keepdim=True)
    fitting = []
    for kind in get_args(Kind):
        scoring = Scoring(kind, layer.top_k, *groups)
        if kind == "probabilities" and not _are_probabilities(output):
            continue
        scores = scoring.scores(output)
        chosen = choose_experts(scores, choice.shape[-1], *groups)
        taken = scores.gather(-1, choice)
        shares = taken / taken.sum(-1, keepdim=True)
        if torch.equal(chosen.sort(-1)[0], choice.sort(-1)[0]) and _close(shares, given):
            fitting.append(scoring)
    if len(fitting) != 1:
        raise ValueError(
            f"{type(layer.router).__name__} ({layer.name}) "
            + ("fits several ways" if fitting else "chooses or weighs in none of the known ways")
            + " (softmax, sigmoid, probabilities; the k best, in groups or not): its probabilities "
            "do not follow from its output."
        )
    return fitting[0]


@torch.no_grad()
def weight_is_constant(layer: RoutedLayer, **attributes: bool) -> bool:
    """Return whether tokens go to one expert of several, whose weight is the same for all tokens.

    Then no gradient of the task reaches the router. `attributes` are set where the router has them.

    Raises:
        ValueError: the router does not return logits, weights and choice.
    """
    if layer.num_experts == 1:
        return False
    _, weights, _ = _asked(layer, **attributes)
    return weights.shape[-1] == 1 and _close(weights, weights[:1].expand_as(weights))


def _asked(
    layer: RoutedLayer, **attributes: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return output (tokens, experts), weights and choice (tokens, k) for drawn tokens.

    `attributes`, such as `top_k`, are set where the router has them.
    """
    generator = torch.Generator().manual_seed(0)
    router = _empty_copy(without_wrappers(layer.router))
    for attribute, value in attributes.items():
        if hasattr(router, attribute):
            setattr(router, attribute, value)
    hidden = _hidden_size(router, layer.num_experts)
    for name, tensor in (*router.named_parameters(), *router.named_buffers()):
        if tensor.dim() < 2 or name.endswith("bias"):
            tensor.fill_(1 if name.endswith("scale") else 0)  # ERNIE's bias is (1, experts)
        else:
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * hidden**-0.5)
    tokens = 3 * torch.randn(_TOKENS, hidden, generator=generator)
    arguments = inspect.signature(router.forward).parameters
    more = {"expert_bias": torch.zeros(layer.num_experts)} if "expert_bias" in arguments else {}
    outputs = router(tokens, **more)
    logits = router_logits_of(outputs, layer.num_experts)
    others = [part for part in outputs if part is not logits]
    weights = [part for part in others if part.is_floating_point()]
    choice = [part for part in others if not part.is_floating_point()]
    if logits is None or len(weights) != 1 or len(choice) != 1:
        raise ValueError(
            f"{type(router).__name__} ({layer.name}) does not return logits (tokens, experts), "
            "weights and choice (tokens, k): its routing cannot be read."
        )
    return logits, weights[0], choice[0]


def _empty_copy(module: nn.Module) -> nn.Module:
    """Return the module without hooks, with undefined float32 tensors of its shapes on the CPU.

    Its own tensors are not touched: they may be sharded by FSDP2. A copied hook would copy what it
    belongs to, such as the whole model.
    """
    own = (*module.parameters(), *module.buffers())
    memo: dict[int, object] = {
        id(tensor): nn.Parameter(torch.empty(tensor.shape), requires_grad=False)
        if isinstance(tensor, nn.Parameter)
        else torch.empty(tensor.shape)
        for tensor in own
    }
    for each in module.modules():
        memo |= {id(hooks): OrderedDict() for hooks in _hooks(each)}
    return copy.deepcopy(module, memo)


def _hooks(module: nn.Module) -> list[object]:
    """Return the dictionaries of a module's hooks."""
    return [value for name, value in vars(module).items() if name.endswith("_hooks")]


def _hidden_size(router: nn.Module, num_experts: int) -> int:
    for parameter in router.parameters():
        if parameter.dim() == 2 and parameter.shape[0] == num_experts:
            return parameter.shape[1]
    raise ValueError(f"{type(router).__name__} has no weight (experts, hidden).")


def _number(router: nn.Module, *names: str) -> int:
    values = [value for name in names if isinstance(value := getattr(router, name, None), int)]
    return values[0] if values else 1


def _are_probabilities(output: torch.Tensor) -> bool:
    return bool((output >= 0).all()) and _close(output.sum(-1), torch.ones(len(output)))


def _close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.allclose(one, other, rtol=_TOLERANCE, atol=_TOLERANCE)

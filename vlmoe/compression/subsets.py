# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Fewer experts: which experts of a layer stay.

The error of a set of experts is what leaving the others out does to the model's loss, to second
order: the sum over tokens of (g . (y_set - y))^2, with the output y of the layer and the gradient g
of the loss with respect to it. The expectation over the model's own answers makes it the Fisher
information, so that answers are sampled from the model: for true answers a model that is right has
no gradient. Only tokens that predict an answer count; the many tokens of prompts would
outvote them.

Tokens of experts that are gone are sent to others by the router itself, cut down to the set.

Shapes: T tokens that predict an answer, E experts, H hidden size, k experts per token.
"""

import copy
import itertools
import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from ..data.answers import evaluation_mode
from ..routing.routed_layers import RoutedLayer, without_wrappers
from ..routing.scoring import router_logits_of
from .banks import activations, down_of, keep_router_rows
from .calibration import BankTokens, Batch, answer_positions, bank_tokens, model_inputs

Tensor = torch.Tensor
Criterion = Literal["fisher", "frequency", "reap", "reap-answers", "random"]
CRITERIA = get_args(Criterion)
MOST_SUBSETS = 5000
"""Up to so many sets of experts all are tried; of more, experts are taken away one by one."""
TEMPERATURE = 2.0
"""Of the sampled answers: a model that is sure samples its own answer, whose gradient vanishes."""


@dataclass(frozen=True)
class AnswerTokens:
    """What a layer did with the tokens that predict an answer.

    Attributes:
        router_inputs: the arguments of the router for these tokens.
        hidden: (T, H), what the bank was called with.
        gradient: (T, H), of the loss of the sampled answers with respect to the bank's output.
    """

    router_inputs: tuple[object, ...]
    hidden: Tensor
    gradient: Tensor


def choose_subset(
    layer: RoutedLayer, tokens: AnswerTokens, groups: Sequence[Sequence[int]], counts: Sequence[int]
) -> list[int]:
    """Return the experts that stay, group by group: the set of least Fisher error.

    Args:
        layer: before any expert is taken away.
        tokens: of the calibration.
        groups: experts that are chosen from together.
        counts: how many stay of each group.
    """
    effect = projections(layer.experts, tokens)  # (T, E)
    full = restricted_output(layer, tokens, effect, range(layer.num_experts))

    def error(kept: Iterable[int]) -> float:
        return float((restricted_output(layer, tokens, effect, kept) - full).square().sum())

    sizes = [math.comb(len(g), n) for g, n in zip(groups, counts, strict=True)]
    if math.prod(sizes) <= MOST_SUBSETS:
        return list(min(_subsets(groups, counts), key=error))
    return greedy(groups, counts, error)


def greedy(
    groups: Sequence[Sequence[int]],
    counts: Sequence[int],
    error: Callable[[Iterable[int]], float],
) -> list[int]:
    """Take experts away one by one, each time that with the least error."""
    left = [list(group) for group in groups]
    while any(len(group) > count for group, count in zip(left, counts, strict=True)):
        options = [
            (number, expert)
            for number, group in enumerate(left)
            if len(group) > counts[number]
            for expert in group
        ]
        everyone = [expert for group in left for expert in group]
        number, expert = min(
            options, key=lambda option: error([each for each in everyone if each != option[1]])
        )
        left[number].remove(expert)
    return [expert for group in left for expert in group]


def best_by_score(
    scores: Tensor, groups: Sequence[Sequence[int]], counts: Sequence[int]
) -> list[int]:
    """Return the experts with the highest scores (E,), so many of each group."""
    kept: list[int] = []
    for group, count in zip(groups, counts, strict=True):
        kept += sorted(sorted(group, key=lambda expert: -float(scores[expert]))[:count])
    return kept


@torch.no_grad()
def saliency(
    model: PreTrainedModel, layer: RoutedLayer, batches: Sequence[Batch], criterion: Criterion
) -> Tensor:
    """Return the scores of the experts, (E,), for a criterion of comparison.

    - frequency: how many tokens were sent to the expert;
    - reap: the mean over its tokens of routing weight times norm of the expert's output
      (https://arxiv.org/abs/2510.13999, equation 9);
    - reap-answers: the same over tokens that predict an answer.
    """
    tokens = bank_tokens(model, layer, batches)
    real = torch.cat([_is_real(batch) for batch in batches])
    if criterion == "reap-answers":
        keep = torch.cat([answer_positions(batch).flatten() for batch in batches])[real]
        tokens = BankTokens(*(each[keep] for each in vars(tokens).values()))
    scores = torch.zeros(layer.num_experts)
    for expert in range(layer.num_experts):
        rows, choice = (tokens.chosen == expert).nonzero(as_tuple=True)
        if criterion == "frequency":
            scores[expert] = len(rows)
        elif len(rows):
            output = expert_output(layer.experts, expert, tokens.hidden[rows])
            scores[expert] = (tokens.weights[rows, choice] * output.norm(dim=-1)).mean()
    return scores


def gather_answers(
    model: PreTrainedModel, layers: Sequence[RoutedLayer], batches: Sequence[Batch], seed: int = 0
) -> list[AnswerTokens]:
    """Return what each layer did with the tokens that predict an answer."""
    heard: list[list[AnswerTokens]] = [[] for _ in layers]
    generator = torch.Generator().manual_seed(seed)
    learning = [each for each in model.parameters() if each.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    model.enable_input_require_grads()
    try:
        with evaluation_mode(model), torch.enable_grad():
            for batch in batches:
                for own, found in zip(
                    heard, _answers_of(model, layers, batch, generator), strict=True
                ):
                    own.append(found)
    finally:
        model.disable_input_require_grads()
        for parameter in learning:
            parameter.requires_grad_(True)
    return [_joined(each) for each in heard]


def projections(bank: nn.Module, tokens: AnswerTokens) -> Tensor:
    """(T, E): the gradient times the output of every expert, each for every token."""
    with torch.no_grad():
        outputs = (
            (expert_output(bank, expert, tokens.hidden) * tokens.gradient).sum(-1)
            for expert in range(down_of(bank).shape[0])
        )
        return torch.stack([each.double() for each in outputs], dim=-1)


def expert_output(bank: nn.Module, expert: int, tokens: Tensor) -> Tensor:
    """(T, H) -> (T, H): one expert's output, without a routing weight."""
    return F.linear(activations(bank, expert, tokens), down_of(bank)[expert])


@torch.no_grad()
def restricted_output(
    layer: RoutedLayer, tokens: AnswerTokens, effect: Tensor, kept: Iterable[int]
) -> Tensor:
    """(T,): the gradient times the layer's output, with some of the experts.

    Raises:
        ValueError: the router's output is not logits, weights and choice.
    """
    kept = list(kept)
    router = restricted_router(layer, kept)
    outputs = router(*tokens.router_inputs)
    logits = router_logits_of(outputs, len(kept))
    others = [part for part in outputs if part is not logits and isinstance(part, Tensor)]
    weights = [part for part in others if part.is_floating_point()]
    choice = [part for part in others if not part.is_floating_point()]
    if logits is None or len(weights) != 1 or len(choice) != 1:
        raise ValueError(
            f"{type(router).__name__} ({layer.name}) does not return logits (tokens, experts), "
            'weights and choice (tokens, k); allowed: another criterion, such as "frequency".'
        )
    mine = effect[:, torch.tensor(kept)].gather(1, choice[0])
    return (mine * weights[0]).sum(-1)


def restricted_router(layer: RoutedLayer, kept: Sequence[int]) -> nn.Module:
    """Return a copy of the layer's router that chooses from some of the experts."""
    own = without_wrappers(layer.router)
    hooks = (
        value
        for module in own.modules()
        for name, value in vars(module).items()
        if name.endswith("_hooks")
    )
    router = copy.deepcopy(own, {id(each): OrderedDict() for each in hooks})
    if len(kept) < layer.num_experts:
        if (masked := getattr(router, "masked_by", None)) is not None:
            setattr(router.routing, "modality_experts", renumbered(masked, kept))  # noqa: B010
        keep_router_rows(router, list(kept), layer.num_experts)
    return router


def renumbered(modality_experts: dict[str, list[int]], kept: Sequence[int]) -> dict[str, list[int]]:
    """Return the experts of each modality by their new numbers."""
    new = {expert: number for number, expert in enumerate(kept)}
    return {
        name: [new[e] for e in experts if e in new] for name, experts in modality_experts.items()
    }


def _subsets(groups: Sequence[Sequence[int]], counts: Sequence[int]) -> Iterator[tuple[int, ...]]:
    parts = (itertools.combinations(g, n) for g, n in zip(groups, counts, strict=True))
    for choice in itertools.product(*parts):
        yield tuple(itertools.chain(*choice))


def _is_real(batch: Batch) -> Tensor:
    return batch["attention_mask"].flatten().bool()


def _answers_of(
    model: PreTrainedModel, layers: Sequence[RoutedLayer], batch: Batch, generator: torch.Generator
) -> list[AnswerTokens]:
    """Return what each layer did with one batch."""
    positions = answer_positions(batch).to(model.device)
    flat = positions.flatten()
    asked: dict[str, tuple[object, ...]] = {}
    outputs: dict[str, tuple[Tensor, Tensor]] = {}

    def keep_output(layer: RoutedLayer) -> Callable[..., None]:
        def hook(bank: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            output.retain_grad()
            outputs[layer.name] = args[0], output

        return hook

    def keep_inputs(layer: RoutedLayer) -> Callable[..., None]:
        def hook(router: nn.Module, args: tuple[object, ...]) -> None:
            asked[layer.name] = args

        return hook

    handles = [each.experts.register_forward_hook(keep_output(each)) for each in layers]
    handles += [each.router.register_forward_pre_hook(keep_inputs(each)) for each in layers]
    try:
        logits = model(**model_inputs(model, batch), use_cache=False).logits[positions].float()
        probabilities = (logits.detach() / TEMPERATURE).softmax(-1).cpu()
        sampled = torch.multinomial(probabilities, 1, generator=generator)[:, 0].to(logits.device)
        F.cross_entropy(logits, sampled, reduction="sum").backward()
    finally:
        for handle in handles:
            handle.remove()
    found = []
    for layer in layers:
        hidden, output = outputs[layer.name]
        assert output.grad is not None  # retained, and the loss depends on every layer
        gradient = output.grad.reshape(len(flat), -1)[flat]
        args = tuple(_rows(each, flat) for each in asked[layer.name])
        found.append(AnswerTokens(args, hidden.detach().reshape(len(flat), -1)[flat], gradient))
    return found


def _rows(value: object, flat: Tensor) -> object:
    """Return the rows of what a router is called with; (B, L, H) becomes (T, H)."""
    if not isinstance(value, Tensor):
        return value
    value = value.detach()
    if value.dim() == 3:
        value = value.flatten(0, 1)
    return value[flat] if value.shape[0] == len(flat) else value


def _joined(parts: Sequence[AnswerTokens]) -> AnswerTokens:
    args = zip(*(part.router_inputs for part in parts), strict=True)
    return AnswerTokens(
        tuple(torch.cat(each) if isinstance(each[0], Tensor) else each[0] for each in args),
        torch.cat([part.hidden for part in parts]),
        torch.cat([part.gradient for part in parts]),
    )

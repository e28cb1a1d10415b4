# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Narrower experts: which units of an expert stay, and how its down projection makes up for others.

Optimal brain surgeon on the units of an expert (Hassibi and Stork, NeurIPS 1992; for columns of a
layer, as here, Frantar and Alistarh, https://arxiv.org/abs/2208.11580): units are taken away one by
one, each time that with the least error of the expert's output on its own tokens, and the down
projection is repaired in closed form. The error of a token counts with its routing weight.

Shapes: E experts, I units, H hidden size, T tokens of one expert.
"""

from dataclasses import dataclass

import torch
from torch import nn

from .banks import activations, down_of
from .calibration import BankTokens

Tensor = torch.Tensor
DAMPING = 1e-4
"""Added to the diagonal of a second moment, as a share of its mean: an expert may have seen fewer
tokens than it has units, and what its tokens do not say should stay as it is."""


@dataclass(frozen=True)
class NarrowBank:
    """The units of a bank that stay.

    Attributes:
        kept: (E, units) long, in ascending order.
        down: (E, H, units), the repaired down projections.
        without_tokens: experts that no token of the calibration was sent to; the second moment of
            all tokens of the layer stands for theirs.
    """

    kept: Tensor
    down: Tensor
    without_tokens: list[int]


@torch.no_grad()
def narrow_bank(bank: nn.Module, tokens: BankTokens, units: int) -> NarrowBank:
    """Choose the units of every expert of a bank and repair its down projections."""
    moments, without = second_moments(bank, tokens)
    kept, down = [], []
    for moment, weight in zip(moments, down_of(bank).double(), strict=True):
        chosen, repaired = surgeon(moment, weight, units)
        kept.append(chosen)
        down.append(repaired)
    return NarrowBank(torch.stack(kept), torch.stack(down), without)


def second_moments(bank: nn.Module, tokens: BankTokens) -> tuple[Tensor, list[int]]:
    """Return the second moments of each expert's units, (E, I, I) float64.

    Each token counts with the square of its routing weight: sum of w^2 a a^T. Also returns the
    experts without tokens, which get the moment of all tokens of the layer.
    """
    down = down_of(bank)
    count, width = down.shape[0], down.shape[-1]
    moments = torch.zeros(count, width, width, dtype=torch.float64, device=down.device)
    without = []
    for expert in range(count):
        rows, choice = (tokens.chosen == expert).nonzero(as_tuple=True)
        if len(rows) == 0:
            without.append(expert)
            rows, weight = torch.arange(len(tokens.hidden)), tokens.weights.mean()
        else:
            weight = tokens.weights[rows, choice][:, None]
        units = (activations(bank, expert, tokens.hidden[rows]) * weight).double()
        moments[expert] = units.T @ units
    return moments, without


def surgeon(moment: Tensor, down: Tensor, units: int) -> tuple[Tensor, Tensor]:
    """Take away units of one expert until `units` are left.

    Args:
        moment: (I, I) float64, the second moment of the units.
        down: (H, I) float64.
        units: how many stay.

    Returns:
        The units that stay, (units,) in ascending order, and their columns (H, units): of all down
        projections with these units, the one with the least damped squared error.
    """
    moment = damped(moment)
    inverse, work = torch.linalg.inv(moment), down.clone()
    gone = torch.zeros(len(moment), dtype=torch.bool, device=moment.device)
    for _ in range(len(moment) - units):
        scores = work.square().sum(0) / inverse.diagonal()
        unit = int(scores.masked_fill(gone, float("inf")).argmin())
        row = inverse[unit] / inverse[unit, unit]
        work -= torch.outer(work[:, unit], row)
        inverse -= torch.outer(inverse[:, unit], row)
        gone[unit] = True
        inverse[unit, unit] = 1.0  # never divided by again
    kept = (~gone).nonzero()[:, 0]
    return kept, repaired(moment, down, kept)


def damped(moment: Tensor) -> Tensor:
    """Return the second moment with `DAMPING`; of units that are always 0 the identity."""
    mean = moment.diagonal().mean()
    share = DAMPING * mean if mean > 0 else torch.ones_like(mean)
    return moment + share * torch.eye(len(moment), dtype=moment.dtype, device=moment.device)


def repaired(moment: Tensor, down: Tensor, kept: Tensor) -> Tensor:
    """Return the least-squares down projection from the units that stay, (H, units).

    The minimum of |(V - W) a|^2 over V that is zero elsewhere, for inputs a of this second moment.
    """
    return torch.linalg.solve(moment[kept][:, kept], moment[kept] @ down.T).T

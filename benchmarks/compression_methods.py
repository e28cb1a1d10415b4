# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Ways to compress banks of experts: those of `vlmoe.compress`, and what they are compared with.

Methods that change no size give a bank's weights as they would be after decompression: what they
cost in accuracy is measured, what they save is counted by formula.

Shapes: E experts, I units, H hidden size.
"""

from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedModel

from vlmoe.compression.banks import (
    GATE_UP,
    activations,
    decoder_banks,
    down_of,
    keep_experts,
    keep_units,
)
from vlmoe.compression.calibration import BankTokens, Calibration, bank_tokens
from vlmoe.compression.sizes import expert_groups, set_count, set_width
from vlmoe.compression.subsets import best_by_score, choose_subset, gather_answers, saliency
from vlmoe.compression.units import narrow_bank

Tensor = torch.Tensor
UNITS = (
    "surgeon",
    "surgeon, text tokens only",
    "surgeon, image tokens only",
    "magnitude",
    "random",
)
"""Ways to choose units, whose number is given."""
CRITERIA = ("fisher", "reap-answers", "reap", "frequency", "random")
"""Ways to choose experts, whose number is given."""
WEIGHTS = ("svd", "whitened svd", "2:4", "zeros")
"""Ways to change weights, for a share of the bank's numbers that stays."""


def narrow(
    model: PreTrainedModel, calibration: Calibration, method: str, units: int, seed: int
) -> None:
    """Keep so many units of each expert, in place, layer after layer."""
    generator = torch.Generator().manual_seed(seed)
    present = down_of(decoder_banks(model)[0].experts).shape[-1]
    for layer in decoder_banks(model):
        bank, down = layer.experts, down_of(layer.experts).detach()
        if method.startswith("surgeon"):
            tokens = _of_kind(bank_tokens(model, layer, calibration.batches), method)
            narrowed = narrow_bank(bank, tokens, units)
            keep_units(bank, narrowed.kept, narrowed.down)
            continue
        scores = torch.rand(down.shape[0], down.shape[-1], generator=generator)
        if method == "magnitude":
            gate, up = bank.get_parameter(GATE_UP).detach().norm(dim=-1).chunk(2, dim=-1)
            scores = down.norm(dim=1) * gate * up
        kept = scores.topk(units, dim=-1).indices.sort(-1).values
        keep_units(bank, kept, down.gather(2, kept[:, None].expand(-1, down.shape[1], -1)))
    set_width(model, present, units)


def drop(
    model: PreTrainedModel, calibration: Calibration, criterion: str, experts: int, seed: int
) -> None:
    """Keep so many experts of each layer, in place."""
    layers = decoder_banks(model)
    groups, counts = expert_groups(model.config, layers[0], experts)
    if criterion == "fisher":
        answers = gather_answers(model, layers, calibration.batches, seed)
        pairs = zip(layers, answers, strict=True)
        chosen = [choose_subset(layer, tokens, groups, counts) for layer, tokens in pairs]
    else:
        generator = torch.Generator().manual_seed(seed)
        scores = [
            torch.rand(layer.num_experts, generator=generator)
            if criterion == "random"
            else saliency(model, layer, calibration.batches, criterion)  # type: ignore[arg-type]
            for layer in layers
        ]
        chosen = [best_by_score(each, groups, counts) for each in scores]
    for layer, kept in zip(layers, chosen, strict=True):
        keep_experts(layer, kept)
    set_count(model, chosen[-1])


@torch.no_grad()
def rewrite(
    model: PreTrainedModel, calibration: Calibration, method: str, share: float, seed: int
) -> None:
    """Give the banks the weights that they have after compression to a share of their numbers."""
    change: Callable[[Tensor, Tensor], Tensor] = {
        "svd": lambda weight, inputs: truncated(weight, rank_of(weight, share)),
        "whitened svd": lambda weight, inputs: projected(weight, inputs, rank_of(weight, share)),
        "2:4": lambda weight, inputs: two_of_four(weight),
        "zeros": lambda weight, inputs: largest(weight, share),
    }[method]
    for layer in decoder_banks(model):
        tokens = bank_tokens(model, layer, calibration.batches)
        gate_up, down = layer.experts.get_parameter(GATE_UP), down_of(layer.experts)
        for expert in range(layer.num_experts):
            own = tokens.hidden[(tokens.chosen == expert).any(-1)]
            units = activations(layer.experts, expert, own)  # before gate and up change
            gate_up[expert] = change(gate_up[expert].double(), own.double())
            down[expert] = change(down[expert].double(), units.double())


def rank_of(weight: Tensor, share: float) -> int:
    """Return the rank whose two factors have this share of a matrix's numbers."""
    rows, columns = weight.shape
    return max(1, int(share * rows * columns / (rows + columns)))


def truncated(weight: Tensor, rank: int) -> Tensor:
    """Return the nearest matrix of a rank."""
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    return u[:, :rank] * s[:rank] @ v[:rank]


def projected(weight: Tensor, inputs: Tensor, rank: int) -> Tensor:
    """Return the matrix of a rank with the nearest outputs for these inputs.

    The projection on the top eigenvectors of W C W^T, with the second moment C of the inputs. Equal
    to the SVD whitened by a Cholesky factor of C (SVD-LLM, https://arxiv.org/abs/2403.07378), and
    defined where C is singular and has none.
    """
    outputs = weight @ (inputs.T @ inputs) @ weight.T
    top = torch.linalg.eigh(outputs).eigenvectors[:, -rank:]
    return top @ top.T @ weight


def two_of_four(weight: Tensor) -> Tensor:
    """Return the matrix with the two smaller numbers of every four in a row set to 0."""
    fours = weight.unflatten(-1, (-1, 4))
    kept = torch.zeros_like(fours).scatter(-1, fours.abs().topk(2, dim=-1).indices, 1.0)
    return (fours * kept).flatten(-2)


def largest(weight: Tensor, share: float) -> Tensor:
    """Return the matrix with all but a share of its largest numbers set to 0."""
    count = max(1, int(share * weight.numel()))
    smallest = weight.abs().flatten().topk(count).values[-1]
    return weight * (weight.abs() >= smallest)


def stored_share(method: str, share: float) -> float:
    """Return the bytes of a stored bank over those of the dense one, both in fp32.

    2:4 keeps half of the numbers and two bits of place for each; CSR a 32-bit column number beside
    every number that is not 0.
    """
    return {"2:4": 0.5 + 0.5 * 2 / 32, "zeros": 2 * share}.get(method, share)


def _of_kind(tokens: BankTokens, method: str) -> BankTokens:
    """Return the tokens of one kind, where the method asks for it."""
    kinds: Sequence[tuple[str, int]] = (("text tokens only", 0), ("image tokens only", 1))
    for name, kind in kinds:
        if name in method:
            keep = tokens.kinds == kind
            return BankTokens(*(each[keep] for each in vars(tokens).values()))
    return tokens

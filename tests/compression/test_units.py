"""Narrower experts: the choice and the repair of units against least squares in float64."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from compression_cases import CASES, calibration_of, case

from vlmoe.compression.banks import decoder_banks, keep_units
from vlmoe.compression.calibration import BankTokens, bank_tokens
from vlmoe.compression.units import (
    DAMPING,
    damped,
    narrow_bank,
    second_moments,
    surgeon,
)

Tensor = torch.Tensor


def least_squares(activations: Tensor, down: Tensor, kept: list[int], share: float) -> Tensor:
    """The minimum of |A V^T - A W^T|^2 + d |V - W|^2, by an augmented system, in float64."""
    width = activations.shape[1]
    damping = share * activations.square().sum(0).mean()
    rows = torch.cat([activations, damping.sqrt() * torch.eye(width, dtype=torch.float64)])
    return torch.linalg.lstsq(rows[:, kept], rows @ down.T).solution.T


def error(activations: Tensor, down: Tensor, kept: list[int]) -> float:
    """The damped squared error of the best repair."""
    repaired = torch.zeros_like(down)
    repaired[:, kept] = least_squares(activations, down, kept, DAMPING)
    damping = DAMPING * activations.square().sum(0).mean()
    change = repaired - down
    return float((activations @ change.T).square().sum() + damping * change.square().sum())


def drawn(tokens: int = 40, units: int = 7, hidden: int = 5) -> tuple[Tensor, Tensor]:
    torch.manual_seed(tokens)
    mixed = torch.randn(units, units, dtype=torch.float64)
    activations = torch.randn(tokens, units, dtype=torch.float64) @ mixed
    return activations, torch.randn(hidden, units, dtype=torch.float64)


@pytest.mark.parametrize("tokens", [40, 4])
def test_the_unit_that_goes_is_that_of_least_error(tokens: int) -> None:
    activations, down = drawn(tokens)
    kept, _ = surgeon(activations.T @ activations, down, 6)
    every = [list(each) for each in itertools.combinations(range(7), 6)]
    best = min(every, key=lambda each: error(activations, down, each))
    assert kept.tolist() == best


@pytest.mark.parametrize("tokens", [40, 4])
@pytest.mark.parametrize("units", [6, 3, 1])
def test_repaired_columns_are_those_of_least_squares(tokens: int, units: int) -> None:
    activations, down = drawn(tokens)
    kept, repaired = surgeon(activations.T @ activations, down, units)
    expected = least_squares(activations, down, kept.tolist(), DAMPING)
    assert (repaired - expected).norm() < 1e-6 * expected.norm()


def test_units_that_are_taken_away_one_by_one_add_up_to_the_closed_form() -> None:
    """The updates of optimal brain surgeon, one unit at a time, end at the same columns."""
    activations, down = drawn()
    moment = damped(activations.T @ activations)
    work, inverse = down.clone(), torch.linalg.inv(moment)
    kept, repaired = surgeon(activations.T @ activations, down, 3)
    for unit in (n for n in range(7) if n not in kept.tolist()):
        row = inverse[unit] / inverse[unit, unit]
        work -= torch.outer(work[:, unit], row)
        inverse -= torch.outer(inverse[:, unit], row)
    assert torch.allclose(work[:, kept], repaired, atol=1e-9)


@pytest.mark.parametrize("name", CASES)
def test_a_narrowed_bank_is_the_reference_in_float64(name: str) -> None:
    """Selection, repair and cutting of each family's own bank, against a loop over experts."""
    model, batches = case(name)
    layer = decoder_banks(model)[-1]
    bank, tokens = layer.experts, bank_tokens(model, layer, batches)
    gate_up, down = bank.gate_up_proj.detach().double(), bank.down_proj.detach().double()
    units, output = 8, torch.zeros_like(tokens.hidden, dtype=torch.float64)
    narrowed = narrow_bank(bank, tokens, units)
    for expert in range(len(down)):
        rows, choice = (tokens.chosen == expert).nonzero(as_tuple=True)
        weights = tokens.weights[rows, choice][:, None].double()
        gate, up = (tokens.hidden[rows].double() @ gate_up[expert].T).chunk(2, -1)
        activations = bank.act_fn(gate) * up
        kept = narrowed.kept[expert].tolist()
        assert kept == sorted(set(kept))
        expected = least_squares(activations * weights, down[expert], kept, DAMPING)
        assert (narrowed.down[expert] - expected).norm() < 1e-6 * expected.norm()
        output[rows] += weights * (activations[:, kept] @ expected.T)
    keep_units(bank, narrowed.kept, narrowed.down)
    with torch.no_grad():
        found = bank(tokens.hidden, tokens.chosen, tokens.weights)
    assert (found - output).abs().max() < 1e-5 * output.abs().max()


def test_units_that_are_never_active_go_first_and_cost_nothing() -> None:
    model, batches = case("vlmoe")
    layer = decoder_banks(model)[0]
    bank, width = layer.experts, layer.experts.down_proj.shape[-1]
    idle = torch.stack([torch.randperm(width)[: width // 2] for _ in range(len(bank.down_proj))])
    with torch.no_grad():
        for expert, units in enumerate(idle):
            bank.gate_up_proj[expert, width + units] = 0
    tokens = bank_tokens(model, layer, batches)
    with torch.no_grad():
        before = bank(tokens.hidden, tokens.chosen, tokens.weights)
        narrowed = narrow_bank(bank, tokens, width // 2)
        keep_units(bank, narrowed.kept, narrowed.down)
        after = bank(tokens.hidden, tokens.chosen, tokens.weights)
    for expert, units in enumerate(idle):
        assert not set(units.tolist()) & set(narrowed.kept[expert].tolist())
    assert (after - before).abs().max() < 1e-6 * before.abs().max()


def test_an_expert_without_tokens_is_named_and_gets_those_of_the_layer() -> None:
    model, batches = case("vlmoe")
    layer = decoder_banks(model)[0]
    tokens = bank_tokens(model, layer, batches)
    is_one = tokens.chosen == 1
    chosen = torch.where(is_one, (tokens.chosen.sum(-1, keepdim=True) + 2) % 4, tokens.chosen)
    chosen = torch.where(chosen == 1, 0, chosen)
    moments, without = second_moments(
        layer.experts, BankTokens(tokens.hidden, chosen, tokens.weights, tokens.kinds)
    )
    assert without == [1]
    gate, up = F.linear(tokens.hidden, layer.experts.gate_up_proj[1]).chunk(2, -1)
    units = (layer.experts.act_fn(gate) * up * tokens.weights.mean()).detach().double()
    assert torch.allclose(moments[1], units.T @ units)


def test_padding_is_left_out() -> None:
    model, batches = case("vlmoe")
    layer = decoder_banks(model)[0]
    tokens = bank_tokens(model, layer, batches)
    assert len(tokens.hidden) == sum(int(batch["attention_mask"].sum()) for batch in batches)
    assert calibration_of("vlmoe").tokens["image"] == int((tokens.kinds == 1).sum()) > 0

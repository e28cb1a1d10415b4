"""Fewer experts: the chosen set against trying all sets on banks and routers that were cut."""

import copy
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compression_cases import CASES, case, vlmoe_model

from vlmoe.compression.banks import decoder_banks, keep_experts
from vlmoe.compression.calibration import answer_positions, bank_tokens, model_inputs
from vlmoe.compression.sizes import expert_groups, set_count
from vlmoe.compression.subsets import (
    best_by_score,
    choose_subset,
    gather_answers,
    greedy,
    projections,
    restricted_output,
    saliency,
)

Tensor = torch.Tensor
ROUTERS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "sigmoid with a bias": {"scoring_func": "sigmoid", "router_bias_update_rate": 0.1},
    "modality bias": {"router_modality_bias": True},
    "not normalized": {"norm_topk_prob": False, "routed_scaling_factor": 2.5},
}


def outputs(model: Any, layer: Any, batches: Any) -> Tensor:
    """What the bank gives for the tokens that predict an answer, after its own router."""
    tokens = bank_tokens(model, layer, batches)
    real = torch.cat([batch["attention_mask"].flatten().bool() for batch in batches])
    answers = torch.cat([answer_positions(batch).flatten() for batch in batches])[real]
    with torch.no_grad():
        return layer.experts(tokens.hidden, tokens.chosen, tokens.weights)[answers]


@pytest.mark.parametrize(
    ("name", "fields"),
    [(name, {}) for name in CASES] + [("vlmoe", fields) for fields in ROUTERS.values()],
)
def test_the_chosen_set_has_the_least_error_of_all(name: str, fields: dict[str, Any]) -> None:
    """Every set is tried on a copy of the model whose bank and router are really cut."""
    model, batches = case(name, **fields)
    with torch.no_grad():
        for each in decoder_banks(model):
            each.router.weight.normal_(0, 1)
            for bias in ("modality_bias", "e_score_correction_bias"):
                if getattr(each.router, bias, None) is not None:
                    getattr(each.router, bias).normal_(0, 0.3)
    layers = decoder_banks(model)
    number = len(layers) - 1
    tokens = gather_answers(model, layers, batches)[number]
    before = outputs(model, layers[number], batches)
    errors = {}
    for kept in itertools.combinations(range(4), 3):
        cut = copy.deepcopy(model)
        layer = decoder_banks(cut)[number]
        keep_experts(layer, kept)
        if hasattr(cut.config, "text_config"):
            cut.config.text_config.num_experts = 3
        change = outputs(cut, layer, batches) - before
        errors[kept] = float((change.double() * tokens.gradient.double()).sum(-1).square().sum())
    effect = projections(layers[number].experts, tokens)
    full = restricted_output(layers[number], tokens, effect, range(4))
    for kept, expected in errors.items():
        found = restricted_output(layers[number], tokens, effect, kept) - full
        assert float(found.square().sum()) == pytest.approx(expected, rel=1e-3)
    groups, counts = expert_groups(model.config, layers[number], 3)
    chosen = choose_subset(layers[number], tokens, groups, counts)
    assert tuple(chosen) == min(errors, key=lambda kept: errors[kept])


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_the_answers_loss(name: str) -> None:
    """A small change of a bank's output changes the loss of the sampled answers by g times it."""
    model, batches = case(name)
    batches, layers = batches[:1], decoder_banks(model)
    answers = gather_answers(model, layers, batches, seed=3)[0]
    torch.manual_seed(1)
    direction = torch.randn_like(answers.gradient)
    flat = answer_positions(batches[0]).flatten()
    generator = torch.Generator().manual_seed(3)

    def loss(step: float) -> float:
        def shift(bank: Any, args: Any, output: Tensor) -> Tensor:
            moved = output.reshape(len(flat), -1).clone()
            moved[flat] += step * direction
            return moved.view_as(output)

        handle = layers[0].experts.register_forward_hook(shift)
        with torch.no_grad():
            logits = model(**model_inputs(model, batches[0])).logits.double()
        handle.remove()
        return float(
            F.cross_entropy(logits[answer_positions(batches[0])], sampled, reduction="sum")
        )

    with torch.no_grad():
        logits = model(**model_inputs(model, batches[0])).logits[answer_positions(batches[0])]
    sampled = torch.multinomial((logits / 2).softmax(-1), 1, generator=generator)[:, 0]
    step = 3e-4  # so small that no router chooses otherwise
    slope = (loss(step) - loss(-step)) / (2 * step)
    assert float((answers.gradient * direction).sum()) == pytest.approx(slope, rel=2e-2, abs=1e-2)


def test_a_sure_and_right_model_has_a_gradient_from_sampled_answers_only() -> None:
    model, batches = case("vlmoe")
    batch = batches[0]
    positions = answer_positions(batch)
    right = batch["labels"][:, 1:][batch["labels"][:, 1:] >= 0]
    layers = decoder_banks(model)

    def true_loss() -> Tensor:
        logits = model(**model_inputs(model, batch)).logits[positions]
        return F.cross_entropy(logits, right, reduction="sum")

    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    while (loss := true_loss()) > 0.02 * len(right):
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    sampled = gather_answers(model, layers, [batch])[-1].gradient.norm()
    kept: list[Tensor] = []

    def keep(bank: Any, args: Any, output: Tensor) -> None:
        output.retain_grad()
        kept.append(output)

    handle = layers[-1].experts.register_forward_hook(keep)
    true_loss().backward()
    handle.remove()
    assert kept[0].grad is not None
    assert kept[0].grad.norm() < 0.2 * sampled


def test_greedy_takes_the_least_error_each_time() -> None:
    cost = {0: 5.0, 1: 1.0, 2: 3.0, 3: 2.0}
    seen = []

    def error(kept: Any) -> float:
        seen.append(tuple(kept))
        return sum(value for expert, value in cost.items() if expert not in kept)

    assert greedy([[0, 1, 2, 3]], [2], error) == [0, 2]
    assert len(seen) == 4 + 3
    assert greedy([[0, 1], [2, 3]], [1, 1], error) == [0, 2]


def test_scores_of_comparison_are_those_counted_by_hand() -> None:
    model, batches = case("vlmoe")
    layer = decoder_banks(model)[0]
    tokens = bank_tokens(model, layer, batches)
    counts = torch.bincount(tokens.chosen.flatten(), minlength=4).float()
    assert torch.equal(saliency(model, layer, batches, "frequency"), counts)
    total = torch.zeros(4)
    for token, chosen, weights in zip(tokens.hidden, tokens.chosen, tokens.weights, strict=True):
        for expert, weight in zip(chosen.tolist(), weights.tolist(), strict=True):
            one = torch.tensor([[expert]])
            with torch.no_grad():
                total[expert] += layer.experts(token[None], one, torch.tensor([[weight]])).norm()
    assert torch.allclose(saliency(model, layer, batches, "reap"), total / counts, rtol=1e-4)
    answers = saliency(model, layer, batches, "reap-answers")
    assert not torch.allclose(answers, total / counts, rtol=1e-2)
    assert best_by_score(torch.tensor([1.0, 4.0, 3.0, 2.0]), [[0, 1, 2, 3]], [2]) == [1, 2]


def test_modalities_keep_their_share_and_are_renumbered() -> None:
    lists = {"text": [0, 2, 3], "image": [1, 3, 2]}
    model = vlmoe_model(num_experts=6, modality_experts={"text": [0, 2, 4], "image": [1, 3, 5]})
    layer = decoder_banks(model)[0]
    groups, counts = expert_groups(model.config, layer, 4)
    assert groups == [[0, 2, 4], [1, 3, 5]]
    assert counts == [2, 2]
    for each, kept in zip(
        decoder_banks(model), ([0, 4, 1, 3], [2, 4, 3, 5], [0, 2, 1, 5]), strict=True
    ):
        keep_experts(each, kept)
    set_count(model, [0, 4, 1, 3])
    assert model.config.text_config.modality_experts == {"text": [0, 1], "image": [2, 3]}
    assert model.config.text_config.num_experts == 4
    with pytest.raises(ValueError, match=r"`experts` is 3: 1 of them .* image"):
        expert_groups(
            vlmoe_model(num_experts=6, modality_experts=lists | {"text": [0, 4, 5]}).config,
            layer,
            3,
        )

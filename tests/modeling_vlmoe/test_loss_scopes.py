"""The scopes of the balance loss, and the entropy terms of the modalities."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from vlmoe import VLMoEForConditionalGeneration
from vlmoe.modeling_vlmoe.router_losses import (
    RouterLosses,
    decoder_router_losses,
    global_entropy_loss,
    load_balancing_loss,
    local_entropy_loss,
)

LAYERS, ROWS, LENGTH, EXPERTS, TOP_K = 3, 4, 9, 8, 2
BOTH_SCORES = pytest.mark.parametrize("scoring_func", ["softmax", "sigmoid"])
Logits = tuple[torch.Tensor, ...]


@pytest.fixture
def batch() -> dict[str, Any]:
    """Rows with padding right and left, of image and text, only text, and only image tokens."""
    torch.manual_seed(0)
    logits = tuple(
        torch.randn(ROWS * LENGTH, EXPERTS, requires_grad=True) * 2 for _ in range(LAYERS)
    )
    mask = torch.ones(ROWS, LENGTH, dtype=torch.bool)
    mask[0, 6:] = mask[1, :4] = False
    types = torch.zeros(ROWS, LENGTH, dtype=torch.long)
    types[0, :4] = types[3] = types[2, 3:8] = 1
    row_weights = torch.tensor([0.4, 0.1, 0.3, 0.2])
    return {
        "router_logits": logits,
        "token_mask": mask,
        "row_weights": row_weights,
        "mm_token_type_ids": types,
    }


@pytest.fixture
def losses(tiny_config: Callable[..., Any]) -> Callable[..., RouterLosses]:
    """`losses(batch, **text fields)`: what the model adds to its loss."""

    def compute(batch: dict[str, Any], training: bool = True, **fields: Any) -> RouterLosses:
        sizes = {"num_experts": EXPERTS, "num_experts_per_tok": TOP_K}
        config = tiny_config(text=sizes | fields).text_config
        return decoder_router_losses(config, **batch, training=training)

    return compute


def rows_of(batch: dict[str, Any], rows: slice) -> dict[str, Any]:
    """The batch that a rank with these rows has."""
    by_row = [layer.unflatten(0, (ROWS, LENGTH))[rows] for layer in batch["router_logits"]]
    logits = tuple(layer.flatten(0, 1) for layer in by_row)
    others = {name: value[rows] for name, value in batch.items() if name != "router_logits"}
    return {"router_logits": logits} | others


def test_scope_batch_is_the_loss_of_transformers_in_each_layer(
    batch: dict[str, Any], losses: Callable[..., RouterLosses]
) -> None:
    weight = batch["row_weights"].sum() / 2  # of a micro-batch with half of the label tokens
    batch["row_weights"] /= 2
    mask = batch["token_mask"].flatten()
    expected = sum(
        load_balancing_loss_func((layer[mask],), EXPERTS, TOP_K).item()
        for layer in batch["router_logits"]
    )
    ours = losses(batch, router_aux_loss_scope="batch").aux_loss
    assert ours.item() == pytest.approx(weight.item() * expected / LAYERS, rel=1e-5)
    assert ours.item() != pytest.approx(losses(batch).aux_loss.item(), rel=1e-2)


def test_scope_global_is_scope_batch_in_one_process_bit_for_bit(
    batch: dict[str, Any], losses: Callable[..., RouterLosses]
) -> None:
    fields = {"router_global_entropy_coef": {"image": 1.0, "text": 1.0}}
    results = []
    for scope in ("batch", "global"):
        total = losses(batch, router_aux_loss_scope=scope, **fields).total
        gradients = torch.autograd.grad(total, batch["router_logits"], retain_graph=True)
        results.append((total, *gradients))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@BOTH_SCORES
@pytest.mark.parametrize("spread_over", [EXPERTS, 5])
def test_ranks_of_scope_global_add_up_to_one_process(
    spread_over: int, scoring_func: str, batch: dict[str, Any]
) -> None:
    one_row = {
        "token_mask": batch["token_mask"].reshape(1, -1),
        "row_weights": batch["row_weights"].sum()[None],
    }
    ranks = [rows_of(batch, slice(0, 1)), rows_of(batch, slice(1, ROWS))]

    def on_all(loss: Callable[..., torch.Tensor]) -> tuple[torch.Tensor, ...]:
        whole = loss(batch["router_logits"], **one_row)
        sent: list[torch.Tensor] = []
        for summed in (sent.append, lambda _: sent[0] + sent[1]):  # first listen, then answer
            parts = [
                loss(
                    rank["router_logits"],
                    token_mask=rank["token_mask"].reshape(1, -1),
                    row_weights=rank["row_weights"].sum()[None],
                    summed=lambda own, summed=summed: own if summed(own) is None else summed(own),
                )
                for rank in ranks
            ]
        inputs = batch["router_logits"]
        for value in (whole, sum(parts)):
            yield (value, *torch.autograd.grad(value, inputs, retain_graph=True))

    def balance(logits: Logits, **arguments: Any) -> torch.Tensor:
        return load_balancing_loss(logits, TOP_K, scoring_func=scoring_func, **arguments)

    def spread(logits: Logits, **arguments: Any) -> torch.Tensor:
        scored = {"scoring_func": scoring_func, "spread_over": spread_over}
        return global_entropy_loss(logits, **scored, **arguments)

    for loss in (balance, spread):
        whole, added = on_all(loss)
        for one, other in zip(whole, added, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_only_training_waits_for_other_ranks(
    batch: dict[str, Any], losses: Callable[..., RouterLosses], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: calls.append(tensor))
    alone = losses(batch, router_aux_loss_scope="global", training=False)
    assert not calls
    trained = losses(batch, router_aux_loss_scope="global")
    assert len(calls) == 1 and torch.equal(alone.total, trained.total)


def entropy(probabilities: list[float]) -> float:
    return -sum(p * math.log(p) for p in probabilities if p)


def entropies_of(
    batch: dict[str, Any], modality: int, scoring_func: str, spread_over: int
) -> tuple[float, float]:
    """Local and global term, row by row in plain Python floats."""
    local = wanted = 0.0
    for layer in batch["router_logits"]:
        rows = layer.detach().double().view(ROWS, LENGTH, EXPERTS).tolist()
        for row, weight in enumerate(batch["row_weights"].tolist()):
            routed = []
            for position, token in enumerate(rows[row]):
                real = batch["token_mask"][row, position]
                if real and batch["mm_token_type_ids"][row, position] == modality:
                    sigmoid = [1 / (1 + math.exp(-z)) for z in token]
                    score = [math.exp(z) for z in token] if scoring_func == "softmax" else sigmoid
                    routed.append([s / sum(score) for s in score])
            if routed:
                mean = [sum(column) / len(routed) for column in zip(*routed, strict=True)]
                local += weight * sum(map(entropy, routed)) / len(routed) / LAYERS
                wanted += weight * max(0, math.log(spread_over) - entropy(mean)) / LAYERS
    return local, wanted


@BOTH_SCORES
@pytest.mark.parametrize("modality", [0, 1])
@pytest.mark.parametrize("spread_over", [EXPERTS, 6])
def test_entropy_terms_equal_a_float64_reference(
    spread_over: int, modality: int, scoring_func: str, batch: dict[str, Any]
) -> None:
    local, wanted = entropies_of(batch, modality, scoring_func, spread_over)
    mask = batch["token_mask"] & (batch["mm_token_type_ids"] == modality)
    arguments = batch["router_logits"], mask, batch["row_weights"], scoring_func
    assert local_entropy_loss(*arguments).item() == pytest.approx(local, rel=1e-5)
    spread = global_entropy_loss(*arguments, spread_over=spread_over)
    assert spread.item() == pytest.approx(wanted, rel=1e-4, abs=1e-6)


@BOTH_SCORES
def test_the_gradient_of_the_global_term_is_that_of_its_definition(
    scoring_func: str, batch: dict[str, Any]
) -> None:
    logits = batch["router_logits"][0].double()
    scores = logits.softmax(-1) if scoring_func == "softmax" else logits.sigmoid()
    mean = (scores / scores.sum(-1, keepdim=True)).mean(0)
    (expected,) = torch.autograd.grad((mean * mean.log()).sum(), logits, retain_graph=True)
    one_row = torch.ones(1, len(logits), dtype=torch.bool), torch.ones(1)
    ours = global_entropy_loss((logits,), *one_row, scoring_func, spread_over=EXPERTS)
    (gradient,) = torch.autograd.grad(ours, logits)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-7)


def test_collapse_of_one_modality_shows_in_its_global_term_only() -> None:
    logits = torch.randn(2 * LENGTH, EXPERTS) * 0.1
    logits[:LENGTH, 3] += 40.0  # image tokens, all to one expert
    mask = torch.zeros(1, 2 * LENGTH, dtype=torch.bool)
    mask[0, :LENGTH] = True
    collapsed, spread = (
        global_entropy_loss((logits,), part, torch.ones(1), spread_over=EXPERTS).item()
        for part in (mask, ~mask)
    )
    assert collapsed == pytest.approx(math.log(EXPERTS), rel=1e-5) and spread < 0.01
    assert local_entropy_loss((logits,), mask, torch.ones(1)).item() == pytest.approx(0, abs=1e-6)


def test_the_config_weighs_the_entropy_terms(
    batch: dict[str, Any], losses: Callable[..., RouterLosses]
) -> None:
    off = losses(batch)
    assert off.entropy_loss is None
    fields = {
        "router_local_entropy_coef": {"text": 0.5},
        "router_global_entropy_coef": {"text": 0.25, "image": 2.0},
        "router_global_entropy_experts": {"image": 6},
    }
    on = losses(batch, **fields)
    local, text = entropies_of(batch, 0, "softmax", EXPERTS)
    _, image = entropies_of(batch, 1, "softmax", 6)
    assert on.entropy_loss.item() == pytest.approx(0.5 * local + 0.25 * text + 2 * image, rel=1e-4)
    torch.testing.assert_close(on.total, off.total + on.entropy_loss)


def test_the_model_adds_the_entropy_terms_to_its_loss(
    tiny_model: Callable[..., VLMoEForConditionalGeneration], tiny_batch: Callable[..., Any]
) -> None:
    model = tiny_model(text={"router_global_entropy_coef": {"image": 3.0, "text": 1.0}})
    inputs = tiny_batch(model.config, ["..a...", "....."])
    types = inputs.pop("mm_token_type_ids")
    labels = inputs["input_ids"].where(inputs["attention_mask"] == 1, -100)
    output = model(**inputs, labels=labels, output_router_logits=True)
    counts = (labels[:, 1:] != -100).sum(1)
    masks = [inputs["attention_mask"].bool() & (types == modality) for modality in (0, 1)]
    text, image = (
        global_entropy_loss(output.router_logits, mask, counts / counts.sum(), spread_over=4)
        for mask in masks
    )
    torch.testing.assert_close(output.entropy_loss, text + 3 * image)
    model.config.text_config.router_global_entropy_coef = None
    without = model(**inputs, labels=labels)
    assert without.entropy_loss is None
    torch.testing.assert_close(output.loss, without.loss + output.entropy_loss)

"""Weights of rows in the loss: against a loop over tokens, and against rows without weights."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from vlmoe import VLMoEForConditionalGeneration
from vlmoe.modeling_vlmoe.label_loss import label_counts
from vlmoe.training.sparse_loss import SparseLoss

Model = Callable[..., VLMoEForConditionalGeneration]
Batch = dict[str, torch.Tensor]

WEIGHTS = torch.tensor([0.02, 3.0, 0.0, 0.5])
FIELDS = {"router_aux_loss_coef": 1.0, "router_z_loss_coef": 1.0}


@pytest.fixture
def batch(tiny_model: Model, tiny_batch: Callable[..., Batch]) -> Batch:
    """Rows of unlike lengths; the first label is predicted by no token."""
    config = tiny_model().config
    batch = tiny_batch(config, [".." + "." * n for n in (3, 1, 6, 9)], padding="right")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[0, 2] = labels[3, 1:4] = -100
    return batch | {"labels": labels}


def gradients(model: torch.nn.Module) -> torch.Tensor:
    """Take all gradients as one vector."""
    taken = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    return taken


def test_a_label_token_counts_as_often_as_its_rows_weight(tiny_model: Model, batch: Batch) -> None:
    model = tiny_model(text={"router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.0})
    output = model(**batch, loss_weights=WEIGHTS)
    logits = output.logits.double()
    total = weight = 0.0
    sums = [0.0] * len(WEIGHTS)
    for i, row in enumerate(batch["labels"]):
        for position in range(1, len(row)):
            if row[position] != -100:
                loss = -logits[i, position - 1].log_softmax(-1)[row[position]].item()
                total, weight = total + WEIGHTS[i].item() * loss, weight + WEIGHTS[i].item()
                sums[i] += loss
    assert output.loss.item() == pytest.approx(total / weight, rel=1e-6)
    assert output.row_losses.tolist() == pytest.approx(sums, rel=1e-6)


@pytest.mark.parametrize("loss", ["the model's", "SparseLoss"])
def test_weights_of_one_give_the_loss_without_weights_and_only_ratios_count(
    tiny_model: Model, batch: Batch, loss: str
) -> None:
    model = tiny_model(text=FIELDS).train()

    def run(weights: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        if loss == "SparseLoss":
            inputs = {name: each for name, each in batch.items() if name != "labels"}
            value = sparse(model(**inputs), batch["labels"], None, weights)
        else:
            value = model(**batch, loss_weights=weights).loss
        value.backward()
        return value.detach(), gradients(model)

    sparse = SparseLoss(model) if loss == "SparseLoss" else None
    plain, ones = run(None), run(torch.ones(4))
    once, thrice = run(WEIGHTS), run(3 * WEIGHTS)
    for ours, theirs in ((ones, plain), (thrice, once)):
        assert all((a - b).norm() <= 1e-5 * b.norm() for a, b in zip(ours, theirs, strict=True))
    assert (once[1] - plain[1]).norm() > 0.01 * plain[1].norm()


def test_the_weighted_update_does_not_depend_on_the_split_and_leaves_out_weight_zero(
    tiny_model: Model, batch: Batch
) -> None:
    model = tiny_model(text=FIELDS).train()
    model(**batch, loss_weights=WEIGHTS).loss.backward()
    whole = gradients(model)
    items = label_counts(batch["labels"], WEIGHTS).sum()
    assert items < 40
    for rows in ((0, 1), (1, 2), (3, 4)):  # without the row whose weight is 0
        part = {name: each[slice(*rows)] for name, each in batch.items()}
        weights = WEIGHTS[slice(*rows)]
        model(**part, loss_weights=weights, num_items_in_batch=items).loss.backward()
    assert (gradients(model) - whole).norm() <= 1e-5 * whole.norm()


def test_rows_that_weigh_next_to_nothing_or_nothing_have_a_finite_loss(
    tiny_model: Model, batch: Batch
) -> None:
    model = tiny_model(text=FIELDS)
    one, tiny = (model(**batch, loss_weights=torch.full((4,), w)).loss for w in (1.0, 1e-6))
    assert tiny.item() == pytest.approx(one.item(), rel=1e-5)
    assert model(**batch, loss_weights=torch.zeros(4)).loss.item() == 0


@pytest.mark.parametrize(
    ("change", "facts"),
    [
        ({"loss_weights": torch.ones(3)}, r"loss_weights.*\(3,\).*\(4,\)"),
        ({"loss_weights": torch.ones(4), "labels": None}, "no `labels`"),
    ],
)
def test_weights_without_their_labels_are_refused(
    tiny_model: Model, batch: Batch, change: dict[str, Any], facts: str
) -> None:
    with pytest.raises(ValueError, match=facts):
        tiny_model()(**batch | change)

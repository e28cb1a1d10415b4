"""Router losses that ride on hidden states: the gradient of loss + router losses, exactly once."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn

from vlmoe import VLMoEForConditionalGeneration
from vlmoe.training.riding_losses import RouterLossRide, backbone_of
from vlmoe.training.sparse_loss import SparseLoss

Model = Callable[..., VLMoEForConditionalGeneration]
Batch = dict[str, torch.Tensor]
COEFFICIENTS = {"router_aux_loss_coef": 1.0, "router_z_loss_coef": 1.0}
SCALE = 1 / 4  # as gradient accumulation scales a loss
TOLERANCE = 1e-5


@pytest.fixture
def model(tiny_model: Model) -> VLMoEForConditionalGeneration:
    return tiny_model(text=COEFFICIENTS).train()


@pytest.fixture
def batch() -> Batch:
    ids = torch.randint(5, 90, (4, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def foreign(hidden: torch.Tensor) -> torch.Tensor:
    """A loss of the last tokens that compares rows."""
    return nn.functional.cosine_similarity(hidden[:2, -1], hidden[2:, -1]).exp().sum()


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def in_one_piece(model: VLMoEForConditionalGeneration, batch: Batch) -> dict[str, torch.Tensor]:
    """Of the loss plus the router losses, added."""
    backbone = model.model
    output = backbone(**batch, output_router_logits=True)
    weights = torch.full((4,), 1 / 4)
    losses = backbone.router_losses(output.router_logits, batch["attention_mask"].bool(), weights)
    (SCALE * losses.added_to(foreign(output.last_hidden_state))).backward()
    return gradients(model)


def assert_equal(ours: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == expected.keys() and any("router" in name for name in ours)
    for name, gradient in expected.items():
        distance = (ours[name] - gradient).norm()
        assert distance <= TOLERANCE * gradient.norm() + 1e-9, name


@pytest.mark.parametrize("reentrant", [None, True, False])
def test_the_gradient_is_that_of_the_sum(
    reentrant: bool | None, model: VLMoEForConditionalGeneration, batch: Batch
) -> None:
    expected = in_one_piece(model, batch)
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
    with RouterLossRide(model, torch.full((4,), 1 / 4)) as ride:
        hidden = model.model(**batch).last_hidden_state
        model.model(**batch)  # carries nothing, as it is not the first
    (SCALE * ride.carried_by(foreign(hidden))).backward()
    ride.require_arrival()
    assert_equal(gradients(model), expected)
    (SCALE * foreign(model.model(**batch).last_hidden_state)).backward()
    without = gradients(model)
    router = next(name for name in without if "router" in name)
    assert (without[router] - expected[router]).norm() > 0.1 * expected[router].norm()


def test_the_gradient_is_that_of_the_sum_by_gradcache(
    model: VLMoEForConditionalGeneration, batch: Batch
) -> None:
    """The passes with gradient are inside of the backward pass, after that of the loss."""
    expected = in_one_piece(model, batch)
    pieces = [{name: values[i : i + 1] for name, values in batch.items()} for i in range(4)]
    with RouterLossRide(model, 1 / 4) as ride:
        with torch.no_grad():
            states = torch.cat([model.model(**piece).last_hidden_state for piece in pieces])
        leaf = states.requires_grad_()
        cached = foreign(leaf)
        (of_states,) = torch.autograd.grad(cached, leaf)
        loss = cached.detach().requires_grad_()

        def again(grad: torch.Tensor) -> None:
            for piece, gradient in zip(pieces, of_states.split(1), strict=True):
                model.model(**piece).last_hidden_state.backward(gradient * grad)

        loss.register_hook(lambda grad: torch.enable_grad()(again)(grad))
        assert ride.total is None
        (SCALE * ride.carried_by(loss)).backward()
    assert ride.total is not None
    assert_equal(gradients(model), expected)


def test_the_losses_are_computed_once(
    model: VLMoEForConditionalGeneration, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever else would add them is refused while they ride, and rides leave nothing behind."""
    calls = []
    backbone, compute = model.model, model.model.router_losses
    monkeypatch.setattr(
        backbone, "router_losses", lambda *a, **k: calls.append(1) or compute(*a, **k)
    )
    sparse_loss = SparseLoss(model)
    weights = torch.full((4,), 1 / 4)
    with RouterLossRide(model, weights) as ride:
        output = model(**batch)
        with pytest.raises(RuntimeError, match="call the model without `labels`"):
            model(**batch, labels=batch["input_ids"])
        with pytest.raises(RuntimeError, match="would count twice"):
            sparse_loss(output, batch["input_ids"])
        with pytest.raises(RuntimeError, match="ride already"), RouterLossRide(model, weights):
            pass
    assert len(calls) == 1 and backbone.router_loss_ride is None
    expected = compute(
        backbone(**batch, output_router_logits=True).router_logits,
        batch["attention_mask"].bool(),
        weights,
    )
    torch.testing.assert_close(ride.total, expected.total.detach())
    sparse_loss.remove()
    assert model(**batch, labels=batch["input_ids"]).aux_loss is not None and len(calls) == 2


@pytest.mark.parametrize("frozen", [True, False])
def test_without_coefficients_or_trained_routers_nothing_rides(
    frozen: bool, tiny_model: Model, batch: Batch
) -> None:
    model = tiny_model(text=COEFFICIENTS if frozen else dict.fromkeys(COEFFICIENTS, 0.0)).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not (frozen and "router" in name))
    found = []
    for rides in (True, False):
        with RouterLossRide(model, 1 / 4) if rides else nullcontext() as ride:
            loss = foreign(model.model(**batch).last_hidden_state)
        (ride.carried_by(loss) if rides else loss).backward()
        if rides:
            ride.require_arrival()
            assert ride.total is None
        found.append(gradients(model))
    assert_identical(*found)


def assert_identical(ours: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], expected[name]) for name in ours)


def test_rides_that_would_train_nothing_or_wrongly_are_errors(
    model: VLMoEForConditionalGeneration, batch: Batch
) -> None:
    with pytest.raises(ValueError, match="for a batch of 3 rows; the model was called with 4"):
        with RouterLossRide(model, torch.ones(3)):
            model(**batch)
    assert model.model.router_loss_ride is None
    with RouterLossRide(model, 0.25):
        loss = foreign(model.model(**batch).last_hidden_state)
    with pytest.raises(RuntimeError, match=r"let `carried_by\(loss\)`"):
        loss.backward()
    with RouterLossRide(model, 0.25) as ride:
        output = model.model(**batch, output_hidden_states=True)
    ride.carried_by(foreign(output.hidden_states[0])).backward()
    with pytest.raises(RuntimeError, match="trained nothing: no gradient of the loss arrived"):
        ride.require_arrival()
    with pytest.raises(TypeError, match="Linear holds no VLMoEModel"):
        backbone_of(nn.Linear(2, 2))


@pytest.mark.slow
def test_a_ride_leaves_the_compiled_graph_whole(
    model: VLMoEForConditionalGeneration, batch: Batch
) -> None:
    model.set_experts_implementation("batched_mm")
    expected = in_one_piece(model, batch)
    compiled: Any = torch.compile(model.model, backend="eager")
    for _ in range(2):
        with RouterLossRide(model, 1 / 4) as ride:
            hidden = compiled(**batch).last_hidden_state
        (SCALE * ride.carried_by(foreign(hidden))).backward()
        assert_equal(gradients(model), expected)
    torch._dynamo.reset()
    whole: Any = torch.compile(model.model, backend="eager", fullgraph=True)
    states = whole(**batch).last_hidden_state
    torch.testing.assert_close(states, model.model(**batch).last_hidden_state)

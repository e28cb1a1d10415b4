"""The readers that listen to a VLMoE in training: from its first pass on, or it is an error."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from router_bias_runs import LENGTHS, batch, biases, loads, text_rows
from transformers import Trainer, TrainerCallback, TrainingArguments

from vlmoe import VLMoEForConditionalGeneration
from vlmoe.modeling_vlmoe import modeling_vlmoe
from vlmoe.routing.balancing import RouterBiasCallback, update_router_bias
from vlmoe.routing.finite_checks import StopOnNonFiniteRouting, check_routing
from vlmoe.routing.watch import unwatch_routing, watch_routing

Model = Callable[..., VLMoEForConditionalGeneration]

TEXT = {"router_bias_update_rate": 0.05, "mlp_only_layers": [1]}


def hooks(model: torch.nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_evaluation_places_no_hooks_and_training_places_them_once(tiny_model: Model) -> None:
    model = tiny_model(text=TEXT)
    model(**batch(text_rows()))
    with torch.no_grad():
        model.train()(**batch(text_rows()))
    before = hooks(model)
    for _ in range(2):
        model(**batch(text_rows())).loss.backward()
        after = hooks(model)
    assert after == before + 2 + 2 * 2  # the backbone, and router and bank of two layers
    watch_routing(model)
    assert hooks(model) == after
    unwatch_routing(model)
    assert hooks(model) == before


def test_evaluation_after_training_is_neither_counted_nor_checked(tiny_model: Model) -> None:
    model = tiny_model(text=TEXT).train()
    model(**batch(text_rows()))
    counted = loads(model)
    model.model.language_model.layers[0].mlp.router.weight.data.fill_(torch.nan)
    model.eval()(**batch(text_rows()))
    with torch.no_grad():
        model.train()(**batch(text_rows()))
    assert loads(model) == counted
    check_routing(model)


def test_a_copy_counts_for_itself(tiny_model: Model) -> None:
    model = tiny_model(text=TEXT).train()
    model(**batch(text_rows()))
    counted = loads(model)
    other = copy.deepcopy(model)
    assert loads(other) == counted
    other(**batch(text_rows()))
    assert loads(other) == [[2 * n for n in layer] for layer in counted]
    assert loads(model) == counted


def test_a_copy_of_a_router_is_not_heard_and_copies_nothing_else(tiny_model: Model) -> None:
    model = tiny_model(text=TEXT).train()
    model(**batch(text_rows()))
    router = model.model.language_model.layers[0].mlp.router
    other = copy.deepcopy(router)
    (hook,), (of_copy,) = router._forward_hooks.values(), other._forward_hooks.values()
    assert of_copy.func.__self__ is hook.func.__self__
    other.weight.data.fill_(torch.nan)
    other(torch.randn(3, router.weight.shape[1]))
    check_routing(model)


@pytest.mark.parametrize("read", [update_router_bias, check_routing])
def test_training_that_was_not_seen_is_an_error(
    tiny_model: Model, monkeypatch: pytest.MonkeyPatch, read: Callable[..., None]
) -> None:
    monkeypatch.setattr(modeling_vlmoe, "__name__", "transformers_modules.modeling_vlmoe")
    model = tiny_model(text=TEXT).train()
    model(**batch(text_rows()))
    with pytest.raises(ValueError, match=r"Call vlmoe\.routing\.watch_routing\(model\) before"):
        read(model)
    assert not biases(model).any()
    model(**batch(text_rows()))  # heard, since `read` placed the hooks
    check_routing(model)
    update_router_bias(model)
    assert biases(model).any()


def test_a_model_without_experts_has_nothing_to_see(
    tiny_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(modeling_vlmoe, "__name__", "transformers_modules.modeling_vlmoe")
    model = tiny_model(text={"mlp_only_layers": [0, 1, 2]}).train()
    model(**batch(text_rows()))
    for _ in range(2):
        check_routing(model)


def test_a_model_that_is_compiled_first_is_watched_first(tiny_model: Model) -> None:
    torch._dynamo.reset()
    text = TEXT | {"router_aux_loss_coef": 0.0}
    expected, model = tiny_model(text=text).train(), tiny_model(text=text).train()
    expected(**batch(text_rows()))
    model.set_experts_implementation("grouped_mm")
    watch_routing(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    compiled(**batch(text_rows()))
    assert loads(model) == loads(expected)
    unseen = tiny_model(text=text).train()
    unseen.set_experts_implementation("grouped_mm")
    torch.compile(unseen, fullgraph=True, backend="eager")(**batch(text_rows()))
    with pytest.raises(ValueError, match=r"first step and before torch\.compile"):
        update_router_bias(unseen)


def train(model: VLMoEForConditionalGeneration, folder: Path, callback: TrainerCallback) -> None:
    """Two steps; without a `RouterBiasCallback` nobody updates the bias."""
    arguments = TrainingArguments(
        str(folder), max_steps=2, per_device_train_batch_size=4, report_to="none", use_cpu=True
    )
    Trainer(model, arguments, batch, text_rows(), callbacks=[callback]).train()


def test_training_that_callbacks_saw_is_seen_also_after_they_stop_listening(
    tiny_model: Model, tmp_path: Path
) -> None:
    model = tiny_model(text=TEXT)
    train(model, tmp_path, StopOnNonFiniteRouting())
    for _ in range(2):  # the first listens from now on
        check_routing(model)
    model(**batch(text_rows()))
    check_routing(model)
    assert sum(loads(model)[0]) == 2 * sum(LENGTHS)
    update_router_bias(model)
    assert biases(model).any()


def test_training_that_was_not_seen_after_a_seen_one_is_an_error(
    tiny_model: Model, tmp_path: Path
) -> None:
    torch._dynamo.reset()
    model = tiny_model(text=TEXT | {"router_aux_loss_coef": 0.0})
    model.set_experts_implementation("grouped_mm")
    train(model, tmp_path, StopOnNonFiniteRouting())
    torch.compile(model.train(), fullgraph=True, backend="eager")(**batch(text_rows()))
    for read in (check_routing, update_router_bias):
        with pytest.raises(ValueError, match="was not seen"):
            read(model)


def test_callbacks_begin_anew_after_training_that_was_not_seen(
    tiny_model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(modeling_vlmoe, "__name__", "transformers_modules.modeling_vlmoe")
    model = tiny_model(text=TEXT).train()
    model(**batch(text_rows()))
    train(model, tmp_path, RouterBiasCallback())
    assert biases(model).any()


def test_a_check_is_no_update_of_the_bias(
    tiny_model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warnings: list[str] = []
    logger = "vlmoe.modeling_vlmoe.modeling_vlmoe_text.logger.warning_once"
    monkeypatch.setattr(logger, warnings.append)
    model = tiny_model(text=TEXT).train()
    model(**batch(text_rows()))
    check_routing(model)
    model.save_pretrained(tmp_path)
    assert len(warnings) == 1 and "RouterBiasCallback" in warnings[0]

"""Non-finite router logits stop the training before the optimizer step."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from vlmoe import VLMoEForConditionalGeneration
from vlmoe.modeling_vlmoe.router import VLMoERouter
from vlmoe.routing.finite_checks import StopOnNonFiniteRouting, check_routing

Model = Callable[..., VLMoEForConditionalGeneration]

LAYER = "model.language_model.layers.1.mlp"


def token_inputs(**row: Any) -> dict[str, torch.Tensor]:
    ids = torch.randint(6, 99, (2, 7), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids}


def router(model: torch.nn.Module) -> VLMoERouter:
    return model.get_submodule(f"{LAYER}.router")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("checkpointing", [None, True, False])
def test_the_first_layer_and_the_step_are_named(
    tiny_model: Model, checkpointing: bool | None, value: float
) -> None:
    model = tiny_model().train()
    if checkpointing is not None:
        model.activation_checkpointing_enable({"use_reentrant": checkpointing})
    model(**token_inputs()).loss.backward()
    check_routing(model, step=6)
    router(model).weight.data[3, 0] = value
    model(**token_inputs()).loss.backward()
    router(model).weight.data[3, 0] = 0.0
    model(**token_inputs()).loss.backward()  # a later micro-batch that is finite
    with pytest.raises(ValueError, match=rf"of {LAYER} are NaN .* in step 7 \(in [12] of 3 sparse"):
        check_routing(model, step=7)
    check_routing(model)  # said once


def test_evaluation_is_not_looked_at(tiny_model: Model) -> None:
    model = tiny_model()
    router(model).weight.data.fill_(torch.nan)
    model(**token_inputs())
    with torch.no_grad():
        model.train()(**token_inputs())
    check_routing(model)


def test_a_padding_token_that_is_not_finite_counts(tiny_model: Model) -> None:
    model = tiny_model().train()
    embeddings = model.get_input_embeddings()(token_inputs()["input_ids"]).detach()
    embeddings[1, -1] = torch.nan
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, -1] = 0
    model(inputs_embeds=embeddings, attention_mask=mask)
    with pytest.raises(ValueError, match=r"layers\.0\.mlp are NaN or infinite \(in 3 of 3"):
        check_routing(model)


def test_the_flag_compiles_into_one_graph(tiny_model: Model) -> None:
    torch._dynamo.reset()
    model = tiny_model().train()
    model.set_experts_implementation("grouped_mm")
    model(**token_inputs())  # transformers' hooks for router logits cannot be traced
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for _ in range(2):
        compiled(**token_inputs())
        check_routing(model)
    router(model).weight.data.fill_(torch.nan)
    compiled(**token_inputs())
    with pytest.raises(ValueError, match=LAYER):
        check_routing(model)


def test_a_model_without_sparse_layers_passes(tiny_model: Model) -> None:
    model = tiny_model(text={"mlp_only_layers": [0, 1, 2]}).train()
    model(**token_inputs())
    check_routing(model)


class Poison(TrainerCallback):
    """Makes one router's weight infinite before the second step and remembers the weights."""

    before: dict[str, torch.Tensor]

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            router(model).weight.data[0, 0] = torch.inf
            self.before = {name: t.clone() for name, t in model.state_dict().items()}


def test_trainer_stops_before_the_step(tiny_model: Model, tmp_path: Path) -> None:
    model, poison = tiny_model(), Poison()
    rows = [{name: values[0] for name, values in token_inputs().items()}] * 8
    arguments = TrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        report_to="none",
        use_cpu=True,
    )
    callbacks = [poison, StopOnNonFiniteRouting()]
    with pytest.raises(ValueError, match=rf"of {LAYER} are NaN or infinite in step 2 "):
        Trainer(model, arguments, train_dataset=rows, callbacks=callbacks).train()
    assert set(model.state_dict()) == set(poison.before)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, poison.before[name]), name

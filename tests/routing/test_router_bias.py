"""Balancing by a bias on the choice of experts, against counts and sums in plain Python."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from router_bias_runs import LENGTHS, batch, biases, loads, plain_loop, text_rows
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

from vlmoe import VLMoEForConditionalGeneration
from vlmoe.modeling_vlmoe.router import VLMoERouter
from vlmoe.routing.balancing import RouterBiasCallback, update_router_bias
from vlmoe.routing.watch import watch_routing
from vlmoe.training.arguments import training_arguments
from vlmoe.training.data import TrainingData
from vlmoe.training.run import train

Model = Callable[..., VLMoEForConditionalGeneration]

RATE = 0.05
TEXT = {"router_bias_update_rate": RATE, "mlp_only_layers": [1]}
CHECKPOINTING = {"none": None, "re-entrant": True, "not re-entrant": False}
SAVED_NAMES = [
    f"model.language_model.layers.{i}.mlp.router.e_score_correction_bias" for i in (0, 2)
]


@contextmanager
def chosen_experts(model: torch.nn.Module) -> Iterator[list[list[list[int]]]]:
    """For each call of a router in the context, the experts of each token."""
    calls: list[list[list[int]]] = []
    handles = [
        module.register_forward_hook(lambda *call: calls.append(call[-1][2].tolist()))
        for module in model.modules()
        if isinstance(module, VLMoERouter)
    ]
    yield calls
    for handle in handles:
        handle.remove()


def count(choice: list[list[int]], mask: torch.Tensor, experts: int) -> list[int]:
    """Tokens of each expert, in plain Python."""
    counts = [0] * experts
    for token_experts, real in zip(choice, mask.flatten().tolist(), strict=True):
        for expert in token_experts:
            counts[expert] += real
    return counts


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_the_update_is_that_of_a_plain_count_of_all_micro_batches_without_padding(
    tiny_model: Model, checkpointing: str, side: str
) -> None:
    model = tiny_model(text=TEXT).train()
    if CHECKPOINTING[checkpointing] is not None:
        model.activation_checkpointing_enable({"use_reentrant": CHECKPOINTING[checkpointing]})
    rows = text_rows(side=side)
    expected = [[0] * 4, [0] * 4]
    for micro_batch in (batch(rows[:3]), batch(rows[3:])):
        with chosen_experts(model) as calls:
            loss = model(**micro_batch).loss
        assert len(calls) == 2
        for layer, choice in enumerate(calls):
            counts = count(choice, micro_batch["attention_mask"], 4)
            expected[layer] = [a + b for a, b in zip(expected[layer], counts, strict=True)]
        loss.backward()
        with torch.no_grad():
            model(**micro_batch)
        model.eval()(**micro_batch)
        model.generate(**batch(rows[:1]), max_new_tokens=2, do_sample=False)
        model.train()
    assert [sum(counts) for counts in expected] == [2 * sum(LENGTHS)] * 2
    assert loads(model) == expected

    update_router_bias(model)
    for bias, counts in zip(biases(model), expected, strict=True):
        mean = sum(counts) / 4
        signs = [(mean > load) - (mean < load) for load in counts]
        assert bias.tolist() == pytest.approx([RATE * sign for sign in signs])
    assert biases(model).any()
    before = biases(model).clone()
    update_router_bias(model)  # nothing was routed since
    assert torch.equal(biases(model), before)


@pytest.mark.parametrize("scoring_func", ["softmax", "sigmoid"])
def test_the_bias_counts_in_the_choice_and_not_in_the_weights(
    tiny_config: Callable[..., Any], scoring_func: str
) -> None:
    fields = {"scoring_func": scoring_func, "router_bias_update_rate": RATE}
    router = VLMoERouter.from_config(tiny_config(text=fields).text_config)
    torch.manual_seed(0)
    torch.nn.init.normal_(router.weight, std=0.2)
    router.e_score_correction_bias.copy_(torch.tensor([0.0, 0.3, -0.2, 0.1]))
    hidden_states = torch.randn(50, router.weight.shape[1])
    logits, weights, index = router(hidden_states)

    scores = logits.double().softmax(-1) if scoring_func == "softmax" else logits.double().sigmoid()
    expected = (scores + router.e_score_correction_bias.double()).topk(2).indices
    assert torch.equal(index, expected)
    assert not torch.equal(index, scores.topk(2).indices)
    chosen = scores.gather(1, expected)
    torch.testing.assert_close(weights.double(), chosen / chosen.sum(1, keepdim=True))


def test_the_bias_balances_a_skewed_router(tiny_model: Model) -> None:
    text = {"router_bias_update_rate": 0.005, "num_experts": 8, "num_hidden_layers": 1}
    model = tiny_model(text=text).train()
    torch.manual_seed(0)
    layer = model.model.language_model.layers[0]
    torch.nn.init.normal_(layer.mlp.router.weight, std=0.2)
    torch.nn.init.zeros_(layer.self_attn.o_proj.weight)  # attention makes tokens alike
    torch.nn.init.constant_(layer.post_attention_layernorm.weight, 2**0.5)  # keeps their length
    hidden_states = torch.randn(50, 20, layer.mlp.router.weight.shape[1]) + 1
    max_over_mean = []
    for _ in range(150):
        model.model(inputs_embeds=hidden_states, use_cache=False)
        load = torch.tensor(loads(model)[0])
        max_over_mean.append((load.max() / load.double().mean()).item())
        update_router_bias(model)
    assert max_over_mean[0] > 2
    # Steps of one size end in turns between two states, as far apart as the rate allows: at 0.01
    # these are 1.09 and 1.11, and with tokens of unlike lengths 1.09 and 1.20.
    assert max(max_over_mean[-2:]) < 1.1


def test_without_a_rate_there_is_no_bias_and_with_a_bias_of_zero_nothing_changes(
    tiny_model: Model,
) -> None:
    off, on = tiny_model(text={"mlp_only_layers": [1]}), tiny_model(text=TEXT)
    assert set(on.state_dict()) - set(off.state_dict()) == set(SAVED_NAMES)
    losses = [model.train()(**batch(text_rows())).loss for model in (off, on)]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    assert watch_routing(off).loads is None
    for (name, parameter), other in zip(off.named_parameters(), on.parameters(), strict=True):
        assert parameter.grad is None or torch.equal(parameter.grad, other.grad), name


@pytest.mark.parametrize("dtype", ["auto", torch.bfloat16, torch.float16])
def test_the_bias_stays_in_fp32_bit_for_bit(tiny_model: Model, dtype: Any, tmp_path: Path) -> None:
    model = tiny_model(text=TEXT)
    for module in model.modules():
        if isinstance(module, VLMoERouter):
            module.e_score_correction_bias.normal_()
    expected = biases(model).clone()
    if dtype == "auto":
        model.to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    loaded = VLMoEForConditionalGeneration.from_pretrained(tmp_path, dtype=dtype)
    assert loaded.dtype == (torch.bfloat16 if dtype == "auto" else dtype)
    for held in (biases(model), torch.stack([saved[n] for n in SAVED_NAMES]), biases(loaded)):
        assert held.dtype == torch.float32
        assert torch.equal(held, expected)
    assert torch.equal(biases(loaded.half().bfloat16()), expected)


def test_a_model_saved_without_bias_loads_with_one_of_zero(
    tiny_model: Model, tiny_config: Callable[..., Any], tmp_path: Path
) -> None:
    tiny_model(text=TEXT | {"router_bias_update_rate": 0.0}).save_pretrained(tmp_path)
    loaded, info = VLMoEForConditionalGeneration.from_pretrained(
        tmp_path, config=tiny_config(text=TEXT), output_loading_info=True
    )
    assert set(info["missing_keys"]) == set(SAVED_NAMES)
    assert not biases(loaded).any()


def test_counting_compiles_into_one_graph(tiny_model: Model) -> None:
    torch._dynamo.reset()
    model = tiny_model(text=TEXT).train()
    model.set_experts_implementation("grouped_mm")
    inputs = batch(text_rows())
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    seen = []
    for forward in (model, compiled, compiled):
        forward(**inputs).loss.backward()
        seen.append(loads(model))
    for first, second, third in zip(*seen, strict=True):  # the counts add up
        assert [2 * n for n in first] == second and [3 * n for n in first] == third


def trainer(model: VLMoEForConditionalGeneration, output: Path, **more: Any) -> Trainer:
    """Every optimizer step sees all rows, in four micro-batches of two."""
    arguments = TrainingArguments(
        str(output),
        per_device_train_batch_size=2,
        per_device_eval_batch_size=4,
        gradient_accumulation_steps=4,
        optim="sgd",
        learning_rate=0.1,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        report_to="none",
        use_cpu=True,
        **more,
    )
    rows = text_rows()
    callbacks = [RouterBiasCallback()]
    return Trainer(model, arguments, batch, rows, rows[:4], callbacks=callbacks)


def test_trainer_with_accumulation_and_checkpointing_equals_a_plain_loop_over_whole_batches(
    tiny_model: Model, tmp_path: Path
) -> None:
    expected, model = tiny_model(text=TEXT), tiny_model(text=TEXT)
    plain_loop(expected, text_rows(), steps=4)
    run = trainer(
        model,
        tmp_path,
        max_steps=4,
        gradient_checkpointing=True,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="no",
    )
    run.train()
    assert torch.equal(biases(model), biases(expected))
    assert biases(model).abs().max() > 2 * RATE


def test_vlmoe_train_updates_the_bias_and_resumes_with_it_exactly(
    saved_model: Path, data_folder: Path, tmp_path: Path
) -> None:
    model = VLMoEForConditionalGeneration.from_pretrained(saved_model)
    config = model.config
    config.text_config.router_bias_update_rate = RATE
    started = VLMoEForConditionalGeneration.from_pretrained(saved_model, config=config)
    folder = tmp_path / "model"
    for file in saved_model.iterdir():  # the processor
        if file.suffix in (".json", ".jinja"):
            folder.mkdir(exist_ok=True)
            (folder / file.name).write_bytes(file.read_bytes())
    started.save_pretrained(folder)

    finals = []
    for resume in (None, str(tmp_path / "run" / "checkpoint-2")):
        arguments = training_arguments(
            output_dir=str(tmp_path / ("run" if resume is None else "resumed")),
            resume_from_checkpoint=resume,
            max_steps=4,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            learning_rate=1e-2,
            save_strategy="steps",
            save_steps=2,
            report_to="none",
            use_cpu=True,
        )
        train(str(folder), TrainingData(str(data_folder)), arguments)
        finals.append(load_file(Path(arguments.output_dir) / "model.safetensors"))
    at_checkpoint = load_file(tmp_path / "run" / "checkpoint-2" / "model.safetensors")
    name = SAVED_NAMES[0]
    assert at_checkpoint[name].any() and not torch.equal(at_checkpoint[name], finals[0][name])
    assert finals[0].keys() == finals[1].keys()
    for name, tensor in finals[0].items():
        assert torch.equal(tensor, finals[1][name]), name


def test_saving_a_model_whose_bias_nobody_updates_warns(
    tiny_model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warnings: list[str] = []
    logger = "vlmoe.modeling_vlmoe.modeling_vlmoe_text.logger.warning_once"
    monkeypatch.setattr(logger, warnings.append)
    model = tiny_model(text=TEXT).train()
    model.save_pretrained(tmp_path)
    model(**batch(text_rows())).loss.backward()
    update_router_bias(model)
    model.save_pretrained(tmp_path)
    assert not warnings
    model(**batch(text_rows())).loss.backward()
    model.save_pretrained(tmp_path)
    assert len(warnings) == 1 and "RouterBiasCallback" in warnings[0]


def test_a_model_without_bias_is_refused(tiny_model: Model, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no router bias: set `router_bias_update_rate`"):
        trainer(tiny_model(), tmp_path, max_steps=1).train()

"""Balancing by the selection bias of transformers' own models, against counts in plain Python."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import on_ranks
from safetensors.torch import load_file
from sparse_families import FAMILIES, SPARSE_TEXTS, WITH_BIAS, FamilyCollator, row, sparse_family
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainingArguments

from vlmoe.routing.balancing import RouterBiasCallback, SelectionLoads, update_router_bias
from vlmoe.routing.routed_layers import routed_layers, selection_bias
from vlmoe.training.strict_resume import StrictResumeMixin

FAST = ("deepseek_v3", "ernie4_5_vl_moe")
RATE = 0.01
LENGTHS = (9, 4, 7, 2, 8, 11, 3, 5)

Rows = list[dict[str, torch.Tensor]]


class StrictTrainer(StrictResumeMixin, Trainer):
    """Resumes whole."""


def families(names: Iterable[str] = WITH_BIAS) -> list[Any]:
    """Mark those that are not `FAST` as slow."""
    return [pytest.param(n, marks=[] if n in FAST else pytest.mark.slow) for n in names]


def make_rows(name: str) -> Rows:
    """Return rows of unlike lengths, every other one with an image."""
    images = name not in SPARSE_TEXTS
    return [row(length, 2, n, images * (n % 2)) for n, length in enumerate(LENGTHS)]


def biases(model: nn.Module) -> list[torch.Tensor]:
    """Return each layer's, as it is saved."""
    found = [selection_bias(layer) for layer in routed_layers(model)]
    return [bias.detach().clone() for bias in found if bias is not None]


def inputs_of(name: str, rows: Rows) -> dict[str, torch.Tensor]:
    """Return a batch without labels."""
    return {k: v for k, v in FamilyCollator(name)(rows).items() if k != "labels"}


def count_by_hand(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> list[list[int]]:
    """Return the tokens of each expert, for each layer with a bias."""
    seen: dict[str, list[list[int]]] = {}
    layers = routed_layers(model)

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            integers = [part for part in output if not part.is_floating_point()]
            seen[name] = integers[0].tolist()

        return hook

    handles = [layer.router.register_forward_hook(keep(layer.name)) for layer in layers]
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    mask = batch["attention_mask"].flatten().tolist()
    types = batch.get("moe_mm_token_type_ids", torch.zeros(len(mask))).flatten().tolist()
    counts = []
    for layer in layers:
        count = [0] * layer.num_experts
        choices = iter(seen.get(layer.name, []))
        for real, kind in zip(mask, types, strict=True):
            if (layer.place == "vision") == bool(kind):
                for expert in next(choices):
                    count[expert] += int(real)
        counts.append(count)
    return counts


@pytest.mark.parametrize("name", families())
@pytest.mark.parametrize("checkpointing", [None, False, True])
def test_the_update_is_that_of_a_plain_count_of_all_micro_batches_without_padding(
    name: str, checkpointing: bool | None
) -> None:
    model = sparse_family(name).train()
    if checkpointing is not None:
        model.activation_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    loads, rows = SelectionLoads(model), make_rows(name)
    expected = [[0] * layer.num_experts for layer in loads.layers]
    for micro_batch in (inputs_of(name, rows[:3]), inputs_of(name, rows[3:])):
        for layer, counts in enumerate(count_by_hand(model, micro_batch)):
            expected[layer] = [a + b for a, b in zip(expected[layer], counts, strict=True)]
        model(**micro_batch).logits.sum().backward()
        model.eval()(**micro_batch)
        model.train()
    assert [load.tolist() for load in loads.loads if load is not None] == expected
    assert sum(map(sum, expected)) >= 2 * sum(LENGTHS)

    update_router_bias(loads, RATE)
    for bias, counts in zip(biases(model), expected, strict=True):
        mean = sum(counts) / len(counts)
        signs = [(mean > load) - (mean < load) for load in counts]
        assert bias.flatten().tolist() == pytest.approx([RATE * sign for sign in signs])
    before = biases(model)
    assert any(bias.any() for bias in before)
    update_router_bias(loads, RATE)  # nothing was routed since
    assert all(torch.equal(a, b) for a, b in zip(biases(model), before, strict=True))
    loads.remove()
    model(**inputs_of(name, rows[:2]))
    assert not any(load is not None and load.any() for load in loads.loads)


def skewed(name: str) -> PreTrainedModel:
    """A model whose routers prefer the first experts."""
    model = sparse_family(name).train()
    for layer in routed_layers(model):
        layer.router.weight.data[0] *= 3
        layer.router.weight.data[-1] *= 0.2
    return model


@pytest.mark.parametrize("name", families())
def test_the_bias_balances_a_skewed_router(name: str) -> None:
    model, rows = skewed(name), [row(24, 2, n, int(name not in SPARSE_TEXTS)) for n in range(8)]
    loads, batch = SelectionLoads(model), inputs_of(name, rows)
    violations = []
    for _ in range(200):
        model(**batch)
        shares = [load / load.sum() * len(load) for load in loads.loads if load is not None]
        violations.append(sum(share.max().item() - 1 for share in shares) / len(shares))
        update_router_bias(loads, 0.005)
    print(f"{name}: max-violation {violations[0]:.2f} -> {violations[-1]:.2f}")
    assert violations[-1] <= violations[0] / 2


def run(
    name: str,
    folder: Path,
    accumulate: int = 1,
    model: PreTrainedModel | None = None,
    resume: Path | None = None,
) -> PreTrainedModel:
    """Train by SGD for four steps of all rows, in as many processes as there are."""
    rows = make_rows(name)
    arguments = TrainingArguments(
        output_dir=str(folder),
        gradient_accumulation_steps=accumulate,
        max_steps=4,
        save_steps=2,
        optim="sgd",
        learning_rate=0.01,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        report_to=[],
        disable_tqdm=True,
        ddp_find_unused_parameters=True,
        use_cpu=True,
    )
    arguments.per_device_train_batch_size = len(rows) // (accumulate * arguments.world_size)
    trainer = StrictTrainer(
        sparse_family(name) if model is None else model,
        arguments,
        FamilyCollator(name),
        train_dataset=rows,
        callbacks=[RouterBiasCallback(RATE)],
    )
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer.model


@pytest.mark.parametrize("name", families())
def test_the_bias_does_not_depend_on_accumulation_and_goes_on_after_a_resume(
    name: str, tmp_path: Path
) -> None:
    whole = biases(run(name, tmp_path / "whole"))
    split = biases(run(name, tmp_path / "split", 4))
    assert any(bias.any() for bias in whole)
    assert all(torch.equal(a, b) for a, b in zip(whole, split, strict=True))
    resume = tmp_path / "whole" / "checkpoint-2"
    resumed = run(name, tmp_path / "on", 1, sparse_family(name, 1), resume)
    assert all(torch.equal(a, b) for a, b in zip(whole, biases(resumed), strict=True))
    saved = [tmp_path / of / "checkpoint-4" / "model.safetensors" for of in ("whole", "on")]
    ours, theirs = (load_file(file) for file in saved)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def biases_on_a_rank(folder: Path) -> dict[str, list[torch.Tensor]]:
    """Return those of each family after four steps."""
    return {name: biases(run(name, folder / name, 2)) for name in WITH_BIAS}


@pytest.mark.slow
def test_the_bias_does_not_depend_on_ranks(tmp_path: Path) -> None:
    (tmp_path / "ranks").mkdir()
    for of_rank in on_ranks(biases_on_a_rank, tmp_path, folder=tmp_path / "ranks"):
        for name in WITH_BIAS:
            whole = biases(run(name, tmp_path / "whole"))
            assert all(torch.equal(a, b) for a, b in zip(whole, of_rank[name], strict=True)), name


def test_a_bias_that_was_loaded_in_bf16_is_widened_and_resumed_exactly(tmp_path: Path) -> None:
    name = "minimax_m3_vl"
    sparse_family(name).save_pretrained(tmp_path / "saved")
    loaded = [
        type(sparse_family(name)).from_pretrained(tmp_path / "saved", dtype=torch.bfloat16)
        for _ in range(2)
    ]
    assert [bias.dtype for bias in biases(loaded[0])] == [torch.bfloat16]
    whole = run(name, tmp_path / "whole", 1, loaded[0])
    assert [bias.dtype for bias in biases(whole)] == [torch.float32]
    moved = biases(whole)[0]
    assert not torch.equal(moved, moved.bfloat16().float())  # it has numbers that bf16 has not
    resumed = run(name, tmp_path / "on", 1, loaded[1], tmp_path / "whole" / "checkpoint-2")
    assert torch.equal(biases(resumed)[0], moved)


@pytest.mark.parametrize("name", [n for n in ("mixtral", "qwen3_vl_moe") if n in FAMILIES])
def test_a_family_without_a_bias_is_refused_by_name(name: str, tmp_path: Path) -> None:
    model = sparse_family(name)
    refusal = rf"{type(model.base_model).__name__} has no selection bias .*TopKRouter chooses by"
    with pytest.raises(ValueError, match=refusal):
        run(name, tmp_path, 1, model)
    with pytest.raises(ValueError, match="count the loads first"):
        update_router_bias(sparse_family("deepseek_v3"))
    with pytest.raises(ValueError, match=r"rate is 0\.1"):
        update_router_bias(model, 0.1)

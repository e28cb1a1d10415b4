"""Training with routed LoRA as it is done in practice gives what PEFT's own path gives."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from lora_runs import LAYERS, MODELS, assert_close, lora, randomize, run, train
from peft import get_peft_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vlmoe import disable_routed_lora, enable_routed_lora

Model = Callable[..., PreTrainedModel]


def adapted(model: PreTrainedModel) -> torch.nn.Module:
    """With trained-looking adapters of its experts."""
    peft_model = get_peft_model(model, lora())
    randomize(peft_model)
    return peft_model


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("name", [MODELS[0], "Qwen3MoeForCausalLM"])
def test_gradient_checkpointing(
    tiny_moe: Model, calls: list[type], name: str, use_reentrant: bool
) -> None:
    model = adapted(tiny_moe(name)).train()
    reference = run(model)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    checkpointed_by_peft = run(model)
    enable_routed_lora(model)
    ours = run(model)
    assert len(calls) == 2 * LAYERS  # each layer again in the backward pass
    assert_close(ours, checkpointed_by_peft)
    assert_close(ours, reference)


def test_autocast_is_as_near_as_that_of_the_eager_bank(tiny_moe: Model, calls: list[type]) -> None:
    model = adapted(tiny_moe(MODELS[0], "eager"))
    exact = run(model)
    with torch.autocast("cpu", torch.bfloat16):
        peer = run(model)
        enable_routed_lora(model)
        ours = run(model)
    assert len(calls) == LAYERS
    for name, tensor in exact.items():
        errors = [(each[name].float() - tensor).norm() / tensor.norm() for each in (ours, peer)]
        assert 0 < errors[0] < max(1.5 * errors[1], 0.02), name


def test_fp32_adapters_on_a_bf16_base(tiny_moe: Model, calls: list[type]) -> None:
    model = get_peft_model(tiny_moe(MODELS[0], "eager").bfloat16(), lora())
    randomize(model)
    exact = run(model.double())
    model.bfloat16()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    peer = run(model)
    enable_routed_lora(model)
    ours = run(model)
    assert len(calls) == LAYERS
    for name, tensor in exact.items():
        assert (
            ours[name].dtype
            == peer[name].dtype
            == (torch.float32 if "lora_" in name else torch.bfloat16)
        )
        errors = [(each[name].double() - tensor).norm() / tensor.norm() for each in (ours, peer)]
        # rerouted tokens decide the error of a whole model: a loose bound
        assert 0 < errors[0] < max(2 * errors[1], 0.05), name


@pytest.mark.parametrize("switch", [enable_routed_lora, disable_routed_lora])
def test_accelerates_hooks_on_the_bank_run_in_pefts_own_path(
    tiny_moe: Model, calls: list[type], switch: Callable[..., None]
) -> None:
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    model = adapted(tiny_moe(MODELS[0]))
    reference = run(model)
    for module in model.modules():
        if type(module).__name__ == "VLMoEExperts":
            add_hook_to_module(module, AlignDevicesHook(execution_device="cpu"))
    switch(model)
    assert_close(run(model), reference)
    assert not calls


@pytest.mark.parametrize("kind", ["Trainer", "TRL"])
def test_trainers_take_the_same_steps(
    tiny_moe: Model,
    calls: list[type],
    kind: str,
    sentences: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
) -> None:
    losses, states = [], []
    for switch in (disable_routed_lora, enable_routed_lora):
        model = adapted(tiny_moe("Qwen3MoeForCausalLM", vocab_size=len(tokenizer)))
        switch(model)
        calls.clear()
        losses.append(train(model, kind, sentences, tmp_path, tokenizer))
        states.append(
            {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
        )
    assert len(calls) >= 3 * 2 * LAYERS
    assert losses[0][-1] < losses[0][0]
    torch.testing.assert_close(torch.tensor(losses[1]), torch.tensor(losses[0]), rtol=1e-4, atol=0)
    assert_close(states[1], states[0], 1e-3)  # AdamW divides by tiny gradients

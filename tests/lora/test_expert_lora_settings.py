"""What PEFT has not for 3-D parameters: dropout, training some experts only, an adapter by row."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_runs import BOTH, INPUT_IDS, MODELS, assert_close, lora, randomize, run
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from vlmoe import disable_routed_lora, enable_routed_lora
from vlmoe.lora import wrappers as expert_lora

Model = Callable[..., PreTrainedModel]

OURS = MODELS[0]


def bank_of(model: torch.nn.Module, layer: int = 1) -> torch.nn.Module:
    return model.base_model.model.model.language_model.layers[layer].mlp.experts


def inputs_of(bank: torch.nn.Module, tokens: int = 6) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(3)
    choice = torch.stack([torch.randperm(bank.num_experts)[:2] for _ in range(tokens)])
    return torch.randn(tokens, bank.get_base_layer().hidden_dim), choice, torch.rand(tokens, 2)


@pytest.fixture
def model(tiny_moe: Model) -> torch.nn.Module:
    model = get_peft_model(tiny_moe(OURS), lora())
    randomize(model)
    return model


def test_dropout_is_for_training_and_for_the_adapters_input_only(
    model: torch.nn.Module, tiny_moe: Model
) -> None:
    enable_routed_lora(model)
    expected = run(model.eval())
    enable_routed_lora(model, dropout=0.5)
    assert_close(run(model), expected)
    inputs = inputs_of(bank_of(model))
    without = bank_of(model)(*inputs)
    assert not torch.allclose(bank_of(model.train())(*inputs), without)
    enable_routed_lora(model)
    assert torch.equal(bank_of(model)(*inputs), without)
    new = get_peft_model(tiny_moe(OURS), lora()).train()  # B is zero
    enable_routed_lora(new, dropout=0.5)
    torch.testing.assert_close(bank_of(new)(*inputs), bank_of(new).get_base_layer()(*inputs))


def test_the_mean_over_dropouts_is_the_adapter_without(tiny_moe: Model) -> None:
    """The output is linear in the input of the adapter of `down_proj`."""
    model = get_peft_model(tiny_moe(OURS), lora(BOTH[1:])).train()
    randomize(model)
    enable_routed_lora(model, dropout=0.25)
    bank, inputs = bank_of(model), inputs_of(bank_of(model))
    with torch.no_grad():
        outputs = torch.stack([bank(*inputs) for _ in range(3000)])
        enable_routed_lora(model)
        expected = bank(*inputs)
    deviation = (outputs.mean(0) - expected) / (outputs.std(0) / 3000**0.5)
    assert deviation.abs().max() < 5 and deviation.abs().mean() > 0.3


def test_a_checkpointed_layer_drops_the_same_again(model: torch.nn.Module) -> None:
    enable_routed_lora(model.train(), dropout=0.5)
    bank, (x, *rest) = bank_of(model), inputs_of(bank_of(model))
    grads = []
    for call in (bank, lambda *args: checkpoint(bank, *args, use_reentrant=False)):
        leaf = x.clone().requires_grad_()
        torch.manual_seed(5)
        call(leaf, *rest).square().sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads)


def test_only_the_named_experts_train(tiny_moe: Model, tmp_path: Path) -> None:
    model = get_peft_model(tiny_moe(OURS), lora()).train()
    enable_routed_lora(model, train_experts={0: [1], 2: [0, 3]})
    named = {0: {1}, 1: set(), 2: {0, 3}}
    optimizer = torch.optim.AdamW(model.parameters(), 0.01, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(input_ids=INPUT_IDS, labels=INPUT_IDS).loss.backward()
        optimizer.step()
    for layer, ids in named.items():
        for wrapper in (bank_of(model, layer), bank_of(model, layer).base_layer):
            b = wrapper.lora_B["default"].weight.unflatten(1, (-1, wrapper.num_experts))
            assert {e for e in range(wrapper.num_experts) if b[..., e].any()} == ids
    model.eval()
    ours = run(model)["logits"]
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_moe(OURS), tmp_path)
    torch.testing.assert_close(run(loaded)["logits"], ours)
    disable_routed_lora(model)
    torch.testing.assert_close(run(model)["logits"], ours)


def test_named_experts_have_pefts_gradients_and_the_others_none(tiny_moe: Model) -> None:
    model = get_peft_model(tiny_moe(OURS), lora())
    for layer in range(3):
        for wrapper in (bank_of(model, layer), bank_of(model, layer).base_layer):
            b = wrapper.lora_B["default"].weight.data.unflatten(1, (-1, wrapper.num_experts))
            b[..., 2].normal_(std=0.5)
    reference = run(model)
    enable_routed_lora(model, train_experts={layer: [2] for layer in range(3)})
    ours = run(model)
    for name, tensor in reference.items():
        if "lora_A" in name:  # rows of other experts: B is zero, and so are PEFT's
            assert_close({name: ours[name]}, {name: tensor})
        if "lora_B" in name:
            ours_b, b = (t.unflatten(1, (-1, 4)) for t in (ours[name], tensor))
            assert_close({name: ours_b[..., 2]}, {name: b[..., 2]})
            assert not ours_b[..., [0, 1, 3]].any() and b[..., [0, 1, 3]].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dropout": 1.0}, r"`dropout` is 1.0; allowed: at least 0 and below 1"),
        ({"train_experts": {7: [0]}}, r"names layers \[7\]; layers with adapted .* \[0, 1, 2\]"),
        ({"train_experts": {1: [0, 4]}}, r"`train_experts`\[1\] has \[4\].* are 0 to 3"),
        ({"train_experts": {1: [0]}}, r"B of adapter 'default' on .* is not zero for all other"),
    ],
    ids=str,
)
def test_wrong_settings_change_nothing(
    model: torch.nn.Module, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        enable_routed_lora(model, **options)
    assert not any(isinstance(module, expert_lora.ParamWrapper) for module in model.modules())


def test_a_setting_is_not_left_out_where_the_routed_path_cannot_run(
    model: torch.nn.Module,
) -> None:
    enable_routed_lora(model.train(), dropout=0.1)
    bank_of(model).get_base_layer().register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"need the routed path.*VLMoEExperts has hooks"):
        run(model)
    run(model.eval())


@pytest.mark.parametrize("name", [OURS, "OlmoeForCausalLM", "GptOssForCausalLM"])
def test_each_row_has_its_own_adapter(tiny_moe: Model, name: str) -> None:
    first = lora(r=2)
    first.target_modules = {"q_proj"}  # PEFT's own part of it
    model = get_peft_model(tiny_moe(name), first)
    model.add_adapter("other", lora(r=3, lora_alpha=2))
    model.add_adapter("attention", LoraConfig(target_modules=["q_proj"], r=2))
    for adapter in model.peft_config:
        randomize(model, adapter, seed=len(adapter))
    model.eval()
    names = ["other", "default", "__base__", "other", "attention"]
    ids = torch.arange(35).view(5, 7) + 6
    expected = []
    for row, adapter in zip(ids, names, strict=True):
        if adapter == "__base__":
            with model.disable_adapter():
                expected.append(model(input_ids=row[None]).logits)
        else:
            model.set_adapter(adapter)
            expected.append(model(input_ids=row[None]).logits)
    enable_routed_lora(model)
    with torch.no_grad():
        ours = model(input_ids=ids, adapter_names=names).logits
    torch.testing.assert_close(ours, torch.cat(expected).detach(), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(expected[0], expected[3])


def test_names_that_are_not_one_for_each_row_are_refused(model: torch.nn.Module) -> None:
    enable_routed_lora(model.eval())
    with pytest.raises(ValueError, match=r"has 3 names, which do not divide the 14 tokens"):
        model(input_ids=INPUT_IDS, adapter_names=["default"] * 3)

"""`add_expert_lora` and `merge_expert_lora`: one call each, on a model or on a folder."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import PreTrainedModel

from vlmoe import (
    VLMoEForConditionalGeneration,
    VLMoEProcessor,
    add_expert_lora,
    enable_routed_lora,
    expert_lora_config,
    merge_expert_lora,
)
from vlmoe.lora.wrappers import ParamWrapper

Model = Callable[..., PreTrainedModel]

OURS = "VLMoEForConditionalGeneration"
IDS = torch.arange(6, 20).view(2, 7)


def trained_looking(model: PeftModel) -> PeftModel:
    """B is not zero."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.mark.parametrize("name", [OURS, "MixtralForCausalLM", "Qwen3MoeForCausalLM"])
def test_one_call_gives_what_three_gave(tiny_moe: Model, name: str) -> None:
    torch.manual_seed(0)
    ours = add_expert_lora(tiny_moe(name), 3, attention=True, dropout=0.25)
    torch.manual_seed(0)
    model = tiny_moe(name)
    theirs = get_peft_model(model, expert_lora_config(model, 3, attention=True))
    enable_routed_lora(theirs, dropout=0.25)
    assert type(ours) is type(theirs)
    assert ours.peft_config["default"].to_dict() == theirs.peft_config["default"].to_dict()
    tensors = theirs.state_dict()
    assert ours.state_dict().keys() == tensors.keys()
    assert all(torch.equal(tensor, tensors[key]) for key, tensor in ours.state_dict().items())
    routed = [module for module in ours.modules() if isinstance(module, ParamWrapper)]
    assert len(routed) == 3 and {each.expert_dropout for each in routed} == {0.25}


def test_it_logs_the_matches_and_the_fate_of_the_balance_losses_and_prints_nothing(
    tiny_moe: Model, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.INFO, "vlmoe.lora")

    def logged(name: str, level: int, router: bool = False, asked: bool = False) -> str:
        caplog.clear()
        model = tiny_moe(name)
        model.config.get_text_config().output_router_logits = asked
        add_expert_lora(model, router=router)
        first, *rest = caplog.records
        assert "mlp.experts.down_proj: 3 matched, r=8" in first.message
        assert [record.levelno for record in rest] == ([] if router else [level])
        return "".join(record.message for record in rest)

    assert "no router losses" in logged(OURS, logging.INFO)
    assert "`output_router_logits` is off" in logged("MixtralForCausalLM", logging.INFO)
    warned = logged("MixtralForCausalLM", logging.WARNING, asked=True)
    assert "MixtralForCausalLM" in warned and "router_aux_loss_coef=0" in warned
    assert logged("MixtralForCausalLM", 0, router=True, asked=True) == ""
    assert not capsys.readouterr().out


def test_a_wrong_argument_leaves_the_model_without_adapters(tiny_moe: Model) -> None:
    model = tiny_moe(OURS)
    names = {name for name, _ in model.named_modules()}
    for wrong in ({"dropout": 1.0}, {"train_experts": {9: [0]}}, {"r": 0}):
        with pytest.raises(ValueError, match=r"allowed|layers|positive"):
            add_expert_lora(model, **wrong)
        assert {name for name, _ in model.named_modules()} == names


def test_an_adapter_is_merged_from_a_folder_and_from_memory_to_the_same_weights(
    saved_model: Path, tmp_path: Path
) -> None:
    base = VLMoEForConditionalGeneration.from_pretrained(saved_model)
    adapted = trained_looking(add_expert_lora(base, 3, attention=True))
    adapted.save_pretrained(tmp_path / "adapter")
    expected = adapted(input_ids=IDS).logits

    from_folder = merge_expert_lora(tmp_path / "adapter")
    from_memory = merge_expert_lora(adapted, tmp_path / "merged")
    saved = VLMoEForConditionalGeneration.from_pretrained(tmp_path / "merged")
    VLMoEProcessor.from_pretrained(tmp_path / "merged")
    for model in (from_folder, from_memory, saved):
        assert type(model) is VLMoEForConditionalGeneration
        torch.testing.assert_close(model(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-5)
    weights = from_memory.state_dict()
    for model in (from_folder, saved):
        assert all(torch.equal(tensor, weights[n]) for n, tensor in model.state_dict().items())


def test_a_merge_that_cannot_be_is_refused(saved_model: Path, tmp_path: Path) -> None:
    base = VLMoEForConditionalGeneration.from_pretrained(saved_model)
    adapted = add_expert_lora(base)
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="`base_model` is for the folder"):
        merge_expert_lora(adapted, base_model=saved_model)
    with pytest.raises(ValueError, match="is the base model itself"):
        merge_expert_lora(tmp_path / "adapter", saved_model)
    with pytest.raises(ValueError, match="holds an adapter"):
        merge_expert_lora(tmp_path / "adapter", tmp_path / "adapter")
    with pytest.raises(FileNotFoundError, match="no model folder"):
        merge_expert_lora(tmp_path / "adapter", base_model=tmp_path / "nothing")

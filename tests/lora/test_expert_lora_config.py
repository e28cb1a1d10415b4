"""`expert_lora_config`: what it names is what gets adapted; what it cannot do it says at once."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_runs import MODELS
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer, ParamWrapper
from transformers import PreTrainedModel

from vlmoe import disable_routed_lora, enable_routed_lora, expert_lora_config

Model = Callable[..., PreTrainedModel]

OURS = MODELS[0]


def adapted(model: torch.nn.Module) -> dict[str, tuple[int, float]]:
    """By name in the base model: rank and scaling."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            name = name.removeprefix("base_model.model.").replace(".base_layer", "")
            if isinstance(module, ParamWrapper):
                name += f".{module.parameter_name}"
            found[name] = module.r["default"], module.scaling["default"]
    return found


def trained(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", MODELS)
def test_experts_alone_by_default_and_the_logged_count_is_what_trains(
    tiny_moe: Model, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_moe(name)
    with caplog.at_level(logging.INFO, "vlmoe.lora"):
        config = expert_lora_config(model, r=3)
    assert type(config) is LoraConfig and config.task_type == "CAUSAL_LM"
    logged = caplog.messages[-1]
    model = get_peft_model(model, config)
    names = adapted(model)
    assert len(names) == 2 * 3
    assert all(each.endswith(("experts.gate_up_proj", "experts.down_proj")) for each in names)
    assert set(names.values()) == {(3, 2.0)}
    assert logged.startswith(f"LoRA: {trained(model):,} parameters, alpha / r = 2\n")
    assert "mlp.experts.down_proj: 3 matched, r=3, " in logged
    enable_routed_lora(model)


def test_everything_that_can_be_asked_for(
    tiny_moe: Model, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "vlmoe.lora")
    model = tiny_moe(OURS, num_shared_experts=1, shared_expert_gate=True)
    config = expert_lora_config(
        model,
        r=4,
        lora_alpha=6,
        experts={"gate_up_proj": 8, "down_proj": 2},
        attention=True,
        router=True,
        shared_experts=True,
        connector=True,
    )
    logged = caplog.messages[-1]
    model = get_peft_model(model, config)
    assert f"LoRA: {trained(model):,} parameters, alpha / r = 1.5\n" in logged
    names = adapted(model)
    ranks = {"gate_up_proj": 8, "down_proj": 2}
    for name, (rank, scaling) in names.items():
        parent, _, leaf = name.rpartition(".")
        assert rank == (ranks[leaf] if parent.endswith(".experts") else 4), name
        assert scaling == 1.5
        assert "vision_tower" not in name and "shared_expert_gate" not in name
    kinds = ("self_attn.", ".experts.", ".router.", ".shared_experts.", ".multi_modal_projector.")
    counts = [sum(kind in name for name in names) for kind in kinds]
    assert counts == [4 * 3, 2 * 3, 3, 3 * 3, 2] and len(names) == sum(counts)


@pytest.mark.parametrize("name", ["OlmoeForCausalLM", "MixtralForCausalLM"])
def test_attention_and_router_of_the_librarys_models(tiny_moe: Model, name: str) -> None:
    model = tiny_moe(name)
    model = get_peft_model(model, expert_lora_config(model, attention=True, router=True))
    kinds = ("self_attn.", ".experts.", "mlp.gate.weight")
    assert [sum(kind in each for each in adapted(model)) for kind in kinds] == [12, 6, 3]


def test_a_rank_shared_by_the_active_experts(tiny_moe: Model) -> None:
    model = tiny_moe(OURS)
    config = expert_lora_config(model, r=8, attention=True, rank_scaling="per_active_expert")
    (pattern,) = config.rank_pattern
    assert pattern.count("|") == 3 and r"layers\.\d+\.self_attn\.k_proj" in pattern
    for name, (rank, scaling) in adapted(get_peft_model(model, config)).items():
        assert rank == (4 if "experts" in name else 8) and scaling == 2.0
    alone = expert_lora_config(tiny_moe(OURS), r=8, rank_scaling="per_active_expert")
    assert (alone.r, alone.lora_alpha, alone.rank_pattern) == (4, 8, {})
    with pytest.raises(ValueError, match=r"rank of gate_up_proj, 3, by num_experts_per_tok, 2"):
        expert_lora_config(tiny_moe(OURS), r=3, rank_scaling="per_active_expert")


def test_a_config_is_made_without_changing_the_model(tiny_moe: Model) -> None:
    for name in (OURS, "MixtralForCausalLM", "Qwen3VLMoeForConditionalGeneration"):
        model = tiny_moe(name)
        before = model.config.to_dict()
        attributes = {key: set(vars(module)) for key, module in model.named_modules()}
        expert_lora_config(model)
        assert model.config.to_dict() == before
        assert {key: set(vars(module)) for key, module in model.named_modules()} == attributes


@pytest.mark.parametrize("routed", [False, True])
def test_a_frozen_router_has_no_balance_loss(tiny_moe: Model, routed: bool) -> None:
    model = tiny_moe(OURS, router_aux_loss_coef=0.5, router_z_loss_coef=0.25)
    ids = torch.arange(6, 20).view(2, 7)
    with_losses = model(input_ids=ids, labels=ids)
    assert with_losses.aux_loss is not None
    adapted_model = get_peft_model(model, expert_lora_config(model))
    if routed:
        enable_routed_lora(adapted_model)
    without = adapted_model(input_ids=ids, labels=ids)
    assert without.aux_loss is without.z_loss is None and without.loss < with_losses.loss
    logits = torch.nn.functional.cross_entropy(
        without.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    )
    torch.testing.assert_close(without.loss, logits)


def test_an_adapted_router_has_its_balance_loss(tiny_moe: Model) -> None:
    model = tiny_moe(OURS, router_aux_loss_coef=0.5)
    ids = torch.arange(6, 20).view(2, 7)
    adapted_model = get_peft_model(model, expert_lora_config(model, router=True))
    assert adapted_model(input_ids=ids, labels=ids).aux_loss is not None


def test_a_foreign_loss_on_frozen_routers_trains_nothing(tiny_moe: Model) -> None:
    """As TRL's, which asks for router logits whatever trains."""
    model = tiny_moe(OURS)
    ids = torch.arange(6, 20).view(2, 7)
    for router in (False, True):
        adapted_model = get_peft_model(model, expert_lora_config(model, router=router)).train()
        logits = adapted_model(input_ids=ids, output_router_logits=True).router_logits
        assert all(each.requires_grad == router for each in logits)
        adapted_model.unload()


@pytest.mark.parametrize("routed", [False, True])
@pytest.mark.parametrize("end", ["merge_and_unload", "unload"])
def test_the_model_without_lora_has_its_balance_losses_again_and_saves_them(
    tiny_moe: Model, end: str, routed: bool, tmp_path: Path
) -> None:
    model = tiny_moe(OURS, router_aux_loss_coef=0.5, router_global_entropy_coef={"text": 0.125})
    before = model.config.to_dict()
    peft_model = get_peft_model(model, expert_lora_config(model))
    if routed:
        enable_routed_lora(peft_model)
    plain = getattr(peft_model, end)()
    assert plain.config.to_dict() == before
    plain.save_pretrained(tmp_path)
    saved = type(plain.config).from_pretrained(tmp_path).text_config
    assert (saved.router_aux_loss_coef, saved.router_global_entropy_coef) == (0.5, {"text": 0.125})
    for parameter in plain.parameters():  # PEFT leaves the base frozen
        parameter.requires_grad_(True)
    ids = torch.arange(6, 20).view(2, 7)
    assert plain(input_ids=ids, labels=ids).aux_loss is not None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 0}, r"`r` is 0; a rank is a positive integer"),
        ({"r": True}, r"`r` is True"),
        ({"experts": {"down_proj": -1}}, r"`experts\['down_proj'\]` is -1"),
        ({"experts": ["w1"]}, r"names \['w1'\]; the model's experts have \['down_proj', 'gate_up"),
        ({"experts": []}, r"`experts` is empty"),
        ({"shared_experts": True}, r"`shared_experts=True`, but VLMoE.* has no linear layer"),
        ({"rank_scaling": "half"}, r"`rank_scaling` is 'half'; allowed"),
        ({"target_modules": ["q_proj"]}, r"`target_modules` is determined by this function"),
        ({"use_dora": True}, r"`use_dora` is True.*norms of DoRA"),
        ({"lora_bias": True}, r"`lora_bias` is True"),
        ({"lora_dropout": 0.1}, r"`lora_dropout` is 0.1.*add_expert_lora\(model, dropout"),
        ({"init_lora_weights": "pissa"}, r"`init_lora_weights` is 'pissa'.*allowed: \[True, Fal"),
        ({"init_lora_weights": "olora"}, r"`init_lora_weights` is 'olora'"),
        ({"init_lora_weights": "orthogonal"}, r"`init_lora_weights` is 'orthogonal'"),
    ],
    ids=str,
)
def test_what_cannot_be_is_said_before_anything_changes(
    tiny_moe: Model, fields: dict[str, Any], message: str
) -> None:
    model = tiny_moe(OURS)
    before = model.config.to_dict()
    with pytest.raises(ValueError, match=message):
        expert_lora_config(model, **fields)
    assert model.config.to_dict() == before and not adapted(model)


def test_dense_models_and_missing_parts_are_refused(tiny_moe: Model) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 9}
    dense = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2))
    with pytest.raises(ValueError, match=r"LlamaForCausalLM has no fused experts"):
        expert_lora_config(dense)
    with pytest.raises(ValueError, match=r"`connector=True`, but MixtralForCausalLM has no"):
        expert_lora_config(tiny_moe("MixtralForCausalLM"), connector=True)


@pytest.fixture
def sparse_everywhere(tiny_model: Model) -> PreTrainedModel:
    """Experts in the decoder, the tower and the connector."""
    return tiny_model(vision_num_experts=4, projector_num_experts=3)


def test_the_text_models_experts_are_meant_where_the_tower_has_some_too(
    sparse_everywhere: PreTrainedModel,
) -> None:
    names = adapted(get_peft_model(sparse_everywhere, expert_lora_config(sparse_everywhere)))
    assert len(names) == 2 * 3 and all("language_model" in name for name in names)


def test_experts_of_tower_and_connector_are_adapted_and_routed_on_request(
    sparse_everywhere: PreTrainedModel,
) -> None:
    config = expert_lora_config(sparse_everywhere, r=3, experts=["up_proj", "down_proj"])
    model = get_peft_model(sparse_everywhere, config)
    names = adapted(model)
    assert names and not any("language_model" in name for name in names)
    banks = [m for m in model.modules() if isinstance(m, ParamWrapper)]
    banks = [m for m in banks if not any(m is other.base_layer for other in banks)]
    assert len(banks) == len(names) // 2 >= 2
    for bank in banks:
        torch.manual_seed(0)
        for name, parameter in bank.named_parameters():
            if "lora_B" in name or name.endswith("_bias"):
                parameter.data.normal_(std=0.5)
        x = torch.randn(9, bank.base_layer.in_features, requires_grad=True)
        choice = torch.stack([torch.randperm(bank.num_experts)[:2] for _ in range(9)])
        inputs = (x, choice, torch.rand(9, 2))
        results = []
        for switch in (disable_routed_lora, enable_routed_lora):
            switch(model)
            output = bank(*inputs)
            trained = [p for p in bank.parameters() if p.requires_grad]
            grads = torch.autograd.grad(output.square().sum(), [x, *trained])
            results.append([output, *grads])
        for reference, ours in zip(*results, strict=True):
            assert (ours - reference).norm() <= 1e-5 * reference.norm()

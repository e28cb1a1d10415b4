"""Routers of transformers that no gradient of the task reaches are found before training."""

from pathlib import Path
from typing import Any

import pytest
import torch
from builders import assistant, row, user
from native_processors import tiny_processor
from sparse_families import FAMILIES, sparse_family
from transformers import PreTrainedModel

from vlmoe import VLMoETrainer
from vlmoe.routing import constant_weights
from vlmoe.routing.constant_weights import warn_of_constant_weights
from vlmoe.routing.routed_layers import routed_layers
from vlmoe.routing.scoring import weight_is_constant
from vlmoe.training.sparse_loss import SparseLoss

NAMES_OF_K = ("num_experts_per_tok", "top_k_experts", "moe_k")
SCORES = {"norm_topk_prob": False}
BY_SCORE = ("qwen3_moe", "deepseek_v3", "lfm2_moe")  # where the config says so


@pytest.fixture
def warned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The warnings, once for each call."""
    messages: list[str] = []
    monkeypatch.setattr(constant_weights.logger, "warning_once", messages.append)
    return messages


def family(name: str, k: int, **fields: Any) -> PreTrainedModel:
    return sparse_family(name, **dict.fromkeys(NAMES_OF_K, k), **fields)


def are_constant(name: str, k: int, **fields: Any) -> set[bool]:
    return {weight_is_constant(layer) for layer in routed_layers(family(name, k, **fields))}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_router_of_one_expert_is_constant_where_its_gradient_vanishes(name: str) -> None:
    """The reference is autograd: a weight that depends on the logits has a gradient."""
    model = family(name, k=1)
    layer = next(each for each in routed_layers(model) if each.place == "decoder")
    weights: list[torch.Tensor] = []
    layer.experts.register_forward_pre_hook(lambda _, args: weights.append(args[2]))
    ids = torch.arange(20, 40)[None]
    more = {"moe_mm_token_type_ids": torch.zeros_like(ids)} if name.startswith("ernie") else {}
    model(input_ids=ids, **more)
    # The sum of unnormalized weights moves with the router, that of normalized ones does not.
    parameters = [p for p in layer.router.parameters() if p.requires_grad and p.dim() == 2]
    found = torch.autograd.grad(weights[-1].sum(), parameters, allow_unused=True)
    largest = max((float(grad.abs().max()) for grad in found if grad is not None), default=0.0)
    assert weight_is_constant(layer) == (largest < 1e-5), (name, largest)


def test_two_experts_or_scores_as_weights_are_no_constant(warned: list[str]) -> None:
    for name in ("mixtral", *BY_SCORE):
        assert are_constant(name, 2) == {False}
    for name in BY_SCORE:
        assert are_constant(name, 1, **SCORES) == {False}
    assert not warn_of_constant_weights(sparse_family("qwen3_moe", num_experts_per_tok=1, **SCORES))
    assert not warn_of_constant_weights(torch.nn.Linear(2, 2))
    frozen = sparse_family("mixtral", num_experts_per_tok=1).requires_grad_(False)
    assert not warn_of_constant_weights(frozen)
    assert not warned


def test_the_loss_of_plain_trainer_and_ours_warn_with_the_remedy(
    warned: list[str], tmp_path: Path
) -> None:
    SparseLoss(sparse_family("qwen3_moe", num_experts_per_tok=1))
    assert len(warned) == 1 and "`norm_topk_prob=False`" in warned[0]
    given: dict[str, Any] = {
        "train_dataset": [row(user("say one"), assistant("one"))],
        "processing_class": tiny_processor("mixtral"),
    }
    args = {"output_dir": str(tmp_path), "max_steps": 1, "use_cpu": True, "report_to": "none"}
    VLMoETrainer(sparse_family("mixtral", num_experts_per_tok=1), args, **given)
    assert len(warned) == 2 and "always normalizes: train with k = 2" in warned[1]
    loss = SparseLoss(sparse_family("mixtral"))
    own = {"compute_loss_func": loss}
    VLMoETrainer(sparse_family("mixtral", num_experts_per_tok=1), args, **given, **own)
    assert len(warned) == 3


def test_asking_leaves_model_and_random_numbers_as_they_are() -> None:
    model = sparse_family("qwen3_moe", num_experts_per_tok=1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    warn_of_constant_weights(model)
    assert torch.equal(torch.get_rng_state(), state)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])

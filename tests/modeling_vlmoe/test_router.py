"""The router computes in fp32 whatever the dtype around it, deterministically, as configured."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from vlmoe.modeling_vlmoe.router import VLMoERouter

TOKENS, HIDDEN, EXPERTS, TOP_K = 512, 32, 16, 3


@pytest.fixture
def make_router(tiny_config: Callable[..., Any]) -> Callable[..., VLMoERouter]:
    """`make_router(**text fields)`: a router whose weights are bf16 numbers, held in fp32."""

    def make(**fields: Any) -> VLMoERouter:
        sizes = {"hidden_size": HIDDEN, "num_experts": EXPERTS, "num_experts_per_tok": TOP_K}
        router = VLMoERouter(tiny_config(text=sizes | fields).text_config)
        torch.manual_seed(0)
        router.weight.data = torch.randn(EXPERTS, HIDDEN).mul(0.2).bfloat16().float()
        return router

    return make


@pytest.mark.parametrize("scoring_func", ["softmax", "sigmoid"])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_routing_is_that_of_float64_on_bf16_numbers(
    dtype: torch.dtype, autocast: bool, scoring_func: str, make_router: Callable[..., VLMoERouter]
) -> None:
    router = make_router(scoring_func=scoring_func).to(dtype)
    hidden_states = torch.randn(TOKENS, HIDDEN).bfloat16()
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        logits, weights, index = router(hidden_states.to(dtype))
    assert logits.dtype == weights.dtype == torch.float32

    expected_logits = hidden_states.double() @ router.weight.double().T
    scores = expected_logits.softmax(-1) if scoring_func == "softmax" else expected_logits.sigmoid()
    expected_weights, expected_index = scores.topk(TOP_K)
    expected_weights /= expected_weights.sum(-1, keepdim=True)
    assert torch.equal(index, expected_index)
    torch.testing.assert_close(weights.double(), expected_weights, rtol=0, atol=1e-6)
    torch.testing.assert_close(logits.double(), expected_logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("scoring_func", ["softmax", "sigmoid"])
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_renormalised_weights_sum_to_the_scaling_factor(
    scale: float, scoring_func: str, make_router: Callable[..., VLMoERouter]
) -> None:
    hidden_states = torch.randn(TOKENS, HIDDEN)
    fields = {"scoring_func": scoring_func, "routed_scaling_factor": scale}
    _, weights, _ = make_router(**fields)(hidden_states)
    torch.testing.assert_close(weights.sum(-1), torch.full((TOKENS,), scale), rtol=1e-6, atol=0)
    _, as_scored, _ = make_router(**fields, norm_topk_prob=False)(hidden_states)
    assert not torch.allclose(as_scored.sum(-1), weights.sum(-1), rtol=1e-2)


def test_routing_is_the_same_twice_in_training(make_router: Callable[..., VLMoERouter]) -> None:
    router = make_router().train()
    hidden_states = torch.randn(TOKENS, HIDDEN)
    state = torch.get_rng_state()
    first = router(hidden_states)
    assert torch.equal(torch.get_rng_state(), state), "the router drew random numbers"
    assert all(torch.equal(a, b) for a, b in zip(first, router(hidden_states), strict=True))


def test_weights_stay_finite_where_all_sigmoids_underflow(
    make_router: Callable[..., VLMoERouter],
) -> None:
    router = make_router(scoring_func="sigmoid")
    torch.nn.init.constant_(router.weight, -10.0)
    hidden_states = torch.rand(TOKENS, HIDDEN, requires_grad=True)  # logits around -160
    _, weights, _ = router(hidden_states)
    weights.sum().backward()
    assert weights.isfinite().all() and hidden_states.grad.isfinite().all()

"""The router computes in fp32 whatever the dtype around it, deterministically, as configured.

The last part holds it inside the model: in bf16, under autocast, recomputed under checkpointing.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from vlmoe import VLMoEForConditionalGeneration
from vlmoe.modeling_vlmoe.router import VLMoERouter

TOKENS, HIDDEN, EXPERTS, TOP_K = 512, 32, 16, 3


@pytest.fixture
def make_router(tiny_config: Callable[..., Any]) -> Callable[..., VLMoERouter]:
    """`make_router(**text fields)`: a router whose weights are bf16 numbers, held in fp32."""

    def make(**fields: Any) -> VLMoERouter:
        sizes = {"hidden_size": HIDDEN, "num_experts": EXPERTS, "num_experts_per_tok": TOP_K}
        router = VLMoERouter.from_config(tiny_config(text=sizes | fields).text_config)
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


# In the model from here on.


Record = tuple[VLMoERouter, torch.Tensor, torch.Tensor, torch.Tensor]


class NoisyRouter(VLMoERouter):
    """The control: jitter on what the router sees."""

    def forward(self, hidden_states: torch.Tensor, *args: Any) -> Any:
        """As in `VLMoERouter`."""
        return super().forward(hidden_states + torch.randn_like(hidden_states), *args)


@pytest.fixture
def inputs(
    tiny_config: Callable[..., Any], tiny_batch: Callable[..., dict[str, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """Rows with an image, two images and only text; a loss on every real token."""
    batch = tiny_batch(tiny_config(), ["..a" + "." * 9, "." * 12, "a.b" + "." * 7])
    return batch | {"labels": batch["input_ids"].where(batch["attention_mask"] == 1, -100)}


def record_routing(model: VLMoEForConditionalGeneration) -> list[Record]:
    """Every later pass through a router: the router, what it saw, weights and indices."""
    records: list[Record] = []
    for module in model.modules():
        if isinstance(module, VLMoERouter):
            module.register_forward_hook(
                lambda router, args, output: records.append((router, args[0], *output[1:]))
            )
    return records


@pytest.mark.parametrize("how", ["parameters", "autocast"])
def test_routing_in_a_bf16_model_is_that_of_float64_on_its_rounded_weights(
    how: str,
    inputs: dict[str, torch.Tensor],
    tiny_model: Callable[..., VLMoEForConditionalGeneration],
) -> None:
    model = tiny_model()
    if how == "parameters":
        model = model.to(torch.bfloat16)
    records = record_routing(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        model(**inputs)
    assert len(records) == 3
    for router, hidden_states, weights, index in records:
        rounded = router.weight.detach().double()
        scores = (hidden_states.detach().double() @ rounded.T).softmax(-1)
        expected_weights, expected_index = scores.topk(router.top_k)
        expected_weights /= expected_weights.sum(-1, keepdim=True)
        assert torch.equal(index, expected_index)
        torch.testing.assert_close(weights.double(), expected_weights, rtol=0, atol=1e-6)


def assert_recomputed_routing_is_the_same(
    model: VLMoEForConditionalGeneration, inputs: dict[str, torch.Tensor], use_reentrant: bool
) -> None:
    """Without torch's saving of the generator's state, which would hide noise."""
    model.train().set_experts_implementation("batched_mm")  # one shape whatever the routing
    model.activation_checkpointing_enable(
        {"use_reentrant": use_reentrant, "preserve_rng_state": False}
    )
    records = record_routing(model)
    model(**inputs).loss.backward()
    first, again = records[:3], records[:2:-1]  # backward, layers come last to first
    assert len(again) == 3
    for (router, _, _, index), (same_router, _, _, recomputed) in zip(first, again, strict=True):
        assert router is same_router
        assert torch.equal(index, recomputed), "routing changed when it was recomputed"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputed_routing_is_the_same_under_checkpointing(
    use_reentrant: bool,
    dtype: torch.dtype,
    inputs: dict[str, torch.Tensor],
    tiny_model: Callable[..., VLMoEForConditionalGeneration],
) -> None:
    assert_recomputed_routing_is_the_same(tiny_model().to(dtype), inputs, use_reentrant)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_noise_in_the_router_would_change_recomputed_routing(
    use_reentrant: bool,
    inputs: dict[str, torch.Tensor],
    tiny_model: Callable[..., VLMoEForConditionalGeneration],
) -> None:
    model = tiny_model()
    for layer in model.model.language_model.layers:
        noisy = NoisyRouter.from_config(model.config.text_config)
        noisy.load_state_dict(layer.mlp.router.state_dict())
        layer.mlp.router = noisy
    with pytest.raises(AssertionError, match="routing changed"):
        assert_recomputed_routing_is_the_same(model, inputs, use_reentrant)

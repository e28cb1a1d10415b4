"""The sparse block against a loop over tokens and experts in float64, forward and backward.

Hidden, intermediate, experts, tokens and k all differ, so that no transposed weight goes unseen.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from vlmoe import VLMoETextConfig
from vlmoe.modeling_vlmoe.sparse_moe import VLMoESparseMoeBlock

EXPERTS, TOP_K, HIDDEN, INTERMEDIATE, BATCH, LENGTH = 5, 2, 16, 12, 3, 7
IMPLEMENTATIONS = ["eager", "batched_mm", "grouped_mm", "auto"]
ROUTING: dict[str, dict[str, Any]] = {
    "softmax_renormalised": {},
    "softmax": {"norm_topk_prob": False},
    "sigmoid_renormalised": {"scoring_func": "sigmoid"},
    "sigmoid": {"scoring_func": "sigmoid", "norm_topk_prob": False},
    "scaled": {"routed_scaling_factor": 2.5},
    "shared_experts": {"num_shared_experts": 2},
    "one_of_five": {"num_experts_per_tok": 1, "norm_topk_prob": False},
}
SIZES = {
    "hidden_size": HIDDEN,
    "moe_intermediate_size": INTERMEDIATE,
    "num_experts": EXPERTS,
    "num_experts_per_tok": TOP_K,
}


@pytest.fixture
def make_block(tiny_config: Callable[..., Any]) -> Callable[..., VLMoESparseMoeBlock]:
    """`make_block(implementation, **text fields)`: a block with seeded, large weights."""

    def make(implementation: str, **fields: Any) -> VLMoESparseMoeBlock:
        config = tiny_config(text=SIZES | fields).text_config
        config._experts_implementation = implementation
        block = VLMoESparseMoeBlock(config)
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in block.parameters():
                parameter.normal_(0.0, 0.5)
        return block

    return make


def gated_mlp(
    x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    """(hidden,) -> (hidden,)."""
    return down @ (F.silu(gate @ x) * (up @ x))


def loop(
    hidden_states: torch.Tensor, weights: dict[str, torch.Tensor], config: VLMoETextConfig
) -> torch.Tensor:
    """The block, one token and one expert at a time, in the dtype of its arguments."""
    rows = []
    for x in hidden_states.flatten(0, -2):
        logits = weights["router.weight"] @ x
        scores = logits.softmax(0) if config.scoring_func == "softmax" else logits.sigmoid()
        chosen = scores.topk(config.num_experts_per_tok).indices.tolist()
        total = sum(scores[e] for e in chosen) if config.norm_topk_prob else 1.0
        row = torch.zeros_like(x)
        for e in chosen:
            gate, up = weights["experts.gate_up_proj"][e].chunk(2)
            output = gated_mlp(x, gate, up, weights["experts.down_proj"][e])
            row = row + config.routed_scaling_factor * scores[e] / total * output
        if config.num_shared_experts:
            row = row + gated_mlp(
                x,
                *(weights[f"shared_experts.{name}_proj.weight"] for name in ("gate", "up", "down")),
            )
        rows.append(row)
    return torch.stack(rows).view_as(hidden_states)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("routing", ROUTING)
def test_output_and_gradients_equal_a_float64_loop(
    routing: str, implementation: str, make_block: Callable[..., VLMoESparseMoeBlock]
) -> None:
    block = make_block(implementation, **ROUTING[routing])
    hidden_states = torch.randn(BATCH, LENGTH, HIDDEN, requires_grad=True)
    direction = torch.randn(BATCH, LENGTH, HIDDEN)
    output, *_ = block(hidden_states)
    (output * direction).sum().backward()

    x = hidden_states.detach().double().requires_grad_()
    weights = {name: p.detach().double().requires_grad_() for name, p in block.named_parameters()}
    expected = loop(x, weights, block.experts.config)
    (expected * direction).sum().backward()

    compared = {"output": (output, expected), "hidden_states": (hidden_states.grad, x.grad)}
    compared |= {name: (p.grad, weights[name].grad) for name, p in block.named_parameters()}
    for name, (ours, reference) in compared.items():
        assert ours is not None, f"{name} got no gradient"
        difference = (ours - reference).abs().max() / reference.abs().max()
        assert difference <= 1e-5, f"{name}: {difference:.1e}"


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_an_expert_without_tokens_gets_a_zero_gradient(
    implementation: str, make_block: Callable[..., VLMoESparseMoeBlock]
) -> None:
    block = make_block(implementation)
    idle = 3
    with torch.no_grad():
        block.router.weight[idle] = -10.0  # far below the others for positive tokens
    hidden_states = torch.rand(BATCH, LENGTH, HIDDEN)
    assert idle not in block.router(hidden_states.flatten(0, 1))[2]
    block(hidden_states)[0].square().sum().backward()
    busy = [e for e in range(EXPERTS) if e != idle]
    for parameter in block.experts.parameters():
        assert parameter.grad is not None
        assert not parameter.grad[idle].any()
        assert all(parameter.grad[e].any() for e in busy)
    assert block.router.weight.grad is not None


def test_a_batch_equals_its_rows_one_by_one(make_block: Callable[..., VLMoESparseMoeBlock]) -> None:
    block = make_block("grouped_mm", num_shared_experts=1)
    hidden_states = torch.randn(BATCH, LENGTH, HIDDEN)
    one_by_one = torch.cat([block(row[None])[0] for row in hidden_states])
    torch.testing.assert_close(block(hidden_states)[0], one_by_one, rtol=0, atol=1e-5)

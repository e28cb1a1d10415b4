"""Groups of experts and a gated shared expert, against transformers' own blocks."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import DeepseekV3Config, Qwen2MoeConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

from vlmoe.modeling_vlmoe.router import VLMoERouter, choose_experts
from vlmoe.modeling_vlmoe.router_losses import load_balancing_loss
from vlmoe.modeling_vlmoe.sparse_moe import VLMoESparseMoeBlock

TOKENS, HIDDEN, EXPERTS, TOP_K = 300, 32, 16, 4
SIZES = {"hidden_size": HIDDEN, "num_experts": EXPERTS, "num_experts_per_tok": TOP_K}


@pytest.mark.parametrize(("n_group", "topk_group"), [(4, 2), (8, 3), (2, 1), (4, 4)])
def test_grouped_routing_is_that_of_deepseek_v3(
    n_group: int, topk_group: int, tiny_config: Callable[..., Any]
) -> None:
    torch.manual_seed(0)
    groups = {"n_group": n_group, "topk_group": topk_group, "routed_scaling_factor": 2.5}
    peer = DeepseekV3TopkRouter(
        DeepseekV3Config(
            hidden_size=HIDDEN, n_routed_experts=EXPERTS, num_experts_per_tok=TOP_K, **groups
        )
    )
    torch.nn.init.normal_(peer.weight)
    torch.nn.init.normal_(peer.e_score_correction_bias, std=0.2)
    fields = groups | {"scoring_func": "sigmoid", "router_bias_update_rate": 0.001}
    router = VLMoERouter.from_config(tiny_config(text=SIZES | fields).text_config)
    router.load_state_dict(peer.state_dict())
    hidden_states = torch.randn(TOKENS, HIDDEN)
    (_, weights, index), (_, peer_weights, peer_index) = router(hidden_states), peer(hidden_states)
    order, peer_order = index.argsort(-1), peer_index.argsort(-1)
    assert torch.equal(index.gather(1, order), peer_index.gather(1, peer_order))
    torch.testing.assert_close(weights.gather(1, order), peer_weights.gather(1, peer_order))
    used = (index // (EXPERTS // n_group)).sort(-1).values
    assert ((used.diff(dim=-1) > 0).sum(-1) + 1).max() <= topk_group


def test_a_group_with_negative_scores_can_be_chosen() -> None:
    scores = torch.tensor([[-1.0, -2.0, -9.0, -9.0, -3.0, -0.5]])
    assert choose_experts(scores, 2, n_group=3, topk_group=2).sort().values.tolist() == [[0, 5]]
    assert choose_experts(scores, 2, n_group=3, topk_group=1).sort().values.tolist() == [[0, 1]]


def test_groups_of_one_expert_are_experts() -> None:
    scores = torch.rand(TOKENS, EXPERTS)
    grouped = choose_experts(scores, TOP_K, n_group=EXPERTS, topk_group=TOP_K)
    assert torch.equal(grouped.sort().values, scores.topk(TOP_K).indices.sort().values)


def test_the_balance_loss_counts_the_experts_that_groups_leave() -> None:
    logits = torch.full((1, EXPERTS), -30.0)
    logits[0, :4] = torch.tensor([3.0, 2.9, 2.0, 2.0])  # the first two groups hold two of the best
    logits[0, 8] = 2.5  # third best, but alone in its group
    mask, share = torch.ones(1, 1, dtype=torch.bool), torch.ones(1)
    groups = {"n_group": 8, "topk_group": 2}
    loss = load_balancing_loss((logits,), 4, mask, share, **groups)
    assert loss.item() == pytest.approx(EXPERTS * logits.softmax(-1)[0, :4].sum().item())
    ungrouped = load_balancing_loss((logits,), 4, mask, share)
    assert ungrouped.item() != pytest.approx(loss.item(), rel=1e-3)


@pytest.mark.parametrize("shared_experts", [1, 2])
def test_a_gated_shared_expert_is_that_of_qwen2_moe(
    shared_experts: int, tiny_config: Callable[..., Any]
) -> None:
    torch.manual_seed(0)
    width = 24
    shared = {"num_shared_experts": shared_experts, "shared_expert_gate": True}
    sizes = SIZES | shared | {"moe_intermediate_size": width}
    block = VLMoESparseMoeBlock(tiny_config(text=sizes).text_config).double()
    peer = Qwen2MoeSparseMoeBlock(
        Qwen2MoeConfig(
            **SIZES,
            moe_intermediate_size=width,
            shared_expert_intermediate_size=width * shared_experts,
            norm_topk_prob=True,
        )
    ).double()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    state = {
        name.replace("router.", "gate.").replace("shared_experts.", "shared_expert."): value
        for name, value in block.state_dict().items()
    }
    peer.load_state_dict(state)
    hidden_states = torch.randn(2, 30, HIDDEN, dtype=torch.double)
    output, _ = block(hidden_states)
    torch.testing.assert_close(output, peer(hidden_states), rtol=1e-6, atol=1e-6)
    torch.nn.init.zeros_(block.shared_expert_gate.weight)  # halves what the shared expert adds
    halved, _ = block(hidden_states)
    block.shared_expert_gate = None
    whole, _ = block(hidden_states)
    block.shared_experts = None
    routed, _ = block(hidden_states)
    torch.testing.assert_close(halved - routed, (whole - routed) / 2)

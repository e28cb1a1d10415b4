"""How experts start: copies, shards of copies, nothing beside a shared expert, changed copies."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from vlmoe import VLMoEForConditionalGeneration
from vlmoe.routing.balancing import update_router_bias

STEPS, ROWS, LENGTH = 10, 64, 64


def bank(model: Any, layer: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """gate_up_proj (E, 2 I, H) and down_proj (E, H, I) of a layer."""
    experts = model.model.language_model.layers[layer].mlp.experts
    return experts.gate_up_proj.detach(), experts.down_proj.detach()


def dense_mlp(dense: Any, layer: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    mlp = dense.model.language_model.layers[layer].mlp
    return tuple(part.weight.detach() for part in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))


def upcycled(dense: Any, *args: Any, **options: Any) -> Any:
    options = {"router_std": 1.0} | options
    return VLMoEForConditionalGeneration.from_dense(dense, *(args or (4, 2)), **options)


@pytest.mark.parametrize(("experts", "k", "split"), [(4, 2, 2), (3, 2, 5), (2, 1, 4), (1, 1, 8)])
def test_a_split_is_the_dense_model_at_step_0(
    experts: int, k: int, split: int, dense_model: Callable[..., Any]
) -> None:
    dense = dense_model("internvl", "qwen3")
    model = upcycled(dense, experts, k, expert_split=split)
    report, text = model.upcycling_report, model.config.text_config
    assert report.error <= 1e-5 and report.exactness == "exact at step 0 only"
    assert (text.num_experts, text.num_experts_per_tok) == (experts * split, k * split)
    assert text.moe_intermediate_size * split == dense.config.text_config.intermediate_size

    router = model.model.language_model.layers[0].mlp.router.weight
    copies = router.view(experts, split, -1)
    assert torch.equal(copies, copies[:, :1].expand_as(copies))
    assert len(copies[:, 0].unique(dim=0)) == experts

    gate, up, down = dense_mlp(dense)
    gate_up_proj, down_proj = bank(model)
    width = text.moe_intermediate_size
    for expert in range(experts * split):
        units = slice(expert % split * width, (expert % split + 1) * width)
        assert torch.equal(gate_up_proj[expert], torch.cat([gate[units], up[units]]))
        assert torch.equal(down_proj[expert], down[:, units] * split)


def test_the_dense_flops_are_those_of_one_split_copy(dense_model: Callable[..., Any]) -> None:
    model = upcycled(dense_model(), 8, 1, expert_split=4)
    dense, sparse = (model.upcycling_report.parameters[name] for name in ("dense", "sparse"))
    layers, text = 3, model.config.text_config
    routers = layers * text.num_experts * text.hidden_size
    assert sparse["text_token"] - dense["text_token"] == routers


def test_a_shared_expert_is_the_dense_mlp_and_routed_ones_add_nothing_yet(
    dense_model: Callable[..., Any],
) -> None:
    dense = dense_model("llava", "qwen2")
    model = upcycled(dense, expert_init="shared")
    assert model.upcycling_report.error <= 1e-5
    assert model.upcycling_report.exactness == "exact"
    gate, up, down = dense_mlp(dense)
    shared = model.model.language_model.layers[0].mlp.shared_experts
    assert torch.equal(shared.gate_proj.weight, gate) and torch.equal(shared.down_proj.weight, down)
    gate_up_proj, down_proj = bank(model)
    assert not down_proj.any()
    assert torch.equal(gate_up_proj, torch.cat([gate, up]).expand_as(gate_up_proj))


def test_drop_upcycling_redraws_the_same_units_of_each_projection(
    dense_model: Callable[..., Any],
) -> None:
    dense = dense_model()
    model = upcycled(dense, expert_init="drop", drop_ratio=0.3)
    assert model.upcycling_report.exactness == "not exact"
    assert model.upcycling_report.error > 1e-2
    gate, up, down = dense_mlp(dense)
    gate_up_proj, down_proj = bank(model)
    chosen = []
    for expert in range(4):
        own_gate, own_up = gate_up_proj[expert].chunk(2)
        changed = (own_gate != gate).any(1)
        assert changed.sum() == round(0.3 * len(gate))
        assert torch.equal(changed, (own_up != up).any(1))
        assert torch.equal(changed, (down_proj[expert] != down).any(0))
        drawn = torch.cat([own_gate[changed], own_up[changed]])
        assert abs(drawn.std() / gate.std() - 1) < 0.15
        chosen.append(changed)
    assert len({tuple(each.tolist()) for each in chosen}) == 4


def test_noise_has_the_asked_size_and_differs_by_expert(dense_model: Callable[..., Any]) -> None:
    dense = dense_model()
    model = upcycled(dense, expert_init="noise", noise_ratio=0.1)
    gate, _, down = dense_mlp(dense)
    gate_up_proj, down_proj = bank(model)
    noise = down_proj - down
    assert abs(noise.std() / (0.1 * down.std()) - 1) < 0.1
    assert len(noise.unique(dim=0)) == 4
    assert abs((gate_up_proj[:, : len(gate)] - gate).std() / (0.1 * gate.std()) - 1) < 0.1


@pytest.mark.parametrize(
    ("asked", "sparse"),
    [("all", [0, 1, 2]), ("second_half", [1, 2]), (2, [1]), (3, [2]), ([2, 0], [0, 2])],
)
def test_chosen_layers_get_experts(
    asked: Any, sparse: list[int], dense_model: Callable[..., Any]
) -> None:
    model = upcycled(dense_model(), sparse_layers=asked)
    layers = model.model.language_model.layers
    assert [i for i, layer in enumerate(layers) if hasattr(layer.mlp, "experts")] == sparse
    assert model.upcycling_report.error <= 1e-5


@pytest.mark.parametrize(
    "fields",
    [
        {"scoring_func": "sigmoid"},
        {"n_group": 2, "topk_group": 1},
        {"modality_experts": {"text": [0, 1, 2, 3], "image": [4, 5, 6, 7]}},
        {"router_modality_bias": True, "router_bias_update_rate": 0.001},
    ],
    ids=lambda fields: next(iter(fields)),
)
@pytest.mark.parametrize("split", [1, 2])
def test_every_kind_of_routing_is_exact(
    split: int, fields: dict[str, Any], dense_model: Callable[..., Any]
) -> None:
    copies = 8 // split
    fields = {"norm_topk_prob": True} | fields
    model = upcycled(dense_model("smolvlm"), copies, 1, expert_split=split, **fields)
    assert model.config.text_config.num_experts == 8
    assert model.upcycling_report.error <= 1e-5


def test_new_weights_depend_on_the_seed_alone(dense_model: Callable[..., Any]) -> None:
    first, again, other = (
        upcycled(dense_model(), expert_init="drop", seed=seed) for seed in (0, 0, 1)
    )
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    router = "model.language_model.layers.1.mlp.router.weight"
    assert not torch.equal(first.state_dict()[router], other.state_dict()[router])
    spread = torch.stack([m.state_dict()[router] for m in (first, other)]).std()
    assert abs(spread - 1) < 0.15


def trained(model: Any, seed: int = 0) -> torch.Tensor:
    """Ten steps of 4,096 tokens; the gradient norm of every expert's slice, summed over steps.

    Returns (layers, 2, experts): of gate_up_proj and of down_proj.
    """
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(seed)
    layers, norms = model.model.language_model.layers, 0
    for _ in range(STEPS):
        ids = torch.randint(6, 99, (ROWS, LENGTH), generator=generator)
        model(input_ids=ids, labels=ids).loss.backward()
        grads = [
            [p.grad.flatten(1).norm(dim=1) for p in (e.gate_up_proj, e.down_proj)]
            for e in (layer.mlp.experts for layer in layers)
        ]
        norms = norms + torch.stack([torch.stack(pair) for pair in grads])
        optimizer.step()
        optimizer.zero_grad()
        if model.config.text_config.router_bias_update_rate:
            update_router_bias(model)
    return norms


def smallest_difference(model: Any) -> float:
    """The least relative difference of any two experts of a layer, of either projection."""
    least = float("inf")
    for layer in model.model.language_model.layers:
        for weight in (layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj):
            flat = weight.detach().flatten(1)
            for i in range(len(flat)):
                for j in range(i):
                    least = min(least, float((flat[i] - flat[j]).norm() / flat[i].norm()))
    return least


@pytest.mark.parametrize(
    "options",
    [{}, {"expert_init": "shared"}, {"router_bias_update_rate": 0.01}],
    ids=["copy", "shared", "bias"],
)
def test_experts_all_learn_and_grow_apart(
    options: dict[str, Any], dense_model: Callable[..., Any]
) -> None:
    balancing = {"router_aux_loss_coef": 0.01} | options
    model = VLMoEForConditionalGeneration.from_dense(dense_model(), 4, 2, **balancing)
    assert (trained(model) > 0).all()
    assert smallest_difference(model) > 1e-6


def test_with_a_zero_router_experts_tie_and_do_not_grow_apart(
    dense_model: Callable[..., Any],
) -> None:
    """What the test above is there to find."""
    model = upcycled(dense_model(), router_std=0.0, router_aux_loss_coef=0.01)
    norms = trained(model)
    assert not (norms > 0).all() or smallest_difference(model) <= 1e-6

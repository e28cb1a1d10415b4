"""Under transformers' expert parallelism the routing is that of one process.

Two ranks share a batch and hold half of the experts each; a bank is called with the choice among
the experts of both. Attention and head are tensor-parallel beside that.
"""

from pathlib import Path

import pytest
import torch
from ranks import on_ranks
from sparse_families import FamilyCollator, row, sparse_family
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.distributed import DistributedConfig

from vlmoe.routing.balancing import SelectionLoads, update_router_bias
from vlmoe.routing.load import record_expert_load
from vlmoe.routing.routed_layers import routed_layers, selection_bias
from vlmoe.routing.trace import record_routing
from vlmoe.training.sparse_loss import SparseLoss

NAMES = ("mixtral", "deepseek_v3")
WITH_BIAS = "deepseek_v3"
Figures = dict[str, list]


def routing_of(model: PreTrainedModel, name: str) -> Figures:
    """What the recorder, the bias and the router losses make of a pass of training and of one."""
    rows = [row(length, 2, n) for n, length in enumerate((9, 14, 5))]
    inputs = FamilyCollator(name)(rows)
    labels = inputs.pop("labels")
    with record_routing(model.eval()) as routing, torch.no_grad():
        logits = model(**inputs).logits
    loss = SparseLoss(model.train(), balance=1.0)
    loads = SelectionLoads(model) if name == WITH_BIAS else None
    with record_expert_load(model, training_only=True) as load:
        loss(model(**inputs), labels).backward()
    if loads is not None:
        update_router_bias(loads)
    layers = routed_layers(model)
    biases = [selection_bias(layer) for layer in layers]
    return {
        "logits": logits[inputs["attention_mask"].bool()].tolist(),
        "experts": [each.experts.tolist() for each in routing.sequences()],
        "load": load.assignments.tolist(),
        "router losses": [float(loss.last.aux_loss)],
        "router gradients": [layer.router.weight.grad.tolist() for layer in layers],
        "biases": [bias.tolist() for bias in biases if bias is not None],
        "experts of a rank": [layer.experts.num_experts for layer in layers],
    }


def routing_on_a_rank(folder: Path) -> list[Figures]:
    """The same of each saved model, spread over the ranks."""
    shared = DistributedConfig(tp_size=2, ep_size=2)
    figures = []
    for name in NAMES:
        model = AutoModelForCausalLM.from_pretrained(folder / name, distributed_config=shared)
        figures.append(routing_of(model, name))
    return figures


@pytest.mark.slow
def test_the_routing_under_expert_parallelism_is_that_of_one_process(tmp_path: Path) -> None:
    (tmp_path / "ranks").mkdir()
    alone = []
    for name in NAMES:
        model = sparse_family(name)
        model.save_pretrained(tmp_path / name)
        alone.append(routing_of(model, name))
    for of_rank in on_ranks(routing_on_a_rank, tmp_path, folder=tmp_path / "ranks"):
        for name, expected, found in zip(NAMES, alone, of_rank, strict=True):
            whole, part = expected.pop("experts of a rank"), found.pop("experts of a rank")
            assert [2 * n for n in part] == whole, name
            expected["experts of a rank"] = whole
            for what in ("experts", "load", "biases"):
                assert found[what] == expected[what], (name, what)
            for what in ("logits", "router losses", "router gradients"):
                close = torch.tensor(found[what]), torch.tensor(expected[what])
                torch.testing.assert_close(*close, rtol=1e-4, atol=1e-6, msg=f"{name}: {what}")

"""Two ranks with different data hold the same router bias, and stop together."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import on_ranks
from router_bias_runs import batch, biases, plain_loop, text_rows
from torch.nn.parallel import DistributedDataParallel

from vlmoe import VLMoEForConditionalGeneration
from vlmoe.routing.balancing import update_router_bias
from vlmoe.routing.finite_checks import check_routing

STEPS = 4

pytestmark = pytest.mark.slow


def train_on_rank(folder: Path) -> dict[str, Any]:
    """Two micro-batches of two rows a step on each rank, checkpointed; at the end NaN on rank 1."""
    rank = torch.distributed.get_rank()
    model = VLMoEForConditionalGeneration.from_pretrained(folder).train()
    model.activation_checkpointing_enable({"use_reentrant": False})
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rows = text_rows()
    num_items = sum((row["labels"][1:] != -100).sum() for row in rows)
    own_rows = rows[4 * rank : 4 * rank + 4]
    history = []
    for _ in range(STEPS):
        for micro_batch in (batch(own_rows[:2]), batch(own_rows[2:])):
            loss = wrapped(**micro_batch, num_items_in_batch=num_items).loss
            (loss * 2).backward()  # DistributedDataParallel takes the mean over the ranks
        check_routing(wrapped)
        optimizer.step()
        optimizer.zero_grad()
        update_router_bias(wrapped)
        history.append(biases(model).clone())

    inputs = batch(own_rows)
    if rank == 1:
        model.get_submodule("model.language_model.layers.2.mlp.router").weight.data.fill_(torch.nan)
    model(**inputs).loss.backward()
    message = ""
    try:
        check_routing(wrapped, step=5)
    except ValueError as error:
        message = str(error)
    return {"biases": torch.stack(history), "message": message}


@pytest.fixture(scope="module")
def started(
    tiny_model: Callable[..., VLMoEForConditionalGeneration],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    folder = tmp_path_factory.mktemp("started")
    text = {"router_bias_update_rate": 0.05, "mlp_only_layers": [1]}
    tiny_model(text=text).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def results(started: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_ranks(train_on_rank, started, folder=tmp_path_factory.mktemp("ranks"))


def test_all_ranks_hold_the_bias_of_one_process_with_the_whole_batch(
    started: Path, results: list[dict[str, Any]]
) -> None:
    model = VLMoEForConditionalGeneration.from_pretrained(started)
    for step in range(STEPS):
        plain_loop(model, text_rows(), steps=1)
        for rank in (0, 1):
            assert torch.equal(results[rank]["biases"][step], biases(model)), (step, rank)
    assert biases(model).abs().max() > 0.1


def test_all_ranks_stop_where_one_has_logits_that_are_not_finite(
    results: list[dict[str, Any]],
) -> None:
    expected = "model.language_model.layers.2.mlp are NaN or infinite in step 5 (in 1 of 2"
    assert all(expected in result["message"] for result in results)

"""DistributedDataParallel trains an upcycled model without find_unused_parameters.

LLaVA's features come from the last layer but one: the last layer and the final norm have no part in
any output. One rank sees no image in any step.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from ranks import on_ranks
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from vlmoe import VLMoEForConditionalGeneration

STEPS = 3


def train(dense_folder: Path) -> tuple[list[float], list[str], int]:
    """Losses of this rank, the frozen parameters, and how many trainable ones have a gradient."""
    model = VLMoEForConditionalGeneration.from_dense(dense_folder, 4, 2).train()
    wrapped = DistributedDataParallel(model, find_unused_parameters=False)
    optimizer = torch.optim.SGD(model.parameters(), 0.02)
    generator = torch.Generator().manual_seed(dist.get_rank())
    losses = []
    for _ in range(STEPS):
        ids = torch.randint(6, 99, (2, 24), generator=generator)
        images = {}
        if dist.get_rank() == 0:
            ids[:, 2:18] = 5
            images["pixel_values"] = torch.randn(2, 3, 16, 16, generator=generator)
        loss = wrapped(input_ids=ids, labels=ids.masked_fill(ids == 5, -100), **images).loss
        loss.backward()
        missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    frozen = [n for n, p in model.named_parameters() if not p.requires_grad]
    return losses, frozen, len(missing)


def test_ddp_trains_without_unused_parameters(
    dense_model: Callable[..., Any], tmp_path: Path
) -> None:
    dense = dense_model("llava")
    dense.save_pretrained(tmp_path / "dense")
    (tmp_path / "ranks").mkdir()
    layers = dense.config.vision_config.num_hidden_layers
    unused = (f"vision_tower.encoder.layers.{layers - 1}.", "vision_tower.post_layernorm.")
    expected = [n for n, _ in dense.named_parameters() if any(part in n for part in unused)]
    for losses, frozen, missing in on_ranks(train, tmp_path / "dense", folder=tmp_path / "ranks"):
        assert len(losses) == STEPS and missing == 0
        assert sorted(frozen) == sorted(expected) != []
    report = VLMoEForConditionalGeneration.from_dense(dense, 4, 2).upcycling_report
    assert sorted(f"model.vision_tower.{name}" for name in report.frozen) == sorted(expected)

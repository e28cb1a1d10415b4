"""One rank has images, the other only text: nothing waits, and the gradients are one process's.

DistributedDataParallel without `find_unused_parameters`, and FSDP2, in a loop without Trainer.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from PIL import Image
from ranks import WORLD_SIZE, on_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from vlmoe import VLMoEConfig, VLMoEForConditionalGeneration
from vlmoe.data.collator import VLMoECollator
from vlmoe.processing.processing_vlmoe import VLMoEProcessor
from vlmoe.routing.balancing import update_router_bias

pytestmark = pytest.mark.slow

Gradients = dict[str, torch.Tensor]
Rows = list[dict[str, Any]]

ROWS_PER_RANK, STEPS, LEARNING_RATE, TOLERANCE = 2, 3, 0.02, 1e-5


def distributed_data_parallel(model: torch.nn.Module) -> torch.nn.Module:
    """The model, replicated."""
    return DistributedDataParallel(model, find_unused_parameters=False)


def fully_sharded(model: VLMoEForConditionalGeneration) -> torch.nn.Module:
    """The model, its decoder layers and those of its tower cut over the ranks."""
    mesh = init_device_mesh("cpu", (WORLD_SIZE,))
    for layer in (*model.model.language_model.layers, *model.model.vision_tower.encoder.layers):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert isinstance(model, FSDPModule)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    return model


STEERED = {
    "modality_experts": {"text": [0, 1, 2], "image": [1, 2, 3]},
    "router_modality_bias": True,
    "router_bias_update_rate": 0.02,
    "router_global_entropy_coef": {"image": 0.5, "text": 0.5},
}
EVERYWHERE = {"vision_num_experts": 5, "projector_num_experts": 3}
KINDS: dict[str, dict[str, Any]] = {  # fields of the config and of its text config
    "plain": {},
    "steered": STEERED,
    "everywhere": EVERYWHERE | {"router_bias_update_rate": 0.02},
    "everywhere, global": EVERYWHERE | {"router_aux_loss_scope": "global"},
}
WRAPPERS = {"DDP": distributed_data_parallel, "FSDP2": fully_sharded}


def load(model_folder: Path, kind: str) -> VLMoEForConditionalGeneration:
    """The saved model in training mode, its experts of one of `KINDS`; what is new is seeded."""
    config = VLMoEConfig.from_pretrained(model_folder)
    for field, value in KINDS[kind].items():
        setattr(config if hasattr(config, field) else config.text_config, field, value)
    torch.manual_seed(0)
    model, _ = VLMoEForConditionalGeneration.from_pretrained(
        model_folder, config=config, output_loading_info=True
    )
    return model.train()


def train(model: torch.nn.Module, steps: list[dict[str, torch.Tensor]], scale: int) -> Any:
    """SGD; the gradients of each step, whole, and with them the biases of the routers.

    Args:
        model: in training mode.
        steps: a batch for each, with the label tokens of the step on all ranks.
        scale: of the loss; a wrapped model averages gradients over ranks.
    """
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE)
    gradients: list[Gradients] = []
    for batch in steps:
        optimizer.zero_grad()
        (model(**batch).loss * scale).backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        whole = {
            name.removeprefix("module."): grad.full_tensor() if isinstance(grad, DTensor) else grad
            for name, grad in grads.items()
        }
        gradients.append({name: grad.clone() for name, grad in whole.items()})
        optimizer.step()
        biases = {n: b for n, b in model.named_buffers() if n.endswith("e_score_correction_bias")}
        if biases:
            update_router_bias(model)
        gradients[-1] |= {n.removeprefix("module."): b.clone() for n, b in biases.items()}
    return gradients


def rank_gradients(model_folder: Path, steps: list[Rows]) -> dict[tuple[str, str], list[Gradients]]:
    """What each wrapper and kind gives on this rank, which sees its own rows of every step."""
    rank, collate = dist.get_rank(), VLMoECollator(VLMoEProcessor.from_pretrained(model_folder))
    own = slice(rank * ROWS_PER_RANK, (rank + 1) * ROWS_PER_RANK)
    batches = []
    for rows in steps:
        num_items = (collate(rows)["labels"][:, 1:] != -100).sum()
        batches.append(collate(rows[own]) | {"num_items_in_batch": num_items})
        assert ("pixel_values" in batches[-1]) == (rank == 0)
    gradients = {}
    for name, wrap in WRAPPERS.items():
        for kind in KINDS:
            model = wrap(load(model_folder, kind))
            gradients[name, kind] = train(model, batches, scale=WORLD_SIZE)
    return gradients


@pytest.fixture(scope="module")
def steps(make_image: Callable[..., Image.Image]) -> list[Rows]:
    """Rows of three steps: one and two images for rank 0, only text for rank 1."""
    steps = []
    for step in range(STEPS):
        rows: Rows = []
        for number, images in enumerate((1, 2, 0, 0)):
            question = [{"type": "image"}] * images
            question += [{"type": "text", "text": "what is it? " * (step + number)}]
            answer = "blue and two and " * (number + 1) + "no"
            messages = [{"role": "user", "content": question}]
            messages += [{"role": "assistant", "content": answer}]
            shown = [make_image(100 * step + 10 * number + i) for i in range(images)]
            rows.append({"messages": messages, "images": shown})
        steps.append(rows)
    return steps


@pytest.fixture(scope="module")
def on_two_ranks(
    model_folder: Path, steps: list[Rows], tmp_path_factory: pytest.TempPathFactory
) -> list[dict[tuple[str, str], list[Gradients]]]:
    """The gradients of each rank, by wrapper and kind, and step."""
    return on_ranks(rank_gradients, model_folder, steps, folder=tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def in_one_process(model_folder: Path, steps: list[Rows]) -> dict[str, list[Gradients]]:
    """The gradients of one process that sees all rows, by kind."""
    collate = VLMoECollator(VLMoEProcessor.from_pretrained(model_folder))
    batches = [collate(rows) for rows in steps]
    return {kind: train(load(model_folder, kind), batches, scale=1) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_rank_without_images_changes_no_gradient(
    wrapper: str,
    kind: str,
    on_two_ranks: list[dict[tuple[str, str], list[Gradients]]],
    in_one_process: dict[str, list[Gradients]],
) -> None:
    for of_rank in on_two_ranks:
        assert len(of_rank[wrapper, kind]) == len(in_one_process[kind]) == STEPS
        for ours, reference in zip(of_rank[wrapper, kind], in_one_process[kind], strict=True):
            assert ours.keys() == reference.keys()
            for name, gradient in reference.items():
                # Key biases: zero in exact arithmetic, compared on the scale of the query biases.
                scale = reference[name.replace("k_proj.bias", "q_proj.bias")].norm()
                assert (ours[name] - gradient).norm() <= TOLERANCE * scale, name

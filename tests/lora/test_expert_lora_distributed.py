"""Routed LoRA on two ranks: DistributedDataParallel, and FSDP2 with each decoder layer cut."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lora_runs import INPUT_IDS, LAYERS, assert_close, lora, randomize
from peft import get_peft_model
from ranks import WORLD_SIZE, on_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM

from vlmoe import enable_routed_lora
from vlmoe.lora import wrappers as expert_lora

pytestmark = pytest.mark.slow

Tensors = dict[str, torch.Tensor]


def load(folder: Path) -> torch.nn.Module:
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.set_experts_implementation("grouped_mm")
    model = get_peft_model(model, lora())
    randomize(model)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.data.normal_(std=0.2, generator=generator)
    return model


def gradients(model: torch.nn.Module, rows: torch.Tensor) -> Tensors:
    """Of the adapters, whole."""
    (model(input_ids=rows).logits ** 2).mean().backward()
    grads = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            grad = parameter.grad
            grad = grad.full_tensor() if isinstance(grad, DTensor) else grad
            grads[name.removeprefix("module.")] = grad
    return grads


def distributed_data_parallel(model: torch.nn.Module) -> torch.nn.Module:
    return DistributedDataParallel(model)


def fully_sharded(model: torch.nn.Module) -> torch.nn.Module:
    mesh = init_device_mesh("cpu", (WORLD_SIZE,))
    for layer in model.base_model.model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    return model


WRAPPERS = {"DDP": distributed_data_parallel, "FSDP2": fully_sharded}


def on_rank(folder: Path, wrapper: str) -> tuple[Tensors, int]:
    """The gradients of this rank, which sees one of the rows, and its number of routed calls."""
    model = load(folder)
    enable_routed_lora(model)
    model = WRAPPERS[wrapper](model)
    calls: list[int] = []
    routed = expert_lora.routed_lora_forward

    def counted(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(1)
        return routed(*args, **kwargs)

    expert_lora.routed_lora_forward = counted
    rank = dist.get_rank()
    return gradients(model, INPUT_IDS[rank : rank + 1]), len(calls)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_two_ranks_have_the_gradients_of_one_process_by_peft(
    tiny_moe: Any, wrapper: str, tmp_path: Path
) -> None:
    (tmp_path / "ranks").mkdir()
    tiny_moe("Qwen3MoeForCausalLM").save_pretrained(tmp_path / "model")
    reference = gradients(load(tmp_path / "model"), INPUT_IDS)
    ranks = on_ranks(on_rank, tmp_path / "model", wrapper, folder=tmp_path / "ranks")
    for ours, calls in ranks:
        assert calls == LAYERS
        assert_close(ours, reference)

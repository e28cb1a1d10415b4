"""FSDP2 by `Trainer` on CPU ranks, for which Accelerate does not turn it on."""

from accelerate import PartialState
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import Trainer, TrainingArguments

LAYERS = {
    "llava_qwen3_moe": ["Qwen3MoeDecoderLayer", "CLIPEncoderLayer"],
    "ernie4_5_vl_moe": ["Ernie4_5_VLMoeDecoderLayer", "Ernie4_5_VLMoeVisionBlock"],
    "qwen3_vl_moe": ["Qwen3VLMoeTextDecoderLayer", "Qwen3VLMoeVisionBlock"],
}
"""What is cut; Accelerate does not find all of those that LLaVA's class names itself."""


def fsdp2_of(family: str, **fields: object) -> dict[str, object]:
    """Return the arguments of `TrainingArguments` that cut a family's layers over the ranks."""
    config = {"version": 2, "transformer_layer_cls_to_wrap": LAYERS[family]} | fields
    return {"fsdp": True, "fsdp_config": config}


def shard_on_cpus(arguments: TrainingArguments) -> TrainingArguments:
    """Let Accelerate take these ranks for those of a device, on which it shards.

    `AcceleratorState` ignores an FSDP plugin for `MULTI_CPU` ranks, without a word, and trains by
    DistributedDataParallel. Only its next choice is changed: tensors stay on the CPU.
    """
    assert arguments.fsdp and arguments.device.type == "cpu"
    PartialState().distributed_type = DistributedType.MULTI_XPU
    return arguments


def is_sharded(trainer: Trainer) -> bool:
    """Return whether the model that was trained is cut over the ranks."""
    model: nn.Module = trainer.model_wrapped
    return isinstance(model, FSDPModule)

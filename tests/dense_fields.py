"""Fields of dense models that more than one test builds, and their random weights."""

from typing import Any

import torch
from torch import nn

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
HALF_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
GRANITE = {
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.7,
    "attention_multiplier": 0.2,
    "logits_scaling": 2.0,
}
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
TEXT_SIZES = (*SIZES, "vocab_size", "num_key_value_heads", "max_position_embeddings")
VISION_SIZES = (*SIZES, "image_size", "patch_size")


@torch.no_grad()
def randomised(model: nn.Module) -> Any:
    """Weights large enough that every part of the model shows in the logits; norms around one."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        mean = 1.0 if parameter.dim() == 1 and bool((parameter == 1).all()) else 0.0
        parameter.normal_(mean, 0.2)
    return model.eval()

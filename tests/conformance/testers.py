# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""What transformers' common tests ask a model for: sizes, a configuration, and inputs."""

from collections.abc import Callable
from typing import Any

import torch

from vlmoe import (
    VLMoEConfig,
    VLMoEForConditionalGeneration,
    VLMoEModel,
    VLMoETextConfig,
    VLMoETextModel,
)

LAYERS = 2  # the most that the common tests allow
IMAGE_TOKEN = 20  # behind those that a common test trains the model to generate


class TextModelTester:
    """`VLMoETextModel`: a dense layer, then a sparse one with a window and a shared expert."""

    batch_size, seq_length, is_training = 3, 11, True
    num_hidden_layers = LAYERS
    base_model_class = VLMoETextModel
    text_fields: dict[str, Any] = {  # noqa: RUF012
        "num_hidden_layers": LAYERS,
        "mlp_only_layers": [0],
        "layer_types": ["full_attention", "sliding_attention"],
        "sliding_window": 6,
        "num_shared_experts": 1,
        "qk_norm": True,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10_000.0,
            "partial_rotary_factor": 0.5,
        },
        "qkv_bias": True,
        "initializer_range": 0.02,
    }

    def __init__(self, tiny_config: Callable[..., VLMoEConfig]) -> None:
        self.tiny_config = tiny_config
        text_config = tiny_config(text=self.text_fields).text_config
        self.hidden_size = text_config.hidden_size
        self.num_attention_heads = text_config.num_attention_heads

    def get_config(self) -> VLMoETextConfig:
        """Of the tiny sizes of all our tests."""
        return self.tiny_config(text=self.text_fields).text_config

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, torch.Tensor]]:
        """The configuration and a batch of text."""
        config = self.get_config()
        text_config = config.get_text_config()
        first = IMAGE_TOKEN + 1  # behind the special tokens and the image token
        input_ids = torch.randint(first, text_config.vocab_size, (self.batch_size, self.seq_length))
        attention_mask = torch.ones_like(input_ids)
        return config, {"input_ids": input_ids, "attention_mask": attention_mask}


class ModelTester(TextModelTester):
    """`VLMoEModel` and `VLMoEForConditionalGeneration`: all layers sparse, one image per row."""

    base_model_class = VLMoEModel
    conditional_generation_class = causal_lm_class = VLMoEForConditionalGeneration
    text_fields = {  # noqa: RUF012
        "num_hidden_layers": LAYERS,
        "num_shared_experts": 1,
        "initializer_range": 0.02,
    }
    image_tokens = 4

    def get_config(self) -> VLMoEConfig:
        """Some tests read `vocab_size` from the whole configuration, where ours has none."""
        text_config = self.tiny_config(text=self.text_fields).text_config
        fields = {"vocab_size": text_config.vocab_size, "image_token_id": IMAGE_TOKEN}
        return self.tiny_config(text=self.text_fields, **fields)

    def prepare_config_and_inputs_for_common(self) -> tuple[VLMoEConfig, dict[str, torch.Tensor]]:
        """The configuration and a batch as the processor makes it."""
        config, inputs = super().prepare_config_and_inputs_for_common()
        inputs["input_ids"][:, 1 : 1 + self.image_tokens] = config.image_token_id
        size = config.vision_config.image_size
        return config, inputs | {
            "mm_token_type_ids": (inputs["input_ids"] == config.image_token_id).long(),
            "pixel_values": torch.rand(self.batch_size, 1, 3, size, size),
            "pixel_attention_mask": torch.ones(self.batch_size, 1, size, size, dtype=torch.long),
        }

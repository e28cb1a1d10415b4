# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""VLMoE: sparse mixture-of-experts vision-language models for the Hugging Face ecosystem.

Importing the package registers its classes with `AutoConfig`, `AutoModel`,
`AutoModelForImageTextToText`, `AutoModelForMultimodalLM`, `AutoModelForCausalLM` (which
`AutoPeftModelForCausalLM` loads adapters with) and `AutoProcessor`. What adapts experts with LoRA
(`expert_lora_config`, `enable_routed_lora`, `disable_routed_lora`, `hotswap_expert_lora`) needs
peft, which is imported on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)

from .configuration.configuration_vlmoe import VLMoEConfig
from .configuration.configuration_vlmoe_text import VLMoETextConfig
from .modeling_vlmoe.modeling_vlmoe import VLMoEForConditionalGeneration, VLMoEModel
from .modeling_vlmoe.modeling_vlmoe_text import VLMoEPreTrainedModel, VLMoETextModel
from .modeling_vlmoe.quantization import expert_int8_config
from .processing.processing_vlmoe import VLMoEProcessor

if TYPE_CHECKING:
    from .lora.wrappers import disable_routed_lora as disable_routed_lora
    from .lora.wrappers import enable_routed_lora as enable_routed_lora
    from .lora.wrappers import expert_lora_config as expert_lora_config
    from .lora.wrappers import hotswap_expert_lora as hotswap_expert_lora

AutoConfig.register("vlmoe", VLMoEConfig)
AutoConfig.register("vlmoe_text", VLMoETextConfig)
AutoModel.register(VLMoEConfig, VLMoEModel)
AutoModel.register(VLMoETextConfig, VLMoETextModel)
AutoModelForImageTextToText.register(VLMoEConfig, VLMoEForConditionalGeneration)
AutoModelForMultimodalLM.register(VLMoEConfig, VLMoEForConditionalGeneration)
AutoModelForCausalLM.register(VLMoEConfig, VLMoEForConditionalGeneration)
AutoProcessor.register(VLMoEConfig, VLMoEProcessor)

__all__ = [
    "VLMoEConfig",
    "VLMoEForConditionalGeneration",
    "VLMoEModel",
    "VLMoEPreTrainedModel",
    "VLMoEProcessor",
    "VLMoETextConfig",
    "VLMoETextModel",
    "expert_int8_config",
]


_EXPERT_LORA = (
    *("disable_routed_lora", "enable_routed_lora"),
    *("expert_lora_config", "hotswap_expert_lora"),
)


def __getattr__(name: str) -> Any:
    if name in _EXPERT_LORA:
        return getattr(import_module(f"{__name__}.lora.wrappers"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

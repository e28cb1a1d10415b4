# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""VLMoE: sparse mixture-of-experts vision-language models for the Hugging Face ecosystem.

Importing the package registers its classes with `AutoConfig`, `AutoModel`,
`AutoModelForImageTextToText` and `AutoProcessor`.
"""

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

from .configuration.configuration_vlmoe import VLMoEConfig
from .configuration.configuration_vlmoe_text import VLMoETextConfig
from .modeling_vlmoe.modeling_vlmoe import VLMoEForConditionalGeneration, VLMoEModel
from .modeling_vlmoe.modeling_vlmoe_text import VLMoEPreTrainedModel, VLMoETextModel
from .modeling_vlmoe.quantization import expert_int8_config
from .processing.processing_vlmoe import VLMoEProcessor

AutoConfig.register("vlmoe", VLMoEConfig)
AutoConfig.register("vlmoe_text", VLMoETextConfig)
AutoModel.register(VLMoEConfig, VLMoEModel)
AutoModel.register(VLMoETextConfig, VLMoETextModel)
AutoModelForImageTextToText.register(VLMoEConfig, VLMoEForConditionalGeneration)
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

# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""VLMoE: sparse mixture-of-experts vision-language models for the Hugging Face ecosystem.

Importing the package registers its classes with `AutoConfig`, `AutoModel`,
`AutoModelForImageTextToText`, `AutoModelForMultimodalLM`, `AutoModelForCausalLM` (which
`AutoPeftModelForCausalLM` loads adapters with) and `AutoProcessor`. Every other public name is
imported from its module on first use, so that the import costs no more than the classes do.
"""

from importlib import import_module
from importlib.util import find_spec
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
from .processing.processing_vlmoe import VLMoEProcessor

if TYPE_CHECKING:
    from .compression.compress_experts import compress as compress
    from .compression.prune_neurons import prune as prune
    from .data.answers import answer as answer
    from .data.collator import VLMoECollator as VLMoECollator
    from .data.collator import VLMoEPreferenceCollator as VLMoEPreferenceCollator
    from .data.collator import VLMoEPromptCollator as VLMoEPromptCollator
    from .hub.export import export as export
    from .hub.push_to_hub import push as push
    from .lora.add import add_expert_lora as add_expert_lora
    from .lora.config import expert_lora_config as expert_lora_config
    from .lora.int8 import expert_int8_config as expert_int8_config
    from .lora.merge import merge_expert_lora as merge_expert_lora
    from .lora.wrappers import disable_routed_lora as disable_routed_lora
    from .lora.wrappers import enable_routed_lora as enable_routed_lora
    from .lora.wrappers import hotswap_expert_lora as hotswap_expert_lora
    from .routing.balancing import RouterBiasCallback as RouterBiasCallback
    from .routing.balancing import update_router_bias as update_router_bias
    from .routing.inspection.inspect import inspect_routing as inspect_routing
    from .routing.trace import record_routing as record_routing
    from .tasks.loading import load_rows as load_rows
    from .tasks.table import TASKS as TASKS
    from .tasks.table import get_task as get_task
    from .tasks.task import Task as Task
    from .training.embedding import (
        VLMoESentenceTransformerTrainer as VLMoESentenceTransformerTrainer,
    )
    from .training.embedding import embedding_model as embedding_model
    from .training.embedding import evaluate_retrieval as evaluate_retrieval
    from .training.evaluation import evaluate as evaluate
    from .training.group_lasso import GroupLasso as GroupLasso
    from .training.label_scores import score_labels as score_labels
    from .training.sparse_loss import SparseLoss as SparseLoss
    from .training.trainer import VLMoETrainer as VLMoETrainer
    from .training.trl_trainers import VLMoEDPOTrainer as VLMoEDPOTrainer
    from .training.trl_trainers import VLMoESFTTrainer as VLMoESFTTrainer
    from .upcycling.dense_to_sparse import upcycle as upcycle

    __version__: str

AutoConfig.register("vlmoe", VLMoEConfig)
AutoConfig.register("vlmoe_text", VLMoETextConfig)
AutoModel.register(VLMoEConfig, VLMoEModel)
AutoModel.register(VLMoETextConfig, VLMoETextModel)
AutoModelForImageTextToText.register(VLMoEConfig, VLMoEForConditionalGeneration)
AutoModelForMultimodalLM.register(VLMoEConfig, VLMoEForConditionalGeneration)
AutoModelForCausalLM.register(VLMoEConfig, VLMoEForConditionalGeneration)
AutoProcessor.register(VLMoEConfig, VLMoEProcessor)

# Where each name that is imported on first use is defined; the imports above are for editors.
_MODULES = {
    "GroupLasso": "training.group_lasso",
    "RouterBiasCallback": "routing.balancing",
    "SparseLoss": "training.sparse_loss",
    "TASKS": "tasks.table",
    "Task": "tasks.task",
    "VLMoECollator": "data.collator",
    "VLMoEDPOTrainer": "training.trl_trainers",
    "VLMoEPreferenceCollator": "data.collator",
    "VLMoEPromptCollator": "data.collator",
    "VLMoESFTTrainer": "training.trl_trainers",
    "VLMoESentenceTransformerTrainer": "training.embedding",
    "VLMoETrainer": "training.trainer",
    "add_expert_lora": "lora.add",
    "answer": "data.answers",
    "compress": "compression.compress_experts",
    "disable_routed_lora": "lora.wrappers",
    "enable_routed_lora": "lora.wrappers",
    "embedding_model": "training.embedding",
    "evaluate": "training.evaluation",
    "evaluate_retrieval": "training.embedding",
    "expert_int8_config": "lora.int8",
    "expert_lora_config": "lora.config",
    "export": "hub.export",
    "get_task": "tasks.table",
    "hotswap_expert_lora": "lora.wrappers",
    "inspect_routing": "routing.inspection.inspect",
    "load_rows": "tasks.loading",
    "merge_expert_lora": "lora.merge",
    "prune": "compression.prune_neurons",
    "push": "hub.push_to_hub",
    "record_routing": "routing.trace",
    "upcycle": "upcycling.dense_to_sparse",
    "score_labels": "training.label_scores",
    "update_router_bias": "routing.balancing",
}
# What a module needs beyond the package's own dependencies, as it is imported.
_NEEDS = {
    "lora.add": ("peft",),
    "lora.config": ("peft",),
    "lora.merge": ("peft",),
    "lora.wrappers": ("peft",),
    "training.embedding": ("sentence_transformers", "accelerate", "datasets"),
    "training.trainer": ("accelerate",),
    "training.trl_trainers": ("trl",),
}


# A star import asks for every name here, so those of a missing extra are left out.
_missing = {module for module, needs in _NEEDS.items() if not all(map(find_spec, needs))}
__all__ = [
    "VLMoEConfig",
    "VLMoEForConditionalGeneration",
    "VLMoEModel",
    "VLMoEPreTrainedModel",
    "VLMoEProcessor",
    "VLMoETextConfig",
    "VLMoETextModel",
    "__version__",
]
__all__ += [name for name, module in _MODULES.items() if module not in _missing]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("vlmoe")
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*__all__, *_MODULES, *(name for name in globals() if name.startswith("__"))})

# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Makes our classes known to transformers' tests, as its own registration would.

The tests look a class up by its name in the tables of the library: without an entry they skip it,
or pass without having done anything.
"""

import json
from pathlib import Path

TINY_MODEL = {
    "VLMoEForConditionalGeneration": {
        "tokenizer_classes": ["PreTrainedTokenizerFast"],
        "processor_classes": ["Idefics3ImageProcessorPil"],
        "model_classes": ["VLMoEForConditionalGeneration"],
    }
}


def write_tiny_model_summary(folder: Path) -> None:
    """What the pipeline tests read at import: which components a tiny model comes with."""
    reports = folder / "reports"
    reports.mkdir(parents=True, exist_ok=True)
    (reports / "tiny_model_summary.json").write_text(json.dumps(TINY_MODEL))


def register() -> None:
    """Enter our classes into the tables of the library and of its tests."""
    from transformers.models.auto import modeling_auto, processing_auto

    import vlmoe
    from tests import test_expert_parallel_mixin, test_pipeline_mixin

    modeling_auto.MODEL_MAPPING_NAMES["vlmoe"] = "VLMoEModel"
    modeling_auto.MODEL_MAPPING_NAMES["vlmoe_text"] = "VLMoETextModel"
    modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES["vlmoe"] = (
        "VLMoEForConditionalGeneration"
    )
    processing_auto.PROCESSOR_MAPPING_NAMES["vlmoe"] = "VLMoEProcessor"
    test_pipeline_mixin.transformers_module.VLMoEProcessor = vlmoe.VLMoEProcessor
    # The model types whose tests in several processes run; see check_tensor_parallel.py for others.
    test_expert_parallel_mixin.EP_DISTRIBUTED_TEST_MODEL_TYPES.add("vlmoe")

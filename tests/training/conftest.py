"""Fixtures of the training tests."""

from collections.abc import Callable
from pathlib import Path

import pytest

from vlmoe import VLMoEForConditionalGeneration
from vlmoe.processing.processing_vlmoe import VLMoEProcessor


@pytest.fixture(scope="module")
def model_folder(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model: Callable[..., VLMoEForConditionalGeneration],
    processor: VLMoEProcessor,
) -> Path:
    """A model with both router losses, and its processor."""
    folder = tmp_path_factory.mktemp("model")
    text = {"router_aux_loss_coef": 1.0, "router_z_loss_coef": 1.0}
    tiny_model(text=text | {"vocab_size": len(processor.tokenizer)}).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder

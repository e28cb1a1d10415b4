"""Outputs that are no numbers end what is computed from them, and the layer is named."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vlmoe import VLMoEForConditionalGeneration, VLMoEProcessor
from vlmoe.data.loading import load_rows
from vlmoe.hub.finite_outputs import (
    finite_logits,
    first_non_finite_module,
    require_finite_logits,
)
from vlmoe.routing.inspection.analysis import dataset_routing
from vlmoe.routing.trace import record_routing
from vlmoe.training.evaluation import evaluate

ROUTER, NORM = "layers.1.mlp.router", "language_model.norm"
IDS = {"input_ids": torch.arange(6, 14)[None]}


@pytest.fixture
def model(saved_model: Path) -> VLMoEForConditionalGeneration:
    """Its weights are finite; the norm's are too large for the head."""
    model = VLMoEForConditionalGeneration.from_pretrained(saved_model)
    with torch.no_grad():
        model.get_parameter(f"model.{NORM}.weight").fill_(3e38)
    return model


@pytest.fixture
def sound(saved_model: Path) -> VLMoEForConditionalGeneration:
    return VLMoEForConditionalGeneration.from_pretrained(saved_model)


def test_the_first_module_is_found(model: Any, sound: Any) -> None:
    assert first_non_finite_module(sound, IDS) is None
    name = first_non_finite_module(model, IDS)
    assert name in (f"model.{NORM}", "lm_head")
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_row_without_a_largest_number_is_refused(sound: Any, value: float) -> None:
    logits = torch.zeros(2, 1, 9)
    logits[0, 0, 3] = -float("inf")  # a token that must not be said
    require_finite_logits(logits, sound, IDS)
    logits[1] = value
    with pytest.raises(ValueError, match="NaN or infinite: they begin after the prompt"):
        require_finite_logits(logits, sound, IDS)


def test_generate_raises_and_suppressed_tokens_are_no_fault(model: Any, sound: Any) -> None:
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    plain = sound.generate(**IDS, **options, suppress_tokens=[7])
    checked = sound.generate(
        **IDS, **options, suppress_tokens=[7], logits_processor=finite_logits(sound, IDS)
    )
    assert torch.equal(plain, checked)
    with pytest.raises(ValueError, match=r"first are those of (lm_head|.*norm)"):
        model.generate(**IDS, **options, logits_processor=finite_logits(model, IDS))


@pytest.mark.parametrize("compute", [evaluate, dataset_routing])
def test_evaluation_and_inspection_raise(
    model: Any, saved_model: Path, data_folder: Path, compute: Callable[..., Any]
) -> None:
    rows = load_rows(str(data_folder), "test")
    processor = VLMoEProcessor.from_pretrained(saved_model)
    with pytest.raises(ValueError, match="outputs are NaN or infinite"):
        compute(model, processor, rows, batch_size=4, progress=False)


def test_a_router_without_numbers_is_named(sound: Any) -> None:
    with torch.no_grad():
        router = sound.model.language_model.layers[1].mlp.router
        router.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="router of layer 1"), record_routing(sound):
        sound(**IDS)

"""Tiny sparse models with calibration rows, for the tests of compression."""

from typing import Any

import torch
from builders import assistant, picture, row, user
from native_processors import tiny_processor
from sparse_families import sparse_family
from tiny_sizes import TEXT, VISION, VOCABULARY
from transformers import PreTrainedModel

from vlmoe import VLMoEConfig, VLMoEForConditionalGeneration, VLMoEProcessor
from vlmoe.compression.calibration import Batch, Calibration, calibrate
from vlmoe.data.tokenizer import train_tokenizer

CASES = ("vlmoe", "qwen3_vl_moe", "qwen3_5_moe", "mixtral")
WORDS = ("red", "blue", "a circle", "yes", "no", "green")


def rows(has_images: bool = True, count: int = 12, first: int = 0) -> list[dict[str, Any]]:
    """Questions about pictures, or without."""
    made = []
    for number in range(first, first + count):
        images = [picture(number)] if has_images and number % 3 else []
        asked = user(f"what is number {number}?", len(images))
        made.append(row(asked, assistant(WORDS[number % len(WORDS)]), images=images))
    return made


def vlmoe_model(**text: Any) -> VLMoEForConditionalGeneration:
    """A tiny model of random weights, in evaluation mode."""
    torch.manual_seed(0)
    vision = {"model_type": "siglip_vision_model", "vision_use_head": False} | VISION
    fields = TEXT | {"vocab_size": VOCABULARY, "hidden_size": 32} | text
    top = {"image_token_id": 5, "pixel_shuffle_factor": 2}
    config = VLMoEConfig(text_config=fields, vision_config=vision, **top)
    return VLMoEForConditionalGeneration(config).eval()


def vlmoe_processor() -> VLMoEProcessor:
    """The processor of `vlmoe_model`."""
    texts = [f"what is number {n}? {word}" for n, word in enumerate(WORDS * 3)]
    return VLMoEProcessor.for_config(vlmoe_model().config, train_tokenizer(texts, VOCABULARY))


def model_and_processor(name: str, **text: Any) -> tuple[PreTrainedModel, Any]:
    """A model by its case, and its processor."""
    if name == "vlmoe":
        return vlmoe_model(**text), vlmoe_processor()
    return sparse_family(name).eval(), tiny_processor(name)


def calibration_of(name: str, **text: Any) -> Calibration:
    """Calibration of a case."""
    model, processor = model_and_processor(name, **text)
    return calibrate(model, processor, rows(name != "mixtral"), batch_size=4)


def case(name: str, **text: Any) -> tuple[PreTrainedModel, tuple[Batch, ...]]:
    """A model by its case, and its calibration batches."""
    return model_and_processor(name, **text)[0], calibration_of(name, **text).batches

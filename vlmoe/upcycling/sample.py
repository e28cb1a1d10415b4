# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Pictures and texts that a dense and a sparse model are compared on."""

import copy
from typing import Any

import torch

from .exactness import drawn_picture

TEXTS = (
    " Compare the two pictures: which shapes and colours do both of them have?",
    " What is in the upper half of the picture? Answer with one word.",
    "Name the capital of France, and count from one to five.",
)


def prepared_sample(processor: Any, with_images: bool = True) -> dict[str, torch.Tensor]:
    """Inputs of three rows, padded on the left: with two pictures, with one, with text alone.

    Args:
        processor: a `VLMoEProcessor`.
        with_images: False for texts alone, as a language model without vision knows them.
    """
    processor = copy.copy(processor)
    if processor.tokenizer.pad_token is None:  # masked anyway
        processor.tokenizer = copy.deepcopy(processor.tokenizer)
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    wide = drawn_picture(640, 360, ("white", "gold", "teal"))
    high = drawn_picture(300, 420, ("navy", "crimson", "olive"))
    shown = [[wide, high], [high], []] if with_images else [[], [], []]
    texts = [
        processor.image_token * len(pictures) + text
        for pictures, text in zip(shown, TEXTS, strict=True)
    ]
    images = {"images": shown} if with_images else {}
    inputs = processor(text=texts, **images, padding=True, padding_side="left", return_tensors="pt")
    return dict(inputs)

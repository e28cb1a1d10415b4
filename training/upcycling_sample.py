# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Pictures and texts that a dense and a sparse model are compared on."""

import copy
from typing import Any

import torch
from PIL import Image, ImageDraw

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
    shown = [drawn_pictures(), drawn_pictures()[1:], []] if with_images else [[], [], []]
    texts = [
        processor.image_token * len(pictures) + text
        for pictures, text in zip(shown, TEXTS, strict=True)
    ]
    images = {"images": shown} if with_images else {}
    inputs = processor(text=texts, **images, padding=True, padding_side="left", return_tensors="pt")
    return dict(inputs)


def drawn_pictures() -> list[Image.Image]:
    """A wide picture and a high one, of shapes on a ground of several colours."""
    pictures = []
    for width, height in ((640, 360), (300, 420)):
        picture = Image.linear_gradient("L").resize((width, height)).convert("RGB")
        draw = ImageDraw.Draw(picture)
        draw.ellipse((width // 8, height // 8, width // 2, height // 2), fill="gold")
        draw.rectangle((width // 2, height // 2, width - 20, height - 30), fill="teal")
        draw.polygon(
            [(width // 3, height - 9), (width // 2, height // 2), (9, height - 40)], fill="crimson"
        )
        pictures.append(picture)
    return pictures


__all__ = ["drawn_pictures", "prepared_sample"]

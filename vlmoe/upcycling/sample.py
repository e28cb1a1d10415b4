# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Images and texts on which a dense and a sparse model are compared."""

import copy

import numpy as np
import torch
from PIL import Image, ImageDraw
from transformers import PreTrainedModel

from ..configuration.configuration_vlmoe import VLMoEConfig
from ..configuration.tower_facts import tower_facts
from ..processing.processing_vlmoe import VLMoEProcessor
from .exactness import inputs_for

Tensor = torch.Tensor
TEXTS = (
    " Compare the two pictures: which shapes and colours do both of them have?",
    " What is in the upper half of the picture? Answer with one word.",
    "Name the capital of France, and count from one to five.",
)


def prepared_sample(processor: VLMoEProcessor, with_images: bool = True) -> dict[str, torch.Tensor]:
    """Encode three rows, padded on the left: with two images, with one, and with text alone.

    Args:
        processor: of the sparse model.
        with_images: False for texts alone, to compare a language model without vision.
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


@torch.no_grad()
def drawn_sample(
    model: PreTrainedModel, config: VLMoEConfig, with_images: bool, length: int = 24
) -> dict[str, Tensor]:
    """Draw inputs for a model without its processor: three rows, padded on the left.

    The first shows two images, the second one, the third none; the words are random tokens. A row
    of tiles has padding in its middle. For towers that take a pixel mask, one tile is partly
    padding.

    Args:
        model: the dense model, which gives the number of tokens of an image.
        config: of the sparse model.
        with_images: False for a language model alone.
        length: tokens of text of the longest row.
    """
    rows, pixels, mask = [2, 1, 0] if with_images else [0, 0, 0], None, None
    tokens_per_image = 0
    if with_images:
        pixels, mask = _drawn_tiles(config)
        encoded = model.get_image_features(
            **_image_inputs(model, pixels[1:, :1], mask[1:, :1]), return_dict=True
        ).pooler_output
        tokens_per_image = sum(len(each.reshape(-1, each.shape[-1])) for each in encoded)
    generator = torch.Generator().manual_seed(0)
    texts, image = [], [config.image_token_id] * tokens_per_image
    for row, images in enumerate(rows):
        size = (length - 5 * row,)
        words = torch.randint(config.text_config.vocab_size - 1, size, generator=generator)
        words = words + (words >= config.image_token_id)  # never the image token
        text = words.tolist()
        for i in range(images):
            at = 2 + i * (len(image) + 3)
            text = text[:at] + image + text[at:]
        texts.append(text)
    longest = max(map(len, texts))
    pad = config.text_config.pad_token_id or 0
    pad = pad if pad != config.image_token_id else pad + 1
    sample = {
        "input_ids": torch.tensor([[pad] * (longest - len(t)) + t for t in texts]),
        "attention_mask": torch.tensor([[0] * (longest - len(t)) + [1] * len(t) for t in texts]),
    }
    if pixels is not None and mask is not None:
        sample |= {"pixel_values": pixels, "pixel_attention_mask": mask}
    return sample


def _image_inputs(model: PreTrainedModel, pixels: Tensor, mask: Tensor) -> dict[str, Tensor]:
    ids = torch.zeros(1, 1, dtype=torch.long)
    sample = {"input_ids": ids, "attention_mask": ids, "pixel_values": pixels}
    inputs = inputs_for(model, sample | {"pixel_attention_mask": mask})
    return {
        name: tensor.to(model.device) for name, tensor in inputs.items() if name.startswith("pixel")
    }


def _drawn_tiles(config: VLMoEConfig) -> tuple[Tensor, Tensor]:
    """Draw shapes: pixels (3, 3, 3, H, W) from -1 to 1 and mask (3, 3, H, W)."""
    vision = config.vision_config
    size = vision.image_size
    height, width = (size, size) if isinstance(size, int) else size
    pixels, mask = torch.zeros(3, 3, 3, height, width), torch.zeros(3, 3, height, width).long()
    colors = [("navy", "gold", "white"), ("white", "red", "teal"), ("olive", "white", "black")]
    places = [(0, 0), (0, 2), (1, 0)]  # tile 1 of row 0 is padding
    for (row, tile), each in zip(places, colors, strict=True):
        picture = drawn_picture(width, height, each)
        values = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1) / 127.5 - 1
        pixels[row, tile], mask[row, tile] = values, 1
    patch = vision.patch_size
    if tower_facts(vision).takes_patch_mask and min(height, width) > patch:
        pixels[1, 0, :, -patch:] = 0
        mask[1, 0, -patch:] = 0
    return pixels, mask


def drawn_picture(width: int, height: int, colors: tuple[str, str, str]) -> Image.Image:
    """Draw an ellipse and a rectangle; colors of background, ellipse and rectangle."""
    picture = Image.new("RGB", (width, height), colors[0])
    draw = ImageDraw.Draw(picture)
    draw.ellipse((1, 2, 2 * width // 3, height // 2), fill=colors[1])
    draw.rectangle((width // 3, height // 2, width - 2, height - 3), fill=colors[2])
    return picture

# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Dense and sparse logits side by side.

The error is max|sparse - dense| / max|dense| over all real tokens: a deep model's logits differ by
rounding that grows with their size. Weights in half precision are computed with in fp32, one at a
time, so that the model is never there twice.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch.overrides import TorchFunctionMode

from ..configuration.configuration_vlmoe import VLMoEConfig
from ..configuration.configuration_vlmoe_text import MODEL_TYPE
from ..configuration.tower_facts import tower_facts

Tensor = torch.Tensor
TOLERANCE = 1e-5
HALF = (torch.float16, torch.bfloat16)
PRODUCTS = (
    *(F.linear, F.conv2d, F.layer_norm, F.group_norm, F.multi_head_attention_forward),
    *(torch.matmul, torch.bmm, torch.Tensor.matmul, torch.Tensor.__matmul__),
)


class UpcyclingError(ValueError):
    """The sparse model does not compute what the dense one does."""


@dataclass(frozen=True)
class Outputs:
    """What a model said of the sample: logits (tokens, vocabulary) of its real tokens in fp32."""

    logits: Tensor
    loss: float

    def error(self, reference: "Outputs") -> float:
        """max|d| / max|reference|, over the reference's vocabulary."""
        shared = self.logits[:, : reference.logits.shape[1]]
        difference = (shared - reference.logits).abs().max()
        return float(difference / reference.logits.abs().max())

    def same_argmax(self, reference: "Outputs") -> float:
        """Share of tokens with the same most likely next token."""
        shared = self.logits[:, : reference.logits.shape[1]]
        return float((shared.argmax(-1) == reference.logits.argmax(-1)).float().mean())


@torch.no_grad()
def outputs_of(model: Any, sample: Mapping[str, Tensor], in_fp32: bool) -> Outputs:
    """Run a dense or sparse model over a sample.

    Args:
        model: in evaluation mode.
        sample: inputs as VLMoE's processor makes them.
        in_fp32: compute with the weights in fp32, whatever they are stored in.

    Raises:
        UpcyclingError: in fp32 a logit is NaN or infinite.
    """
    inputs = {name: tensor.to(model.device) for name, tensor in _inputs_for(model, sample).items()}
    with ComputingInFp32() if in_fp32 else nullcontext():
        logits = model(**inputs, use_cache=False).logits
    logits, real = logits.float().cpu(), sample["attention_mask"].bool()
    if in_fp32 and not logits[real].isfinite().all():
        raise UpcyclingError(
            f"The logits of {type(model).__name__} are NaN or infinite; its weights are finite, "
            "but too large. Start from another checkpoint."
        )
    image_token_id = getattr(model.config, "image_token_id", None)
    labels = sample["input_ids"].masked_fill(~real, -100)
    if image_token_id is not None:
        labels = labels.masked_fill(labels == image_token_id, -100)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    return Outputs(logits[real], float(loss))


def _inputs_for(model: Any, sample: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The sample as the model's class takes it."""
    family = model.config.model_type
    inputs = {name: sample[name] for name in ("input_ids", "attention_mask")}
    if "pixel_values" not in sample:
        return inputs
    pixels, mask = sample["pixel_values"], sample["pixel_attention_mask"]
    if family in (MODEL_TYPE, "idefics3", "smolvlm"):
        return inputs | {"pixel_values": pixels, "pixel_attention_mask": mask}
    real = mask.flatten(0, 1).flatten(1).any(-1)
    return inputs | {"pixel_values": pixels.flatten(0, 1)[real]}


class ComputingInFp32(TorchFunctionMode):
    """While active, models with weights in half precision compute with them in fp32.

    A weight is widened where it is multiplied, one at a time, and of a bank of experts the one that
    `eager` takes; nothing is narrowed. What is elementwise widens by torch's type promotion.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Widen what `func` multiplies, and what it would narrow."""
        widen = _wide_dtype if func is torch.Tensor.to else _wide_tensor
        if func is torch.Tensor.to or func in PRODUCTS:
            args = tuple(widen(value) for value in args)
            kwargs = {name: widen(value) for name, value in (kwargs or {}).items()}
        result = func(*args, **(kwargs or {}))
        return result.float() if func is F.embedding else result


def _wide_dtype(value: Any) -> Any:
    is_dtype = isinstance(value, torch.dtype)
    return torch.float32 if is_dtype and value in HALF else value


def _wide_tensor(value: Any) -> Any:
    is_half = isinstance(value, Tensor) and value.dtype in HALF
    return value.float() if is_half else value


@torch.no_grad()
def drawn_sample(
    model: Any, config: VLMoEConfig, with_images: bool, length: int = 24
) -> dict[str, Tensor]:
    """Inputs for a model without its processor: three rows, padded on the left.

    The first shows two pictures, the second one, the third none; the words are random tokens. A row
    of tiles has padding in its middle, and for towers that take a pixel mask a tile is in part
    padding.

    Args:
        model: the dense model, which is asked how many tokens an image has.
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


def _image_inputs(model: Any, pixels: Tensor, mask: Tensor) -> dict[str, Tensor]:
    ids = torch.zeros(1, 1, dtype=torch.long)
    sample = {"input_ids": ids, "attention_mask": ids, "pixel_values": pixels}
    inputs = _inputs_for(model, sample | {"pixel_attention_mask": mask})
    return {
        name: tensor.to(model.device) for name, tensor in inputs.items() if name.startswith("pixel")
    }


def _drawn_tiles(config: VLMoEConfig) -> tuple[Tensor, Tensor]:
    """Pictures of shapes: pixels (3, 3, 3, H, W) from -1 to 1 and mask (3, 3, H, W)."""
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
    """An ellipse and a rectangle on a ground; the colours of ground, ellipse and rectangle."""
    picture = Image.new("RGB", (width, height), colors[0])
    draw = ImageDraw.Draw(picture)
    draw.ellipse((1, 2, 2 * width // 3, height // 2), fill=colors[1])
    draw.rectangle((width // 3, height // 2, width - 2, height - 3), fill=colors[2])
    return picture

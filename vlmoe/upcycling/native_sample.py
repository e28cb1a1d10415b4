# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Images and texts on which a dense model and its native sparse version are compared.

Three rows, padded on the left: one with two images, one with one, one with text alone; where the
family has positions on three axes, the last row has a video, whose pixels are random. Images and
texts come from the source's own processor; without one, pixels and words are drawn at random.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from transformers import (
    BatchFeature,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches
from transformers.utils import logging

from ..data.native_chat import tokenizer_of
from ..hub.without_video import load_processor
from .sample import TEXTS, drawn_picture
from .target import Processor, Sample

logger = logging.get_logger(__name__)

Tensor = torch.Tensor
Pixels = dict[str, Tensor]
Layout = Callable[[PreTrainedConfig, torch.Generator], Pixels]
IMAGES = (2, 1, 0)
"""Of each row."""
M_ROPE = ("qwen3_vl", "qwen3_5")
"""Families with positions on three axes, which follow from the types of the tokens."""


def source_processor(source: str) -> Processor | None:
    """Load the processor of a dense model, or a tokenizer for a language model.

    Returns None, with a warning, where there is none, or where it needs a package that is not
    installed: pixels and words are then drawn.
    """
    try:
        processor = load_processor(source)
        if knows_words(tokenizer_of(processor)):
            return processor
        problem = f"The tokenizer of {source} knows no words, as if made without its files."
    except (ImportError, OSError, ValueError) as error:
        problem = f"The processor of {source} cannot be loaded ({error})."
    logger.warning(f"{problem} The two models are compared on random pixels and words instead.")
    return None


def knows_words(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether a tokenizer has a vocabulary.

    transformers makes one without for some families whose folder has no tokenizer.
    """
    ids = tokenizer(TEXTS[0])["input_ids"]
    return not set(ids) <= set(tokenizer.all_special_ids)


@torch.no_grad()
def processed_inputs(processor: Processor, model: PreTrainedModel) -> Sample:
    """Encode drawn pictures and fixed texts.

    Args:
        processor: of the dense model; a tokenizer for a language model.
        model: the dense model.
    """
    config, tokenizer = model.config, getattr(processor, "tokenizer", processor)
    image_token_id = getattr(config, "image_token_id", None)
    if image_token_id is None:
        return _padded(config, [tokenizer(text)["input_ids"] for text in TEXTS])
    wide = drawn_picture(640, 360, ("white", "gold", "teal"))
    high = drawn_picture(300, 420, ("navy", "crimson", "olive"))
    encoded = _encoded(processor, [[wide, high], [high]])
    real = encoded["attention_mask"].bool()
    ids = [row[mask].tolist() for row, mask in zip(encoded["input_ids"], real, strict=True)]
    per_token = {"token_type_ids", "mm_token_type_ids", "input_ids", "attention_mask"}
    sample = {name: value for name, value in encoded.items() if name not in per_token}
    ids.append(tokenizer(TEXTS[2])["input_ids"])
    video, spans = _video(model, torch.Generator().manual_seed(0))
    for span in spans:
        ids[-1] += span + ids[-1][:2]
    return _padded(config, ids) | sample | video


def _encoded(processor: ProcessorMixin, shown: Sequence[list[Image.Image]]) -> BatchFeature:
    """Encode rows of pictures and a text, as a chat where the template has a place for pictures."""
    padding = {"padding": True, "padding_side": "left", "return_tensors": "pt"}
    if processor.tokenizer.pad_token is None:  # masked anyway
        processor = copy.copy(processor)
        processor.tokenizer = copy.deepcopy(processor.tokenizer)
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    rows = list(zip(shown, TEXTS[: len(shown)], strict=True))
    chats = []
    for row, text in rows:
        content = [{"type": "image", "image": picture} for picture in row]
        chats.append([{"role": "user", "content": [*content, {"type": "text", "text": text}]}])
    if not _has_place_for(processor, chats):  # words between images, which M-RoPE would join
        texts = [" and ".join([processor.image_token] * len(row)) + text for row, text in rows]
        return processor(text=texts, images=list(shown), **padding)
    return processor.apply_chat_template(
        chats,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
        processor_kwargs=padding,
    )


def _has_place_for(processor: ProcessorMixin, chats: list[list[dict[str, Any]]]) -> bool:
    """Return whether the chat template writes an image token for each picture; warn if not."""
    if processor.chat_template is None:
        return False
    texts = processor.apply_chat_template(chats, tokenize=False)
    for text, [message] in zip(texts, chats, strict=True):
        if text.count(processor.image_token) < len(message["content"]) - 1:
            logger.warning(
                f"The chat template of {type(processor).__name__} writes no {processor.image_token}"
                " for a picture. The two models are compared on plain texts with pictures instead "
                "of chats."
            )
            return False
    return True


@torch.no_grad()
def drawn_inputs(
    model: PreTrainedModel, images: Sequence[int] = IMAGES, length: int = 24, frames: int = 2
) -> Sample:
    """Draw inputs for a model without its processor, rows padded on the left.

    Args:
        model: the dense model; `get_image_features` gives the number of tokens of an image.
        images: the number of images of each row.
        length: tokens of text of the longest row.
        frames: of a video in the last row, for families with positions on three axes.
    """
    config, generator = model.config, torch.Generator().manual_seed(0)
    image_token_id = getattr(config, "image_token_id", None)
    spans: list[list[list[int]]] = [[] for _ in images]  # of image tokens, row by row
    pixels: list[Pixels] = []
    if image_token_id is not None:
        layout = LAYOUTS[config.model_type]
        for row, count in enumerate(images):
            for _ in range(count):
                pixels.append(layout(config, generator))
                spans[row].append([image_token_id] * _tokens_of(model, pixels[-1]))
    sample = _merged(pixels, images, config.model_type)
    video, of_frames = _video(model, generator, frames)
    spans[-1] += of_frames
    return drawn_rows(config, spans, length, generator) | sample | video


def _video(
    model: PreTrainedModel, g: torch.Generator, frames: int = 2
) -> tuple[Pixels, list[list[int]]]:
    """Draw a video for families that take one as grids: its pixels, and the tokens of a frame."""
    config = model.config
    if config.model_type not in M_ROPE or not frames:
        return {}, []
    pixels = _grid(config, g, frames)
    span = [config.video_token_id] * (_tokens_of(model, pixels) // frames)
    names = {"pixel_values": "pixel_values_videos", "image_grid_thw": "video_grid_thw"}
    return {names[name]: tensor for name, tensor in pixels.items()}, [span] * frames


def drawn_rows(
    config: PreTrainedConfig,
    spans: Sequence[Sequence[list[int]]],
    length: int = 24,
    generator: torch.Generator | None = None,
) -> Pixels:
    """Put each row's spans of image tokens among random words; rows are padded on the left."""
    g = generator or torch.Generator().manual_seed(0)
    special = _special(config)
    words = [i for i in range(config.get_text_config().vocab_size) if i not in special]
    texts = []
    for row, of_row in enumerate(spans):
        count = max(length - 5 * row, 3 * len(of_row) + 3)
        text = [words[i] for i in torch.randint(len(words), (count,), generator=g).tolist()]
        for i, span in reversed(list(enumerate(of_row))):
            text[2 + 3 * i : 2 + 3 * i] = span
        texts.append(text)
    return _padded(config, texts)


def _padded(config: PreTrainedConfig, texts: Sequence[list[int]]) -> Pixels:
    """Pad rows of tokens on the left, by one that is no image token."""
    longest, special = max(map(len, texts)), _special(config)
    pad = next(i for i in range(len(special) + 1) if i not in special)
    ids = torch.tensor([[pad] * (longest - len(text)) + text for text in texts])
    mask = torch.tensor([[0] * (longest - len(text)) + [1] * len(text) for text in texts])
    rows = {"input_ids": ids, "attention_mask": mask}
    return rows | _types(config, ids)


def _special(config: PreTrainedConfig) -> set[int]:
    """Return the tokens that stand for images and videos, or mark them."""
    tokens = {
        value
        for name, value in config.to_dict().items()
        if name.endswith(("token_id", "token_index")) and isinstance(value, int)
    }
    return tokens | set(getattr(config, "visual_indicator_token_ids", ()))


def _types(config: PreTrainedConfig, ids: Tensor) -> Pixels:
    """Return the types of the tokens, for families whose positions or masks follow from them."""
    if config.model_type not in (*M_ROPE, "gemma4"):
        return {}
    types = (ids == config.image_token_id).long() + 2 * (ids == config.video_token_id).long()
    return {"mm_token_type_ids": types}


def _tokens_of(model: PreTrainedModel, pixels: Pixels) -> int:
    placed = {name: tensor.to(model.device) for name, tensor in pixels.items()}
    features = model.get_image_features(**placed, return_dict=True).pooler_output
    return sum(len(each.reshape(-1, each.shape[-1])) for each in features)


def _merged(pixels: Sequence[Pixels], images: Sequence[int], model_type: str) -> Pixels:
    """Join the images of all rows as the family takes them."""
    if not pixels:
        return {}
    joined = {name: torch.cat([each[name] for each in pixels]) for name in pixels[0]}
    if model_type not in ("idefics3", "smolvlm"):
        return joined
    padded: Pixels = {}  # (rows, images of a row, ...), padded
    for name, tensor in joined.items():
        flat = tensor[:, 0]
        padded[name] = flat.new_zeros(len(images), max(images), *flat.shape[1:])
        at = 0
        for row, count in enumerate(images):
            padded[name][row, :count] = flat[at : at + count]
            at += count
    return padded


def _size(config: PreTrainedConfig) -> tuple[int, int]:
    size = config.vision_config.image_size
    return (size, size) if isinstance(size, int) else tuple(size)


def _square(config: PreTrainedConfig, g: torch.Generator) -> Pixels:
    """Draw one tile of the tower's size."""
    return {"pixel_values": torch.randn(1, 3, *_size(config), generator=g)}


def _sized(config: PreTrainedConfig, g: torch.Generator) -> Pixels:
    """Draw an image of 2 x 2 merged patches, and give its size: the tower takes any."""
    side = 2 * config.spatial_merge_size * config.vision_config.patch_size
    pixels = torch.randn(1, 3, side, side, generator=g)
    return {"pixel_values": pixels, "image_sizes": torch.tensor([[side, side]])}


def _anyres(config: PreTrainedConfig, g: torch.Generator) -> Pixels:
    """Draw the tiles of a wide image, the whole image first."""
    height, width = _size(config)
    size = (height, 2 * width - 1)  # so that some of the last tile is padding
    tiles = image_size_to_num_patches(size, config.image_grid_pinpoints, height)
    pixels = torch.randn(1, tiles, 3, height, width, generator=g)
    return {"pixel_values": pixels, "image_sizes": torch.tensor([size])}


def _masked(config: PreTrainedConfig, g: torch.Generator) -> Pixels:
    """Draw one tile whose lower rows of patches are padding."""
    pixels = _square(config, g)["pixel_values"][None]
    mask, patch = torch.ones(1, 1, *_size(config)).long(), config.vision_config.patch_size
    pixels[..., -patch:, :], mask[..., -patch:, :] = 0, 0
    return {"pixel_values": pixels, "pixel_attention_mask": mask}


def _patches(config: PreTrainedConfig, g: torch.Generator) -> Pixels:
    """Draw flat patches of 4 x 4, and their number."""
    patches = torch.randn(1, 16, 3 * config.vision_config.patch_size**2, generator=g)
    mask = torch.ones(1, 16).long()
    return {
        "pixel_values": patches,
        "spatial_shapes": torch.tensor([[4, 4]]),
        "pixel_attention_mask": mask,
    }


def _placed_patches(config: PreTrainedConfig, g: torch.Generator) -> Pixels:
    """Draw flat patches, and the place of each; one side has two windows of pooling."""
    side = 2 * config.vision_config.pooling_kernel_size
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    patches = torch.rand(1, side**2, 3 * config.vision_config.patch_size**2, generator=g)
    places = torch.stack([x.flatten(), y.flatten()], dim=-1)[None]
    return {"pixel_values": patches, "image_position_ids": places}


def _grid(config: PreTrainedConfig, g: torch.Generator, frames: int = 1) -> Pixels:
    """Draw flat patches of a grid of 2 x 3 merged ones."""
    vision = config.vision_config
    height, width = 2 * vision.spatial_merge_size, 3 * vision.spatial_merge_size
    size = 3 * vision.temporal_patch_size * vision.patch_size**2
    patches = torch.randn(frames * height * width, size, generator=g)
    return {
        "pixel_values": patches,
        "image_grid_thw": torch.tensor([[frames, height, width]]),
    }


LAYOUTS: Mapping[str, Layout] = {
    **dict.fromkeys(("llava", "internvl", "aya_vision", "cohere2_vision", "ovis2"), _square),
    **dict.fromkeys(("llava_next", "llava_onevision"), _anyres),
    **dict.fromkeys(("idefics3", "smolvlm"), _masked),
    **dict.fromkeys(M_ROPE, _grid),
    "mistral3": _sized,
    "lfm2_vl": _patches,
    "gemma4": _placed_patches,
}
"""How a family takes an image."""

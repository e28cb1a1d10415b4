"""Model inputs made from strings.

A row is spelled with one character for each text token (".") or image (a letter; the same letter is
the same image): "..a." is two text tokens, image a and a text token. What a row holds depends on
its spelling only, so that the same row alone and in any batch has the same tokens and pixels.
"""

import zlib
from collections.abc import Callable, Sequence

import pytest
import torch

from vlmoe import VLMoEConfig

Inputs = dict[str, torch.Tensor]


def image_tokens_per_tile(config: VLMoEConfig) -> int:
    """Counted from the tower's sizes, independently of the model."""
    vision = config.vision_config
    has_class_token = not vision.model_type.startswith("siglip")
    patches = (vision.image_size // vision.patch_size) ** 2
    if has_class_token and config.vision_feature_select_strategy == "full":
        patches += 1
    return patches // config.pixel_shuffle_factor**2


def picture(config: VLMoEConfig, letter: str) -> torch.Tensor:
    """(3, height, width): the pixels that a letter stands for."""
    size = config.vision_config.image_size
    return torch.randn(3, size, size, generator=torch.Generator().manual_seed(ord(letter)))


def token_row(config: VLMoEConfig, row: str) -> torch.Tensor:
    """(length,): seeded text tokens, and placeholders for each image."""
    generator = torch.Generator().manual_seed(zlib.crc32(row.encode()))
    first_text_token, vocab = config.image_token_id + 1, config.text_config.vocab_size
    text = torch.randint(first_text_token, vocab, (len(row),), generator=generator)
    placeholders = torch.full((image_tokens_per_tile(config),), config.image_token_id)
    return torch.cat([text[i : i + 1] if row[i] == "." else placeholders for i in range(len(row))])


def image_inputs(config: VLMoEConfig, rows: Sequence[str], images: str) -> Inputs:
    """Pixels in one of the three forms that the model takes; empty where no row has an image."""
    shown = [[letter for letter in row if letter != "."] for row in rows]
    most = max(len(letters) for letters in shown)
    if most == 0:
        return {}
    if images == "flat":
        return {"pixel_values": torch.stack([picture(config, c) for row in shown for c in row])}
    if images == "indexed":
        unique = sorted({letter for row in shown for letter in row})
        index = [[unique.index(c) for c in row] + [-1] * (most - len(row)) for row in shown]
        pixels = torch.stack([picture(config, letter) for letter in unique])
        return {"pixel_values": pixels, "image_index": torch.tensor(index)}
    size = config.vision_config.image_size
    pixels = torch.zeros(len(rows), most, 3, size, size)
    mask = torch.zeros(len(rows), most, size, size, dtype=torch.long)
    for i, letters in enumerate(shown):
        for j, letter in enumerate(letters):
            pixels[i, j], mask[i, j] = picture(config, letter), 1
    return {"pixel_values": pixels, "pixel_attention_mask": mask}


@pytest.fixture(scope="session")
def tiny_batch() -> Callable[..., Inputs]:
    """`tiny_batch(config, ["..a.", "."], images="padded", padding="left")`: model inputs."""

    def make(
        config: VLMoEConfig, rows: Sequence[str], images: str = "padded", padding: str = "left"
    ) -> Inputs:
        tokens = [token_row(config, row) for row in rows]
        longest = max(len(row) for row in tokens)
        input_ids = torch.full((len(rows), longest), config.text_config.pad_token_id)
        attention_mask = torch.zeros_like(input_ids)
        for i, row in enumerate(tokens):
            where = slice(longest - len(row), None) if padding == "left" else slice(len(row))
            input_ids[i, where], attention_mask[i, where] = row, 1
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "mm_token_type_ids": (input_ids == config.image_token_id).long(),
        } | image_inputs(config, rows, images)

    return make

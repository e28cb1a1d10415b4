# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""The data of the benchmark of emoji names: which emoji, their drawings, and encoded batches.

All emoji, languages and names are in training; validation and test show drawings of their own.
Batches are encoded once for all arms of a seed, by the package's processor and collator.
"""

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from capacity_data import PIXEL_LEVELS, Batch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from vlmoe import VLMoEProcessor
from vlmoe.data.collator import VLMoECollator
from vlmoe.data.easy_vqa import conversation
from vlmoe.data.emoji import LANGUAGES, Emoji, draw, emoji_table, question
from vlmoe.data.openmoji import openmoji_picture
from vlmoe.data.tokenizer import CHAT_TOKENS, train_tokenizer

ASKED = ("en", "fr", "de", "zh")
PICTURES, FLAGS = 540, 60
"""Emoji that are no flags, and flags."""
LONGEST_NAME = 24
"""Characters; emoji with a longer name in one of the languages are left out."""
VOCABULARY = 1024
SPLITS = ("train", "validation", "test", "see")
"""Each draws from a stream of its own."""
NUMBER = "which number is it?"
"""The question that the vision tower learns from: a number that says nothing of the name."""


@cache
def chosen_emoji() -> tuple[Emoji, ...]:
    """Return the emoji of the benchmark, the same for all seeds, flags last."""
    short = [
        each
        for each in emoji_table()
        if all(len(each.names[language]) <= LONGEST_NAME for language in ASKED)
    ]
    rng, chosen = np.random.default_rng(0), []
    for is_flag, count in ((False, PICTURES), (True, FLAGS)):
        kind = [each for each in short if each.is_flag == is_flag]
        chosen += [kind[place] for place in sorted(rng.choice(len(kind), count, replace=False))]
    return tuple(chosen)


@cache
def names_tokenizer() -> PreTrainedTokenizerBase:
    """Return a tokenizer trained on the questions and the names."""
    texts = [each.names[language] for each in chosen_emoji() for language in ASKED]
    texts += [NUMBER, *(question(language) for language in ASKED)] * 10
    return train_tokenizer(texts, VOCABULARY, CHAT_TOKENS)


def name_row(number: int, rng: np.random.Generator, artist: str = "twemoji") -> dict[str, Any]:
    """Return a new drawing of the emoji of a number, with the questions for all its names."""
    emoji = chosen_emoji()[number]
    picture = openmoji_picture(emoji) if artist == "openmoji" else None
    return {
        "id": emoji.code,
        "images": [draw(emoji, rng, picture)],
        "messages": [conversation(question(code), emoji.names[code]) for code in ASKED],
        "question_type": [LANGUAGES[code] for code in ASKED],
    }


def number_row(number: int, rng: np.random.Generator) -> dict[str, Any]:
    """Return a new drawing of the emoji of a number, with the question for its number."""
    drawing = draw(chosen_emoji()[number], rng)
    return {"images": [drawing], "messages": conversation(NUMBER, f"{number:03d}")}


def question_rows(split: str, seed: int, artist: str = "twemoji") -> list[dict[str, Any]]:
    """Return a row per emoji, each on a drawing of the split and seed."""
    stream = SPLITS.index(split)
    return [
        name_row(number, np.random.default_rng([seed, stream, number]), artist)
        for number in range(len(chosen_emoji()))
    ]


def training_rows(make: Any, split: str, seed: int) -> Iterator[dict[str, Any]]:
    """Yield rows of all emoji in random order, epoch after epoch, each on a new drawing."""
    rng = np.random.default_rng([seed, SPLITS.index(split)])
    while True:
        for number in rng.permutation(len(chosen_emoji())):
            yield make(int(number), rng)


class NameBatches(Dataset):
    """Batches in a file, each one item, as the collator made them.

    Args:
        file: as `prepare` wrote it.
        start, stop: the batches to take; by default all.
        epochs: how often they come.
    """

    def __init__(self, file: Path, start: int = 0, stop: int | None = None, epochs: int = 1):
        self.batches: list[Batch] = torch.load(file, mmap=True)[start:stop] * epochs

    def __len__(self) -> int:
        """Return the number of batches."""
        return len(self.batches)

    def __getitem__(self, number: int) -> Batch:
        """Return a batch as the collator made it."""
        return unpacked(self.batches[number])


def packed(batch: Batch) -> Batch:
    """Return a collated batch in few bytes; its images are of full size, without a mask."""
    small = {name: batch[name].to(torch.int16) for name in batch if name != "pixel_values"}
    small.pop("pixel_attention_mask", None)
    levels = batch["pixel_values"] * PIXEL_LEVELS + PIXEL_LEVELS
    return small | {"pixels": levels.round().to(torch.uint8)}


def unpacked(small: Batch) -> Batch:
    """Return the batch that `packed` was given."""
    batch = {name: value.long() for name, value in small.items() if name != "pixels"}
    pixels = batch["pixel_values"] = small["pixels"].float() / PIXEL_LEVELS - 1
    if pixels.dim() == 5:
        batch["pixel_attention_mask"] = torch.ones_like(pixels[:, :, 0], dtype=torch.long)
    return batch


def prepare(
    file: Path, rows: Iterator[dict[str, Any]], steps: int, size: int, processor: VLMoEProcessor
) -> Path:
    """Encode `steps` batches of `size` rows into a file, unless it is there."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        collate = VLMoECollator(processor, image_cache_mb=0)
        bar = logging.tqdm(range(steps), desc=f"encoding {file.stem}", leave=False)
        batches = [packed(collate([next(rows) for _ in range(size)])) for _ in bar]
        torch.save(batches, staging := file.with_suffix(".part"))
        staging.rename(file)
    return file

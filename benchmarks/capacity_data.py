# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""The data of the capacity benchmark, encoded once for all arms of a seed.

Rows go through the package's processor and collator, as in every training. The batches are kept on
disk, so that all arms of a seed see the same ones, and none pays for drawing them again.
"""

import shutil
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers.utils import logging

from vlmoe import VLMoEConfig, VLMoEProcessor
from vlmoe.data.collator import VLMoECollator
from vlmoe.data.emblems import Emblems, emblem_tokenizer, perception_rows

Batch = dict[str, torch.Tensor]
BATCHES = "batches.pt"
PIXEL_LEVELS = 127.5
"""The image processor maps 0..255 to -1..1; the file holds bytes."""
SEE_ROWS = 64
"""Rows of a batch of the tower's training."""


class EncodedBatches(Dataset):
    """Batches in a file, each one item: `Trainer` takes them with a batch size of 1 and `single`.

    Args:
        folder: as `prepare_batches` filled it.
        start, stop: the batches to take; by default all.
    """

    def __init__(self, folder: Path, start: int = 0, stop: int | None = None):
        tensors = torch.load(folder / BATCHES, mmap=True)
        self.tensors: Batch = {name: value[start:stop] for name, value in tensors.items()}

    def __len__(self) -> int:
        """Return the number of batches."""
        return len(self.tensors["input_ids"])

    def __getitem__(self, number: int) -> Batch:
        """Return a batch as the collator made it."""
        return unpacked({name: value[number] for name, value in self.tensors.items()})


def single(items: list[Batch]) -> Batch:
    """Return the one batch of the list."""
    (batch,) = items
    return batch


def packed(batch: Batch) -> Batch:
    """Return a collated batch of rows of one length in few bytes."""
    small = {name: batch[name].to(torch.int16) for name in ("input_ids", "labels")}
    if "pixel_values" in batch:
        levels = batch["pixel_values"][:, 0] * PIXEL_LEVELS + PIXEL_LEVELS
        small["pixels"] = levels.round().to(torch.uint8)
    return small


def unpacked(small: Batch) -> Batch:
    """Return the batch that `packed` was given."""
    batch = {name: small[name].long() for name in ("input_ids", "labels")}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    if "pixels" in small:
        pixels = small["pixels"].float() / PIXEL_LEVELS - 1
        batch["pixel_values"] = pixels[:, None]
        batch["pixel_attention_mask"] = torch.ones_like(pixels[:, :1], dtype=torch.long)
    return batch


def encode(rows: Iterable[Any], size: int, processor: VLMoEProcessor) -> Iterator[Batch]:
    """Collate rows into packed batches of `size`; the last one may be smaller."""
    collate = VLMoECollator(processor, image_cache_mb=0)
    rows = iter(rows)
    while batch := list(islice(rows, size)):
        yield packed(collate(batch))


def prepare_batches(
    folder: Path, rows: Iterable[Any], size: int, processor: VLMoEProcessor, total: int
) -> Path:
    """Encode rows into `folder`, unless it is there.

    Args:
        folder: holds the batches in the end.
        rows: as many as fill `total` batches.
        size: rows of a batch.
        processor: of the model.
        total: batches, for the progress bar.
    """
    if not folder.exists():
        staging = folder.with_name(f".{folder.name}")
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        bar = logging.tqdm(
            encode(rows, size, processor), total=total, desc=f"encoding {folder.name}", leave=False
        )
        batches = list(bar)
        stacked = {name: torch.stack([each[name] for each in batches]) for name in batches[0]}
        torch.save(stacked, staging / BATCHES)
        staging.rename(folder)
    return folder


def prepare(
    task: Emblems, steps: int, size: int, shown: str, processor: VLMoEProcessor, folder: Path
) -> Path:
    """Prepare the training batches of a seed and of one way to show the entity.

    Args:
        task: entities and facts.
        steps: batches.
        size: rows of a batch.
        shown: as for `Emblems.training_rows`.
        processor: of the model.
        folder: of the seed.
    """
    epochs = -(-steps * size // task.entities)
    rows = islice(task.training_rows(epochs, shown), steps * size)
    return prepare_batches(folder / f"train-{shown}", rows, size, processor, steps)


def prepare_questions(task: Emblems, shown: str, processor: VLMoEProcessor, folder: Path) -> Path:
    """Prepare the questions of every split; a folder of one batch for each."""
    for split in ("train", "validation", "test"):
        rows, count = task.fact_rows(split, shown), task.values.size
        prepare_batches(folder / f"facts-{split}-{shown}", rows, count, processor, 1)
    if shown == "image":
        rows, count = task.cell_rows("test"), task.symbols.size
        prepare_batches(folder / "cells-test", rows, count, processor, 1)
    return folder


def prepare_perception(steps: int, processor: VLMoEProcessor, folder: Path) -> Path:
    """Prepare the batches that the vision tower learns from."""
    rows = perception_rows(steps * SEE_ROWS)
    return prepare_batches(folder, rows, SEE_ROWS, processor, steps)


def emblem_processor(config: VLMoEConfig) -> VLMoEProcessor:
    """Return the processor of the task for a model's config."""
    return VLMoEProcessor.for_config(config, emblem_tokenizer())

# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Calibration rows as a model sees them, and the tokens that reach its banks of experts.

Shapes: T tokens of all batches without padding, H hidden size, k experts per token.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..data.answers import evaluation_mode
from ..data.collator import IGNORE_INDEX, VLMoECollator
from ..data.native_collator import NativeCollator
from ..data.row_fields import Rows
from ..data.rows import ConversationRows
from ..hub.saved_model import Processor, is_own_processor
from ..processing.processing_vlmoe import VLMoEProcessor
from ..routing.kinds import KINDS, PADDING, token_kinds
from ..routing.record import find_backbone
from ..routing.routed_layers import RoutedLayer

if TYPE_CHECKING:
    import datasets

Tensor = torch.Tensor
Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Calibration:
    """Collated batches, with labels on the tokens of answers.

    Attributes:
        batches: as the collator made them, on the CPU.
        rows: how many conversations they hold.
        tokens: how many tokens of each kind (text, image, video).
        answer_tokens: how many tokens have a label.
    """

    batches: tuple[Batch, ...]
    rows: int
    tokens: dict[str, int]
    answer_tokens: int


@dataclass(frozen=True)
class BankTokens:
    """What one bank of experts is called with, for all tokens of the calibration.

    Attributes:
        hidden: (T, H).
        chosen, weights: (T, k).
        kinds: (T,), numbers of `KINDS`.
    """

    hidden: Tensor
    chosen: Tensor
    weights: Tensor
    kinds: Tensor


def calibrate(
    model: PreTrainedModel,
    processor: Processor,
    rows: "Rows | datasets.Dataset",
    *,
    batch_size: int = 32,
    text_only: bool = False,
    allow_image_urls: bool = False,
) -> Calibration:
    """Collate calibration rows.

    Args:
        model: that will be compressed.
        processor: the model's; of a language model its tokenizer.
        rows: as for training.
        batch_size: conversations of a batch.
        text_only: the rows are meant to hold no images.
        allow_image_urls: download images that rows name by http(s) URL.

    Raises:
        ValueError: there are no rows, one is malformed, or none holds an image although the model
            takes images.
    """
    conversations = ConversationRows(rows)
    if len(conversations) == 0:
        raise ValueError("empty dataset: there are no rows to calibrate with.")
    make = VLMoECollator if is_own_processor(processor) else NativeCollator
    collate = make(cast(VLMoEProcessor, processor), allow_image_urls=allow_image_urls)
    starts = range(0, len(conversations), batch_size)
    batches = tuple(
        dict(collate([conversations[i] for i in range(s, min(s + batch_size, len(conversations)))]))
        for s in logging.tqdm(starts, desc="encoding", unit="batch", leave=False)
    )
    count = dict.fromkeys(KINDS, 0)
    for batch in batches:
        kinds = token_kinds(batch, model.config)
        for number, name in enumerate(KINDS):
            count[name] += int((kinds == number).sum())
    has_tower = hasattr(model.config, "vision_config")
    if has_tower and not text_only and not count["image"] + count["video"]:
        raise ValueError(
            "None of the calibration rows holds an image, and the model has a vision tower: "
            "experts that serve images would look useless. Give rows with images, or ask for it "
            "(text_only=True, --text_only)."
        )
    answers = sum(int(answer_positions(batch).sum()) for batch in batches)
    return Calibration(batches, len(conversations), count, answers)


def answer_positions(batch: Batch) -> Tensor:
    """(B, L) bool: the tokens whose output predicts a token of an answer."""
    positions = torch.zeros_like(batch["labels"], dtype=torch.bool)
    positions[:, :-1] = batch["labels"][:, 1:] != IGNORE_INDEX
    return positions


def model_inputs(model: PreTrainedModel, batch: Batch) -> dict[str, Tensor]:
    """Return a batch without labels, on the model's device."""
    return {name: tensor.to(model.device) for name, tensor in batch.items() if name != "labels"}


@torch.no_grad()
def bank_tokens(model: PreTrainedModel, layer: RoutedLayer, batches: Sequence[Batch]) -> BankTokens:
    """Run the model up to one bank over all batches; padding is left out."""
    taken: list[tuple[Tensor, Tensor, Tensor]] = []
    kinds: list[Tensor] = []

    def take(bank: nn.Module, args: tuple[Tensor, ...]) -> None:
        taken.append((args[0], args[1], args[2]))
        raise _ReachedError

    handle = layer.experts.register_forward_pre_hook(take)
    try:
        with evaluation_mode(model):
            for batch in batches:
                inputs = model_inputs(model, batch)
                kinds.append(token_kinds(inputs, find_backbone(model).config).flatten())
                try:
                    model(**inputs, use_cache=False)
                except _ReachedError:
                    pass
    finally:
        handle.remove()
    real = [kind != PADDING for kind in kinds]
    hidden, chosen, weights = (
        torch.cat([each[number][mask] for each, mask in zip(taken, real, strict=True)])
        for number in range(3)
    )
    shown = torch.cat([kind[mask] for kind, mask in zip(kinds, real, strict=True)])
    return BankTokens(hidden, chosen, weights, shown)


class _ReachedError(Exception):
    """The bank was reached: what follows it is not needed."""

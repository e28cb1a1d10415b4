# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Rows to batches for a model of transformers, by its own processor: `native_chat.py`.

Rows and labels are those of `collator.py`: the loss is on the assistant's turns alone. Padding,
grids, token types and tiles are the processor's. Images are processed anew in every batch.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal

import torch
from transformers import BatchFeature

from ..hub.saved_model import Processor, is_own_processor
from ..processing.image_sources import DEFAULT_LIMITS, ImageLimits
from .collator import IGNORE_INDEX, PromptBatch, VLMoEPromptCollator
from .conversations import Conversation, ParsedRow, parse_row, split_reference
from .images import open_image
from .native_chat import Chat, NativeChatEncoder
from .row_fields import AnyRow
from .row_weights import RowWeights
from .shortening import shortened
from .videos import require_whole_frames, video_reader, with_frames

Encode = Callable[[Sequence[Chat]], tuple[BatchFeature, torch.Tensor]]


class NativeRowCollator:
    """The base of the two collators.

    Args:
        processor: of the model; a tokenizer for a text-only model.
        max_length: the longest row in tokens, None for any; a longer one is an error.
        shorten_prompts: cut text from the oldest questions of a conversation that is too long, or
            with "longest" the end of its longest one, see `shortening.py`.
        limits: on the size of images.
        allow_image_urls: download images that rows name by http(s) URL.

    Raises:
        ValueError: `max_length` is below 1; as `NativeChatEncoder`.
    """

    def __init__(
        self,
        processor: Processor,
        max_length: int | None = None,
        *,
        shorten_prompts: bool | Literal["longest"] = False,
        limits: ImageLimits = DEFAULT_LIMITS,
        allow_image_urls: bool = False,
    ) -> None:
        if max_length is not None and max_length < 1:
            raise ValueError(f"max_length must be at least 1 or None, got {max_length}.")
        self.processor, self.max_length = processor, max_length
        self.shorten_prompts = shorten_prompts
        self.limits, self.allow_image_urls = limits, allow_image_urls
        self.encode = NativeChatEncoder(processor)

    def parsed(self, row: AnyRow, position: int) -> ParsedRow:
        """Take a row apart, with frames in the place of its videos."""
        parsed = parse_row(row, position)
        if not parsed.videos:
            return parsed
        require_whole_frames(self.processor, parsed.name)
        reader = video_reader(self.processor, self.limits, self.allow_image_urls)
        return with_frames(parsed, reader)

    def _chats(self, parsed: ParsedRow) -> Iterator[Chat]:
        """Open the images of a row, and yield its conversations."""
        if parsed.images and self.encode.tokenizer is self.processor:
            raise ValueError(f"{parsed.name} has images, but the model reads text alone.")
        images = [
            open_image(
                image,
                f"{parsed.name}, image {i}",
                limits=self.limits,
                allow_urls=self.allow_image_urls,
            )
            for i, image in enumerate(parsed.images)
        ]
        yield from (Chat(each, images, parsed.name) for each in parsed.conversations)

    def _fitting(
        self, chats: list[Chat], *, side: str, generation_prompt: bool = False
    ) -> tuple[BatchFeature, torch.Tensor]:
        """Encode chats; where that is asked for, shorten those that are too long.

        Raises:
            ValueError: naming the first row that stays too long.
        """
        encode = partial(self.encode, side=side, generation_prompt=generation_prompt)
        encoded = encode(chats)
        limit, lengths = self.max_length, _lengths(encoded[0])
        if limit is None or max(lengths) <= limit:
            return encoded
        if self.shorten_prompts:
            chats = [
                chat if length <= limit else self._shortened(chat, limit, encode)
                for chat, length in zip(chats, lengths, strict=True)
            ]
            encoded = encode(chats)
        for chat, length in zip(chats, _lengths(encoded[0]), strict=True):
            if length > limit:
                raise ValueError(
                    f"{chat.name} has {length} tokens, more than max_length={limit}. Raise "
                    "max_length (up to the model's positions), shorten the row or leave it out."
                )
        return encoded

    def _shortened(self, chat: Chat, limit: int, encode: Encode) -> Chat:
        """Cut text of a chat, until its images and all have `limit` tokens, or no text is left."""

        def length(conversation: Conversation) -> int:
            return _lengths(encode([replace(chat, conversation=conversation)])[0])[0]

        longest = self.shorten_prompts == "longest"
        return replace(chat, conversation=shortened(chat.conversation, limit, length, longest))


def _lengths(inputs: BatchFeature) -> list[int]:
    """Count the tokens of each row of a batch, those of its images included."""
    return inputs["attention_mask"].sum(-1).tolist()


class NativeCollator(NativeRowCollator):
    """Rows -> training batch: the processor's inputs, padded on the right, and `labels`.

    Of rows with weights also `loss_weights` and `task_ids`, see `row_weights.py`. Arguments as in
    `NativeRowCollator`.
    """

    row_weights = RowWeights()

    def __call__(self, rows: Sequence[AnyRow]) -> dict[str, torch.Tensor]:
        """Collate rows; raises `ValueError` naming the row that is malformed or too long."""
        pairs = self._with_rows(rows)
        chats = [chat for _, chat in pairs]
        inputs, is_learned = self._fitting(chats, side="right")
        for chat, learns in zip(chats, is_learned.any(-1).tolist(), strict=True):
            if not learns:
                raise ValueError(f"{chat.name}: no token to learn; it needs an assistant turn.")
        labels = inputs["input_ids"].masked_fill(~is_learned, IGNORE_INDEX)
        sources = [(row, chat.name) for row, chat in pairs]
        return {**inputs, "labels": labels, **self.row_weights.of_batch(sources)}

    def answer_lengths(self, row: AnyRow, position: int) -> list[int]:
        """Count the label tokens of each conversation of a row."""
        chats = [chat for _, chat in self._with_rows([row])]
        return self.encode(chats, side="right")[1].sum(-1).tolist()

    def lengths(self, rows: Sequence[AnyRow]) -> list[int]:
        """Count the tokens of each conversation, those of its images included."""
        chats = [chat for _, chat in self._with_rows(rows)]
        return _lengths(self.encode(chats, side="right")[0])

    def _with_rows(self, rows: Sequence[AnyRow]) -> list[tuple[AnyRow, Chat]]:
        """Return the conversations of rows, each with its row."""
        parsed = [self.parsed(row, position) for position, row in enumerate(rows)]
        its = zip(rows, map(self._chats, parsed), strict=True)
        return [(row, chat) for row, chats in its for chat in chats]


def prompt_collator(
    processor: Processor,
    max_length: int | None = None,
    *,
    limits: ImageLimits = DEFAULT_LIMITS,
    allow_image_urls: bool = False,
    shorten_prompts: bool | Literal["longest"] = False,
) -> "VLMoEPromptCollator | NativePromptCollator":
    """Return the collator of prompts for a processor; a `VLMoEProcessor` has limits of its own."""
    if is_own_processor(processor):
        return VLMoEPromptCollator(
            processor,
            max_length,
            shorten_prompts=shorten_prompts,
            allow_image_urls=allow_image_urls,
        )
    return NativePromptCollator(
        processor,
        max_length,
        shorten_prompts=shorten_prompts,
        limits=limits,
        allow_image_urls=allow_image_urls,
    )


class NativePromptCollator(NativeRowCollator):
    """Rows -> `PromptBatch`: without the last assistant turn, padded on the left.

    Arguments as in `NativeRowCollator`.
    """

    def __call__(self, rows: Sequence[AnyRow]) -> PromptBatch:
        """Collate rows; raises `ValueError` naming the row that is malformed or too long."""
        chats: list[Chat] = []
        references: list[str] = []
        types: list[str] = []
        for position, row in enumerate(rows):
            parsed = self.parsed(row, position)
            types += parsed.question_types
            for chat in self._chats(parsed):
                prompt, reference = split_reference(chat.conversation, chat.name)
                chats.append(Chat(prompt, chat.images, chat.name))
                references.append(reference)
        inputs, _ = self._fitting(chats, side="left", generation_prompt=True)
        return PromptBatch(dict(inputs), references, types, [chat.name for chat in chats])

# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Dataset rows to batches: for training, as prompts for generation, as preference pairs.

- `row_formats.py` lists the forms of a row. A row with several conversations about the same images
  becomes one token row per conversation.
- Training: right padding; loss on every assistant turn (its content and `<|end|>`), nowhere else.
- Prompts: the last assistant turn becomes the reference; left padding.
- Preference pairs, for TRL's DPOTrainer: the assistant's turns after the prompt are compared.
- An image that several token rows use is encoded once: `pixel_values` is then flat,
  `(distinct tiles, 3, H, W)`, and `image_index` `(batch, max tiles)` holds the tiles of each row,
  in order, and -1 after them. Otherwise `pixel_values` is `(batch, max tiles, 3, H, W)` with
  `pixel_attention_mask` `(batch, max tiles, H, W)`: without shared images, with
  `share_images=False`, and if an image processor pads inside a tile, since the flat layout has no
  mask.

`transformers.TrainingArguments` needs `remove_unused_columns=False`: Trainer would otherwise remove
`messages` and `images`, which are no arguments of the model. The flat layout is not batch first: it
must not be cut by rows afterwards (`dispatch_batches`, `torch.nn.DataParallel`); use
`share_images=False` there. Each data loader worker has caches of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from ..processing.image_layout import TiledImage, batch_tiles
from ..processing.processing_vlmoe import VLMoEProcessor
from ..processing.video_frames import Frame
from .conversations import Conversation, ParsedRow, parse_row, split_reference
from .encoding import ConversationEncoder, EncodedConversation, EncodedImage, ImageEncoder
from .row_fields import REMOVED, AnyRow, RowImage
from .row_weights import RowWeights
from .shortening import shortened
from .videos import video_reader, with_frames

IGNORE_INDEX = -100
MEGABYTE = 1024 * 1024


@dataclass(frozen=True)
class PromptBatch:
    """Prompts for `model.generate(**inputs)`, with reference answers.

    `references`, `question_types` and `names` have one entry per prompt, in the order of the rows
    and of the conversations in each; a question type is "" if the row has none.
    """

    inputs: dict[str, torch.Tensor]
    references: list[str]
    question_types: list[str]
    names: list[str]


@dataclass(frozen=True)
class TokenRow:
    """One conversation: its token ids and assistant mask in pieces, `length` in all, and images."""

    ids: Sequence[np.ndarray]
    mask: Sequence[np.ndarray]
    length: int
    images: list[EncodedImage]


class RowCollator:
    """The base of the collators.

    Args:
        processor: its chat template must have `{% generation %}` blocks.
        max_length: longest token row allowed, None for any; a longer one is an error that names the
            row, since cutting it would cut an answer or a question. `long_rows.length_limit`
            returns that of a model.
        shorten_prompts: cut text from the oldest questions of a conversation that is too long, or
            with "longest" the end of its longest one, see `shortening.py`.
        share_images: encode an image that several token rows use once (module docstring).
        pad_to_multiple_of: round the padded length up, for kernels that like round numbers.
        image_cache_mb: bound in MiB on the processed tiles that are kept; 0 for none.
        text_cache_mb: the same for rendered and tokenized conversations.
        allow_image_urls: download images that rows name by http(s) URL. Rows may come from anyone:
            by default such a row is an error and no request is made.

    Raises:
        ValueError: the chat template has no generation blocks, the tokenizer no token to pad with,
            or a length is below 1.
    """

    what = "conversation"
    generation_prompt = False

    def __init__(
        self,
        processor: VLMoEProcessor,
        max_length: int | None = None,
        *,
        shorten_prompts: bool | Literal["longest"] = False,
        share_images: bool = True,
        pad_to_multiple_of: int | None = None,
        image_cache_mb: int = 1024,
        text_cache_mb: int = 64,
        allow_image_urls: bool = False,
    ) -> None:
        for field, value in (
            ("max_length", max_length),
            ("pad_to_multiple_of", pad_to_multiple_of),
        ):
            if value is not None and value < 1:
                raise ValueError(f"{field} must be at least 1 or None, got {value}.")
        self.processor = processor
        self.max_length = max_length
        self.shorten_prompts = shorten_prompts
        self.share_images = share_images
        self.pad_to_multiple_of = pad_to_multiple_of
        self.pad_token_id = _padding_id(processor.tokenizer)
        self.encode_conversation = ConversationEncoder(processor, text_cache_mb * MEGABYTE)
        self.encode_image = ImageEncoder(processor, image_cache_mb * MEGABYTE, allow_image_urls)

    def shortened(self, conversation: Conversation, room: int) -> Conversation:
        """Shorten a conversation to `room` tokens, as `shorten_prompts` says."""
        longest = self.shorten_prompts == "longest"
        return shortened(conversation, room, self.text_length, longest)

    def text_length(self, conversation: Conversation) -> int:
        """Count the tokens of a conversation, those of its images left out."""
        return sum(map(len, self._encoded(conversation, "a row").segments))

    def _encoded(self, conversation: Conversation, name: str) -> EncodedConversation:
        opens_answer = self.generation_prompt
        return self.encode_conversation(conversation, name, generation_prompt=opens_answer)

    def _fitting_row(
        self, conversation: Conversation, images: list[EncodedImage], name: str
    ) -> TokenRow:
        """Encode a conversation, shortened where that is asked for."""
        if self.shorten_prompts and self.max_length is not None:
            room = self.max_length - sum(len(image.token_ids) for image in images)
            conversation = self.shortened(conversation, room)
        return self._token_row(self._encoded(conversation, name), images, name)

    def parsed(self, row: AnyRow, position: int) -> ParsedRow:
        """Take a row apart, with frames in the place of its videos."""
        parsed = parse_row(row, position)
        if not parsed.videos:
            return parsed
        allow_urls = self.encode_image.allow_urls
        return with_frames(
            parsed, video_reader(self.processor, self.processor.image_limits, allow_urls)
        )

    def _images(self, images: Sequence[RowImage | Frame], name: str) -> list[EncodedImage]:
        """Encode the images of a row."""
        return [self.encode_image(image, f"{name}, image {i}") for i, image in enumerate(images)]

    def _token_row(
        self, encoded: EncodedConversation, images: list[EncodedImage], name: str
    ) -> TokenRow:
        """Fill the gaps of a conversation with the tokens of its images."""
        ids, mask = encoded.segments[:1], encoded.masks[:1]
        if images:
            between = zip(images, encoded.segments[1:], encoded.masks[1:], strict=True)
            for image, segment, segment_mask in between:
                ids += (image.token_ids, segment)
                mask += (image.token_mask, segment_mask)
        row = TokenRow(ids, mask, sum(map(len, ids)), images)
        if self.max_length is not None and row.length > self.max_length:
            raise ValueError(
                f"{name}: the {self.what} has {row.length} tokens, more than "
                f"max_length={self.max_length}. Raise max_length (up to the model's positions), "
                "shorten the row or leave it out."
            )
        return row

    def _pad(self, rows: list[TokenRow], side: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Pad to text inputs (batch, length) and the assistant mask (batch, length)."""
        if not rows:
            raise ValueError("the batch has no rows.")
        lengths = np.array([row.length for row in rows])
        width = int(lengths.max())
        if self.pad_to_multiple_of is not None:
            width = -(-width // self.pad_to_multiple_of) * self.pad_to_multiple_of
        columns, widths = np.arange(width)[None, :], lengths[:, None]
        valid = columns < widths if side == "right" else columns >= width - widths
        token_ids = np.full(valid.shape, self.pad_token_id, dtype=np.int64)
        token_ids[valid] = np.concatenate([piece for row in rows for piece in row.ids])
        mask = np.zeros(valid.shape, dtype=bool)
        mask[valid] = np.concatenate([piece for row in rows for piece in row.mask])
        input_ids = torch.from_numpy(token_ids)
        batch = {
            "input_ids": input_ids,
            "attention_mask": torch.from_numpy(valid.astype(np.int64)),
            "mm_token_type_ids": (input_ids == self.encode_conversation.image_token_id).long(),
        }
        return batch, torch.from_numpy(mask)

    def _pixels(self, rows: list[TokenRow]) -> dict[str, torch.Tensor]:
        """Lay out the images of the batch in one of the two ways; nothing without images."""
        uses = [image for row in rows for image in row.images]
        distinct = {image.key: image for image in uses}
        if not distinct:
            return {}
        is_shared = len(distinct) < len(uses)
        if self.share_images and is_shared and all(image.is_full for image in distinct.values()):
            return _shared_layout(rows, distinct)
        tiles = [
            [TiledImage(image.tiles, image.tile_mask, 0, 0) for image in row.images] for row in rows
        ]
        pixels = batch_tiles(tiles)
        return pixels | {"pixel_attention_mask": pixels["pixel_attention_mask"].long()}


class VLMoECollator(RowCollator):
    """Rows -> training batch: `input_ids`, `attention_mask`, `mm_token_type_ids`, `labels`, images.

    Of rows with weights also `loss_weights` and `task_ids`, see `row_weights.py`. Arguments as in
    `RowCollator`.
    """

    row_weights = RowWeights()

    def __call__(self, rows: Sequence[AnyRow]) -> dict[str, torch.Tensor]:
        """Collate rows; raises `ValueError` naming the row that is malformed or too long."""
        token_rows, sources = [], []
        for position, row in enumerate(rows):
            parsed = self.parsed(row, position)
            images = self._images(parsed.images, parsed.name)
            for conversation in parsed.conversations:
                token_rows.append(self._fitting_row(conversation, images, parsed.name))
                sources.append((row, parsed.name))
        batch, mask = self._pad(token_rows, side="right")
        labels = batch["input_ids"].masked_fill(~mask, IGNORE_INDEX)
        weights = self.row_weights.of_batch(sources)
        return {**batch, "labels": labels, **weights, **self._pixels(token_rows)}

    def answer_lengths(self, row: AnyRow, position: int) -> list[int]:
        """Count the label tokens of each conversation of a row."""
        parsed = self.parsed(row, position)
        encoded = [self.encode_conversation(each, parsed.name) for each in parsed.conversations]
        return [sum(int(mask.sum()) for mask in each.masks) for each in encoded]


class VLMoEPromptCollator(RowCollator):
    """Rows -> `PromptBatch`: without the last assistant turn, left padding.

    Arguments as in `RowCollator`.
    """

    what = "prompt"
    generation_prompt = True

    def __call__(self, rows: Sequence[AnyRow]) -> PromptBatch:
        """Collate rows; raises `ValueError` naming the row that is malformed or too long."""
        token_rows, references, types, names = [], [], [], []
        for position, row in enumerate(rows):
            parsed = self.parsed(row, position)
            images = self._images(parsed.images, parsed.name)
            for conversation in parsed.conversations:
                prompt, reference = split_reference(conversation, parsed.name)
                token_rows.append(self._fitting_row(prompt, images, parsed.name))
                references.append(reference)
                names.append(parsed.name)
            types += parsed.question_types
        batch, _ = self._pad(token_rows, side="left")
        return PromptBatch({**batch, **self._pixels(token_rows)}, references, types, names)


class VLMoEPreferenceCollator(VLMoECollator):
    """Rows -> `input_ids`, `attention_mask`, `mm_token_type_ids`, `completion_mask`, images.

    A row is `{"prompt": [...], "chosen": [...], "rejected": [...], "images": [...]}`: messages in
    the form of `conversations.py`. The image parts are in the prompt; `images` may be empty.

    The token rows are first those of prompt + chosen, then those of prompt + rejected, in the order
    of the dataset rows. `completion_mask` (2 * batch, length) is 1 on the tokens that the assistant
    generates after the prompt: its content and `<|end|>`. An image is encoded once for both. A row
    without any token of an answer is an error.

    Arguments as in `RowCollator`.
    """

    def __call__(self, rows: Sequence[AnyRow]) -> dict[str, torch.Tensor]:
        """Collate rows; raises `ValueError` naming the row that is malformed or too long."""
        token_rows, starts, names = [], [], []
        for side in ("chosen", "rejected"):
            for position, row in enumerate(rows):
                token_row, start, name = self._encode(row, position, side)
                token_rows.append(token_row)
                starts.append(start)
                names.append(f"{name}, {side}")
        batch, mask = self._pad(token_rows, side="right")
        completion = mask & (torch.arange(mask.shape[1]) >= torch.tensor(starts)[:, None])
        for name, learns in zip(names, completion.any(-1).tolist(), strict=True):
            if not learns:
                raise ValueError(
                    f"{name}: no token of the answer to compare; it must have an assistant turn."
                )
        return {**batch, "completion_mask": completion.long(), **self._pixels(token_rows)}

    def _encode(self, row: AnyRow, position: int, side: str) -> tuple[TokenRow, int, str]:
        """Encode one side of a pair; return it, where its answer starts, and the row's name."""
        prompt, answer = row.get("prompt"), row.get(side)
        if not (isinstance(prompt, list) and prompt and isinstance(answer, list) and answer):
            raise ValueError(
                f"row {position} of the batch: `prompt`, `chosen` and `rejected` must be lists of "
                f"messages, got the columns {sorted(row)}, `prompt` {prompt!r:.60} and `{side}` "
                f"{answer!r:.60}. {REMOVED}"
            )
        parsed = self.parsed({**row, "messages": [*prompt, *answer]}, position)
        images = self._images(parsed.images, parsed.name)
        (conversation,) = parsed.conversations
        whole = self.encode_conversation(conversation, parsed.name)
        opening = self.encode_conversation(conversation[: len(prompt)], parsed.name)
        start = sum(map(len, opening.segments))
        start += sum(len(image.token_ids) for image in images[: len(opening.segments) - 1])
        return self._token_row(whole, images, parsed.name), start, parsed.name


def _padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the token that fills short rows; attention and labels leave it out."""
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return int(token_id)
    raise ValueError(
        "the tokenizer has neither a pad token nor an end token to fill short rows with; set "
        "tokenizer.pad_token."
    )


def _shared_layout(
    rows: list[TokenRow], distinct: dict[bytes, EncodedImage]
) -> dict[str, torch.Tensor]:
    """Return every distinct image once, and for each row the indices of its tiles."""
    tile_indices: dict[bytes, range] = {}
    start = 0
    for key, image in distinct.items():
        tile_indices[key] = range(start, start + len(image.tiles))
        start += len(image.tiles)
    per_row = [[i for image in row.images for i in tile_indices[image.key]] for row in rows]
    width = max(map(len, per_row))
    index = torch.tensor([indices + [-1] * (width - len(indices)) for indices in per_row])
    return {
        "pixel_values": torch.cat([image.tiles for image in distinct.values()]),
        "image_index": index,
    }

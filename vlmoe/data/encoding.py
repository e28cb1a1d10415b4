# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Cached encoding of conversations to token ids and of images to tiles.

A trainer meets the same conversations and images in every epoch. `ConversationEncoder` renders and
tokenizes each distinct conversation once, leaving a gap for each image. `ImageEncoder` runs the
processor once per distinct image and returns its tiles and the token ids that fill the gap. Each
keeps the most recently used results within a bound of bytes. Together they equal the processor's
output for the whole conversation. They read the processor's settings when a conversation or image
is first met: change settings before the first batch, not between batches.
"""

import hashlib
import re
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedTokenizerBase

from ..hub.input_errors import reading
from ..processing.control_text import chat_markers, guarded_tokenizer
from ..processing.image_checks import decode
from ..processing.image_sources import encoded_image
from ..processing.processing_vlmoe import VLMoEProcessor
from ..processing.video_frames import Frame
from .conversations import Conversation, count_images
from .images import open_image
from .row_fields import RowImage

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")

GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")
ENTRY_BYTES = 500
"""Allowance for the Python objects of a cached entry."""


@dataclass(frozen=True)
class EncodedConversation:
    """Token ids around the images of a conversation: one more segment than it has images.

    `segments[i]` and `masks[i]` have the shape (tokens of the segment,); a mask is True on the
    tokens that an assistant turn generates.
    """

    segments: tuple[np.ndarray, ...]
    masks: tuple[np.ndarray, ...]


@dataclass(frozen=True)
class EncodedImage:
    """An image as the model takes it; equal keys mean equal images.

    `token_ids` (tokens,) replace the image in the text; `token_mask` (tokens,) is False, since none
    of them is the assistant's. `tiles` (tiles, 3, H, W) are its pixels; `tile_mask` (tiles, H, W)
    is True on real ones. `is_full`: all of them are real.
    """

    key: bytes
    token_ids: np.ndarray
    token_mask: np.ndarray
    tiles: torch.Tensor
    tile_mask: torch.Tensor
    is_full: bool


class ByteBoundedCache(Generic[Key, Value]):
    """Keep the most recently used values whose sizes together stay within `max_bytes`.

    A value larger than the bound is not kept; `max_bytes=0` keeps nothing. A pickled copy (a data
    loader's worker process) starts empty. A negative bound raises `ValueError`.
    """

    def __init__(self, max_bytes: int) -> None:
        if max_bytes < 0:
            raise ValueError(f"max_bytes must be 0 or more, got {max_bytes}.")
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._entries: OrderedDict[Key, tuple[Value, int]] = OrderedDict()

    def __len__(self) -> int:
        """Return the number of values held."""
        return len(self._entries)

    def __reduce__(self) -> tuple[type, tuple[int]]:
        """Pickle the bound only: each process fills its own cache."""
        return type(self), (self.max_bytes,)

    def get(self, key: Key) -> Value | None:
        """Return the value of `key`, now the most recently used, or None."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        self._entries.move_to_end(key)
        return entry[0]

    def put(self, key: Key, value: Value, num_bytes: int) -> None:
        """Keep `value` of size `num_bytes`; drop the least recently used ones as needed."""
        previous = self._entries.pop(key, None)
        if previous is not None:
            self.num_bytes -= previous[1]
        if num_bytes > self.max_bytes:
            return
        self._entries[key] = (value, num_bytes)
        self.num_bytes += num_bytes
        while self.num_bytes > self.max_bytes:
            _, (_, dropped) = self._entries.popitem(last=False)
            self.num_bytes -= dropped


class ConversationEncoder:
    """Conversation -> token ids and assistant mask, by the processor's chat template.

    Raises:
        ValueError: the chat template does not mark the tokens that the assistant generates.
    """

    def __init__(self, processor: VLMoEProcessor, cache_bytes: int) -> None:
        template = processor.chat_template
        if not isinstance(template, str) or not GENERATION_BLOCK.search(template):
            raise ValueError(
                "the processor's chat template must mark assistant turns with {% generation %} and "
                "{% endgeneration %}, which say what tokens get the loss."
            )
        self.processor = processor
        self.image_token_id: int = processor.image_token_id
        self._added_before, self._added_after = _tokens_added_around(processor.tokenizer)
        self._cache: ByteBoundedCache[tuple[Conversation, bool], EncodedConversation]
        self._cache = ByteBoundedCache(cache_bytes)

    def __call__(
        self, conversation: Conversation, name: str, *, generation_prompt: bool = False
    ) -> EncodedConversation:
        """Encode a conversation; `generation_prompt` opens an assistant turn at its end."""
        key = (conversation, generation_prompt)
        encoded = self._cache.get(key)
        if encoded is None:
            encoded = self._encode(conversation, name, generation_prompt)
            characters = sum(len(turn.text()) for turn in conversation)
            tokens = sum(len(segment) for segment in encoded.segments)
            self._cache.put(key, encoded, ENTRY_BYTES + characters + 9 * tokens)
        return encoded

    def _encode(
        self, conversation: Conversation, name: str, generation_prompt: bool
    ) -> EncodedConversation:
        """Render, tokenize and cut at the image tokens."""
        with reading(f"{name}, the chat template and tokenizer"):
            token_ids, mask = self._tokenize(conversation, generation_prompt)
        gaps = np.flatnonzero(token_ids == self.image_token_id)
        if len(gaps) != count_images(conversation):
            raise ValueError(
                f"{name}: the rendered conversation has {len(gaps)} image tokens for "
                f"{count_images(conversation)} images; the chat template must write one for each."
            )
        segments, masks, start = [], [], 0
        for stop in [*gaps.tolist(), len(token_ids)]:
            segments.append(token_ids[start:stop])
            masks.append(mask[start:stop])
            start = stop + 1
        return EncodedConversation(tuple(segments), tuple(masks))

    def _tokenize(
        self, conversation: Conversation, generation_prompt: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return token ids and assistant mask, one image token per image.

        The processor lets the tokenizer add special tokens unless the template has written the
        first one. The tokenizer's own chat templating adds none, so they are added here.
        """
        tokenizer, messages = self.processor.tokenizer, [turn.as_message() for turn in conversation]
        template = self.processor.chat_template
        guard = guarded_tokenizer(tokenizer, messages, template, chat_markers(self.processor))
        if guard is not None:
            tokenizer, messages = guard, guard.mark(messages)
        output = tokenizer.apply_chat_template(
            messages,
            chat_template=self.processor.chat_template,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            add_generation_prompt=generation_prompt,
        )
        ids, mask = output["input_ids"], output["assistant_masks"]
        if not ids or ids[0] != self.processor.tokenizer.bos_token_id:
            ids = self._added_before + ids + self._added_after
            mask = [0] * len(self._added_before) + mask + [0] * len(self._added_after)
        return np.asarray(ids, dtype=np.int64), np.asarray(mask, dtype=bool)


class ImageEncoder:
    """Image -> tiles and token ids, by the processor, within its limits.

    `cache_bytes` bounds the tiles that are kept; 0 keeps none. `allow_urls`: open http(s) URLs.
    """

    def __init__(
        self, processor: VLMoEProcessor, cache_bytes: int, allow_urls: bool = False
    ) -> None:
        self.processor = processor
        self.allow_urls = allow_urls
        self._cache: ByteBoundedCache[bytes, EncodedImage] = ByteBoundedCache(cache_bytes)

    def __call__(self, given: RowImage | Frame, name: str) -> EncodedImage:
        """Encode an image, or a frame, which is one tile; errors call it `name`."""
        value = given.image if isinstance(given, Frame) else given
        limits, allow_urls = self.processor.image_limits, self.allow_urls
        content = encoded_image(value, name, limits=limits, allow_urls=allow_urls)
        if content is None:
            image = open_image(value, name, limits=limits)
            digest = hashlib.blake2b(repr(image.size).encode(), digest_size=16, person=b"pixels")
            digest.update(image.tobytes())
            key = digest.digest()
        else:
            key = hashlib.blake2b(content.content, digest_size=16, person=b"encoded").digest()
        if value is not given:
            key += b"frame"
        encoded = self._cache.get(key)
        if encoded is None:
            if content is not None:
                image = decode(content, name, limits)
            encoded = self._encode(key, image if value is given else Frame(image), name)
            pixel_bytes = encoded.tiles.nbytes + encoded.tile_mask.nbytes
            self._cache.put(key, encoded, ENTRY_BYTES + pixel_bytes + encoded.token_ids.nbytes)
        return encoded

    def _encode(self, key: bytes, image: Image.Image | Frame, name: str) -> EncodedImage:
        """Run the processor on the image and a lone placeholder."""
        images: Any = [[image]]  # the processor's types know no frames
        try:
            output = self.processor(
                images=images,
                text=[self.processor.image_token],
                add_special_tokens=False,
                return_tensors="pt",
            )
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        token_ids = output["input_ids"][0].numpy()
        self._check_edges(token_ids)
        tile_mask = output["pixel_attention_mask"][0].bool()
        is_full = bool(tile_mask.all())
        token_mask = np.zeros(len(token_ids), dtype=bool)
        tiles = output["pixel_values"][0]
        return EncodedImage(key, token_ids, token_mask, tiles, tile_mask, is_full)

    def _check_edges(self, token_ids: np.ndarray) -> None:
        """Raise `ValueError` if an image's tokens could depend on the text beside it."""
        added = self.processor.tokenizer.added_tokens_decoder
        for token_id in (int(token_ids[0]), int(token_ids[-1])):
            token = added.get(token_id)
            if token is None or token.lstrip or token.rstrip:
                text = self.processor.tokenizer.convert_ids_to_tokens(token_id)
                raise ValueError(
                    f"the processor's text for an image starts or ends with {text!r}, which is no "
                    "added token of the tokenizer, or one that strips spaces; add the image "
                    "markers with tokenizer.add_special_tokens and resize the model's embeddings."
                )


def _tokens_added_around(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return the ids that a tokenizer adds before and after a text."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return whole[:start], whole[start + len(plain) :]
    raise ValueError("the tokenizer changes a text when it adds special tokens to it.")

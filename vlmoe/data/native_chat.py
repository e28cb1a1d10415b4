# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Conversations to the inputs of a model of transformers, by its own processor and chat template.

The tokens that the assistant generates are those between the template's `{% generation %}` markers.
Where a template has none, an assistant turn is what the whole conversation has beyond the
conversation before it with its generation prompt: the content and the end of the turn. Positions
are counted in characters of the rendered text, and moved past the placeholders that the processor
expands.

A text-only model has a tokenizer in the place of a processor.
"""

import copy
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from transformers import BatchFeature, PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from ..hub.input_errors import reading
from ..hub.saved_model import Processor
from ..processing.control_text import GuardedTokenizer, guarded_tokenizer
from .conversations import Conversation
from .encoding import GENERATION_BLOCK

Span = tuple[int, int]
Messages = list[dict[str, object]]


@dataclass(frozen=True)
class Chat:
    """A conversation, its opened images, and how errors call it."""

    conversation: Conversation
    images: Sequence[Image.Image]
    name: str


def tokenizer_of(processor: Processor) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a processor, which may be one itself."""
    return getattr(processor, "tokenizer", processor)


class NativeChatEncoder:
    """Chats -> a padded batch of the processor's own inputs, and the assistant's tokens.

    Args:
        processor: of the model; its chat template is used.

    Raises:
        ValueError: it has no chat template, no fast tokenizer, or nothing to pad with.
    """

    def __init__(self, processor: Processor) -> None:
        self.processor, self.tokenizer = processor, tokenizer_of(processor)
        template = processor.chat_template or self.tokenizer.chat_template
        if isinstance(template, dict):
            template = template.get("default")
        if not isinstance(template, str):
            raise ValueError(
                f"{type(processor).__name__} has no chat template; set its `chat_template`, or "
                "take a model that was tuned for conversations."
            )
        if not self.tokenizer.is_fast:
            raise ValueError(
                f"{type(self.tokenizer).__name__} does not tell where its tokens are in the text; "
                "use a fast tokenizer."
            )
        if self.tokenizer.pad_token is None:
            if self.tokenizer.eos_token is None:
                raise ValueError("The tokenizer has no token to pad with; set its `pad_token`.")
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.template = template
        self.is_marked = GENERATION_BLOCK.search(template) is not None
        self._markers = tuple(
            token.content
            for token in self.tokenizer.added_tokens_decoder.values()
            if token.content in template
            or token.content in getattr(processor, "all_special_multimodal_tokens", ())
        )

    def __call__(
        self, chats: Sequence[Chat], *, side: str, generation_prompt: bool = False
    ) -> tuple[BatchFeature, torch.Tensor]:
        """Encode chats.

        Args:
            chats: one for each row of the batch.
            side: the side of the padding.
            generation_prompt: open an assistant turn at the end of each.

        Returns:
            The inputs of the model's forward, and a mask (rows, length), True on the tokens that
            the assistant generates.

        Raises:
            ValueError: the template or the processor refuses a chat; the message names it.
        """
        messages = [self._messages(chat.conversation) for chat in chats]
        guard = guarded_tokenizer(self.tokenizer, messages, self.template, self._markers)
        if guard is not None:
            messages = guard.mark(messages)
        texts, spans = [], []
        for chat, each in zip(chats, messages, strict=True):
            with reading(f"{chat.name}, by the chat template", keep=(ValueError,)):
                text, of_assistant = self._render(each, chat.name, generation_prompt)
            texts.append(text)
            spans.append(of_assistant)
        name = chats[0].name if len(chats) == 1 else f"{chats[0].name} to {chats[-1].name}"
        with reading(f"{name}, by {type(self.processor).__name__}"):
            inputs = self._process(texts, [list(chat.images) for chat in chats], side, guard)
        offsets = inputs.pop("offset_mapping").tolist()
        replaced = inputs.pop("text_replacement_offsets", ())
        if len(replaced) == 0:  # InternVL makes an empty tensor of an empty list
            if any(spans) and any(chat.images for chat in chats):
                raise ValueError(
                    f"{type(self.processor).__name__} does not tell where it puts the tokens of "
                    "images, so that the assistant's tokens cannot be found; give the trainer a "
                    "`data_collator`."
                )
            replaced = [[] for _ in texts]
        rows = zip(offsets, replaced, spans, strict=True)
        mask = torch.tensor([_token_mask(*row) for row in rows], dtype=torch.bool)
        return inputs, mask & inputs["attention_mask"].bool()

    def _messages(self, conversation: Conversation) -> Messages:
        """Return the turns as the template takes them: a language model's takes plain texts."""
        if self.processor is self.tokenizer:
            return [{"role": turn.role, "content": turn.text()} for turn in conversation]
        return [dict(turn.as_message()) for turn in conversation]

    def _render(
        self, messages: Messages, name: str, generation_prompt: bool
    ) -> tuple[str, list[Span]]:
        """Return the text, and where the assistant's turns are in it."""
        if self.is_marked and not generation_prompt:
            [text], [marked] = self._rendered(messages, marked=True)
            return text, marked
        text = self._rendered(messages, generation_prompt=generation_prompt)[0][0]
        if generation_prompt:
            return text, []
        spans: list[Span] = []
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._rendered(messages[:number], generation_prompt=True)[0][0]
            turn = self._rendered(messages[: number + 1])[0][0]
            if not (text.startswith(before) and text.startswith(turn) and len(before) < len(turn)):
                raise ValueError(
                    f"{name}: the chat template writes turn {number} in another way where more "
                    "turns follow, so that its tokens cannot be found; put {% generation %} and "
                    "{% endgeneration %} around the assistant's turns in the template."
                )
            spans.append((len(before), len(turn.rstrip())))
        return text, spans

    def _rendered(
        self, messages: Messages, *, marked: bool = False, generation_prompt: bool = False
    ) -> tuple[list[str], list[list[Span]]]:
        return render_jinja_template(
            conversations=[messages],
            chat_template=self.template,
            return_assistant_tokens_mask=marked,
            add_generation_prompt=generation_prompt,
            **self.tokenizer.special_tokens_map,
        )

    def _process(
        self,
        texts: list[str],
        images: list[list[Image.Image]],
        side: str,
        guard: GuardedTokenizer | None,
    ) -> BatchFeature:
        """Run the processor, or the tokenizer of a text-only model."""
        options = {
            "padding": True,
            "padding_side": side,
            "return_tensors": "pt",
            "return_offsets_mapping": True,
        }
        if self.processor is self.tokenizer:
            return (guard or self.tokenizer)(texts, add_special_tokens=False, **options)
        processor = self.processor
        if guard is not None:
            processor = copy.copy(processor)
            processor.tokenizer = guard
        start = self.tokenizer.bos_token
        if start is not None and texts[0].startswith(start):  # as in `apply_chat_template`
            options["add_special_tokens"] = False
        return processor(
            text=texts,
            images=images if any(images) else None,
            return_text_replacement_offsets=True,
            **options,
        )


def _token_mask(
    offsets: Sequence[Span], replaced: Sequence[dict[str, Span]], spans: Sequence[Span]
) -> list[bool]:
    """Return for each token whether it overlaps a span.

    Args:
        offsets: where each token is in the processed text.
        replaced: where placeholders are in the rendered text (`span`), and what took their place in
            the processed text (`new_span`).
        spans: in the rendered text.
    """
    ends = [each["span"][1] for each in replaced]
    gained = [0, *(each["new_span"][1] - each["span"][1] for each in replaced)]
    moved = [tuple(at + gained[bisect_right(ends, at)] for at in span) for span in spans]
    return [
        any(first < end and last > start for start, end in moved) and last > first
        for first, last in offsets
    ]

# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""A question and its answer, token by token: their texts, and the experts of each layer."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

import torch
from PIL import Image
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...hub.json_files import JsonObject
from ...processing.processing_vlmoe import VLMoEProcessor
from ..trace import TokenRouting, trace_answers
from .figures import expert_colors
from .images import ImageRouting, Spread, image_routings, spread


@dataclass(frozen=True)
class TokenBox:
    """A token in one layer.

    Attributes:
        place: its position among the tokens.
        text: to show.
        classes: of its HTML element.
        pairs: its experts with their weights, by falling weight; none of the answer's last token,
            which is not routed.
        color: of its first expert.
    """

    place: int
    text: str
    classes: str
    pairs: list[tuple[int, float]]
    color: str


@dataclass(frozen=True)
class ImageBox:
    """The tokens of an image or tile in one layer, as one box.

    Attributes:
        place: the position of the first token.
        tokens: how many there are.
        counts: first experts with their number of tokens, by falling number.
        stripes: color stops of a CSS gradient, in proportion to `counts`.
    """

    place: int
    tokens: int
    counts: list[tuple[int, int]]
    stripes: str


@dataclass(frozen=True)
class LayerStrip:
    """The boxes of a layer, and how its text tokens are spread."""

    boxes: list[TokenBox | ImageBox]
    text: Spread


@dataclass
class TracedPrompt:
    """A question that the model answered, with the routing of both.

    Attributes:
        question, answer: as texts.
        routing: of the prompt's tokens and of the answer's but the last.
        tokens: the text of each token of prompt and answer.
        is_special: of each, whether it is one of the chat format or the like.
        answer_start: the number of prompt tokens.
        images: the routing of the images.
        image_figures: their PNG files, once drawn.
        question_type, reference: what the data say; "" and None where they say nothing.
    """

    question: str
    answer: str
    routing: TokenRouting
    tokens: list[str]
    is_special: list[bool]
    answer_start: int
    images: list[ImageRouting]
    image_figures: list[Path] = field(default_factory=list)
    question_type: str = ""
    reference: str | None = None

    def as_dict(self) -> JsonObject:
        """Return the prompt for a JSON file.

        Under `tokens` is each token's `text`, `id`, `is_image`, and by layer its `experts` and
        `weights`, by falling weight. The answer's last token is not routed, and is not there.
        """
        routing = self.routing
        experts, weights = routing.experts.transpose(0, 1), routing.weights.transpose(0, 1)
        return {
            "question": self.question,
            "question_type": self.question_type,
            "answer": self.answer,
            "reference": self.reference,
            "answer_start": self.answer_start,
            "tokens": [
                {
                    "text": self.tokens[i],
                    "id": int(routing.token_ids[i]),
                    "is_image": bool(routing.is_image[i]),
                    "experts": experts[i].tolist(),
                    "weights": [[round(w, 4) for w in row] for row in weights[i].tolist()],
                }
                for i in range(len(routing.token_ids))
            ],
        }


def trace_prompt(
    model: PreTrainedModel,
    processor: VLMoEProcessor,
    inputs: Mapping[str, torch.Tensor],
    images: Sequence[Image.Image],
    question: str,
    max_new_tokens: int,
    *,
    question_type: str = "",
    reference: str | None = None,
) -> TracedPrompt:
    """Answer one prompt and record where its tokens go.

    Args:
        model: in eval mode.
        processor: what made `inputs`.
        inputs: of one prompt.
        images: of the prompt, RGB.
        question: the text to show for it.
        max_new_tokens: the longest answer, in tokens.
        question_type, reference: see `TracedPrompt`.

    Raises:
        ValueError: the model has no experts, or the images are not the prompt's.
    """
    [(routing, answer_ids)] = trace_answers(model, processor, dict(inputs), max_new_tokens)
    tokenizer = processor.tokenizer
    prompt_length = int(inputs["attention_mask"].sum())
    ids = [*routing.token_ids[:prompt_length].tolist(), *answer_ids.tolist()]
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    return TracedPrompt(
        question=question,
        answer=tokenizer.decode(answer_ids, skip_special_tokens=True).strip(),
        routing=routing,
        tokens=[token_text(tokenizer, token) for token in ids],
        is_special=[token in special for token in ids],
        answer_start=prompt_length,
        images=image_routings(routing, images, processor, model.config),
        question_type=question_type,
        reference=reference,
    )


def layer_strip(prompt: TracedPrompt, layer: int) -> LayerStrip:
    """Return the boxes of a prompt and its answer in the colors of a layer's experts.

    Args:
        prompt: what to show.
        layer: position of the sparse layer.
    """
    routing = prompt.routing
    colors = expert_colors(routing.num_experts)
    is_image = [*routing.is_image.tolist(), False]
    boxes: list[TokenBox | ImageBox] = []
    for image, group in groupby(range(len(prompt.tokens)), key=lambda i: is_image[i]):
        places = list(group)
        if image:
            first = routing.first_choices[layer, places].tolist()
            boxes.append(_image_box(places[0], first, colors))
        else:
            boxes += [_token_box(prompt, layer, place, colors) for place in places]
    return LayerStrip(boxes, spread(routing.first_choices[layer][~routing.is_image]))


def token_text(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """Return the text of a token inside a text.

    It has the blank before a word, which many tokenizers remove at the start of what they decode.
    """
    return tokenizer.decode([token, token])[len(tokenizer.decode([token])) :]


def visible(text: str) -> str:
    """Return a token's text without the blank before a word, its lone blanks and breaks visible."""
    if not text.strip(" "):
        return "␣" * len(text) or "(empty)"
    return text.removeprefix(" ").replace("\n", "⏎").replace("\t", "⇥")


def _token_box(prompt: TracedPrompt, layer: int, place: int, colors: Sequence[str]) -> TokenBox:
    text = prompt.tokens[place]
    kind = "special" if prompt.is_special[place] else ""
    starts_word = text.startswith((" ", "\n")) or kind or not place or prompt.is_special[place - 1]
    classes = " ".join(filter(None, ["token", kind, "word" if starts_word else ""]))
    if place >= len(prompt.routing.token_ids):
        return TokenBox(place, visible(text), classes, [], "")
    experts = prompt.routing.experts[layer, place].tolist()
    weights = prompt.routing.weights[layer, place].tolist()
    pairs = list(zip(experts, weights, strict=True))
    return TokenBox(place, visible(text), classes, pairs, colors[experts[0]])


def _image_box(place: int, first_choices: Sequence[int], colors: Sequence[str]) -> ImageBox:
    counts = Counter(first_choices).most_common()
    stripes, start = [], 0.0
    for expert, count in counts:
        stop = start + 100 * count / len(first_choices)
        stripes.append(f"{colors[expert]} {start:.2f}% {stop:.2f}%")
        start = stop
    return ImageBox(place, len(first_choices), counts, ",".join(stripes))

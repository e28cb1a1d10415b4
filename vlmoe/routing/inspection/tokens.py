# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""A question and its answer, token by token: their texts, and the experts of each layer."""

from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, groupby
from pathlib import Path

import torch
from PIL import Image
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...configuration.configuration_vlmoe_text import Modality
from ...data.native_chat import tokenizer_of
from ...hub.json_files import JsonObject
from ...hub.saved_model import Processor, is_own_processor
from ..kinds import KINDS
from ..trace import TokenRouting, trace_answers
from .figures import expert_colors
from .images import ImageRouting, Spread, image_routings, spread
from .native_images import native_images
from .overlays import OTHERS, RANK_COLORS, ranks


@dataclass(frozen=True)
class TokenBox:
    """A token in one layer.

    Attributes:
        place: its position among the tokens.
        text: to show.
        classes: of its HTML element.
        pairs: its experts with their weights, by falling weight; none of the answer's last token,
            which is not routed.
        rank: of its first expert, see `ranks`.
        color: of its first expert.
    """

    place: int
    text: str
    classes: str
    pairs: list[tuple[int, float]]
    rank: int = 0
    color: str = ""


@dataclass(frozen=True)
class ImageBox:
    """The tokens of an image or video that follow each other, in one layer, as one box.

    Attributes:
        kind: image or video.
        place: the position of the first token.
        tokens: how many there are.
        counts: first experts with their number of tokens, by falling number.
        stripes: color stops of a CSS gradient, in proportion to `counts`.
    """

    kind: str
    place: int
    tokens: int
    counts: list[tuple[int, int]]
    stripes: str


@dataclass(frozen=True)
class LayerStrip:
    """A prompt and its answer in one layer.

    Attributes:
        boxes: of the tokens.
        left_out: how many boxes at the start there was no room for.
        text: how the text tokens are spread.
        ranks: of each expert, see `ranks`.
        busiest: the experts that have a color, with their number of tokens, by falling number.
    """

    boxes: list[TokenBox | ImageBox]
    left_out: int
    text: Spread
    ranks: list[int]
    busiest: list[tuple[int, int]]


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
        loose: kinds of tokens whose grid is not known, which are shown like words.
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
    loose: tuple[str, ...] = ()

    def as_dict(self) -> JsonObject:
        """Return the prompt for a JSON file.

        Under `tokens` is each token's `text`, `id`, `is_image`, `kind` (text, image or video), and
        by layer its `experts` and `weights`, by falling weight. The answer's last token is not
        routed, and is not there.
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
                    "kind": KINDS[int(routing.kinds[i])],
                    "experts": experts[i].tolist(),
                    "weights": [[round(w, 4) for w in row] for row in weights[i].tolist()],
                }
                for i in range(len(routing.token_ids))
            ],
        }


def trace_prompt(
    model: PreTrainedModel,
    processor: Processor,
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
    tokenizer = tokenizer_of(processor)
    prompt_length = int(inputs["attention_mask"].sum())
    ids = [*routing.token_ids[:prompt_length].tolist(), *answer_ids.tolist()]
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    pictures = (
        image_routings(routing, images, processor, model.config)
        if is_own_processor(processor)
        else native_images(routing, images, processor, model.config, inputs)
    )
    known = {picture.kind for picture in pictures}
    return TracedPrompt(
        question=question,
        answer=tokenizer.decode(answer_ids, skip_special_tokens=True).strip(),
        routing=routing,
        tokens=[token_text(tokenizer, token) for token in ids],
        is_special=[token in special for token in ids],
        answer_start=prompt_length,
        images=pictures,
        question_type=question_type,
        reference=reference,
        loose=tuple(kind for kind in KINDS[1:] if kind not in known),
    )


def layer_strip(
    prompt: TracedPrompt, layer: int, most: int | None = None, by_load: bool = False
) -> LayerStrip:
    """Return the boxes of a prompt and its answer in the colors of a layer's experts.

    Args:
        prompt: what to show.
        layer: position of the sparse layer.
        most: the number of boxes there is room for; those at the end are kept.
        by_load: give colors to the experts with the most tokens, in place of to all.
    """
    routing = prompt.routing
    first = routing.first_choices[layer]
    rank_of = ranks(first.tolist(), routing.num_experts)
    colors = expert_colors(routing.num_experts)
    if by_load:
        colors = [RANK_COLORS[rank] for rank in rank_of]
    shown = _pictures(prompt)
    boxes: list[TokenBox | ImageBox] = []
    for (kind, _), group in groupby(range(len(prompt.tokens)), key=lambda i: shown[i]):
        places = list(group)
        if kind == Modality.text.name or kind in prompt.loose:
            boxes += [_token_box(prompt, layer, place, rank_of, colors) for place in places]
        else:
            boxes.append(_image_box(kind, places[0], first[places].tolist(), colors))
    left_out = 0 if most is None else max(len(boxes) - most, 0)
    text = spread(first[routing.kinds == Modality.text.value])
    busiest = Counter(first.tolist()).most_common(OTHERS)
    return LayerStrip(boxes[left_out:], left_out, text, rank_of, busiest)


def _pictures(prompt: TracedPrompt) -> list[tuple[str, int]]:
    """Return, for each token, its kind and the number of its image or video.

    So images between which there is no token are told apart.
    """
    ends = {
        kind: list(accumulate(each.cells for each in prompt.images if each.kind == kind))
        for kind in KINDS
    }
    seen: Counter[str] = Counter()
    found = []
    for number in (*prompt.routing.kinds.tolist(), Modality.text):
        kind = KINDS[number]
        found.append((kind, bisect_right(ends[kind], seen[kind])))
        seen[kind] += 1
    return found


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


def _token_box(
    prompt: TracedPrompt, layer: int, place: int, rank_of: Sequence[int], colors: Sequence[str]
) -> TokenBox:
    text = prompt.tokens[place]
    kind = "special" if prompt.is_special[place] else ""
    starts_word = text.startswith((" ", "\n")) or kind or not place or prompt.is_special[place - 1]
    classes = " ".join(filter(None, ["token", kind, "word" if starts_word else ""]))
    if place >= len(prompt.routing.token_ids):
        return TokenBox(place, visible(text), classes, [])
    experts = prompt.routing.experts[layer, place].tolist()
    weights = prompt.routing.weights[layer, place].tolist()
    pairs = list(zip(experts, weights, strict=True))
    first = experts[0]
    return TokenBox(place, visible(text), classes, pairs, rank_of[first], colors[first])


def _image_box(
    kind: str, place: int, first_choices: Sequence[int], colors: Sequence[str]
) -> ImageBox:
    counts = Counter(first_choices).most_common()
    stripes, start = [], 0.0
    for expert, count in counts:
        stop = start + 100 * count / len(first_choices)
        stripes.append(f"{colors[expert]} {start:.2f}% {stop:.2f}%")
        start = stop
    return ImageBox(kind, place, len(first_choices), counts, ",".join(stripes))

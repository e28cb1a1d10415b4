# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""A question and its answer, token by token: their texts, and as HTML with the experts of a
layer."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from ..trace import TokenRouting, trace_answers
from .figures import expert_colors, text_color
from .images import ImageRouting, image_routings

MOST_WITH_WEIGHTS = 2  # experts whose weights have room below a token
MOST_BELOW = 4


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

    def as_dict(self) -> dict[str, Any]:
        """For a JSON file: under `tokens` each token's `text`, `id`, `is_image`, and by layer its
        `experts` and `weights`, by falling weight. The answer's last token is not routed, and is
        not there."""
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
    model: Any,
    processor: Any,
    inputs: Mapping[str, torch.Tensor],
    images: Sequence[Any],
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


def layer_strip(prompt: TracedPrompt, layer: int) -> str:
    """The tokens of a prompt and its answer in the colours of a layer's experts, as HTML, and a
    sentence about them; an image's tokens are one box.

    Args:
        prompt: what to show.
        layer: which sparse layer, counted from 0.
    """
    routing = prompt.routing
    colors = expert_colors(routing.num_experts)
    is_image = [*routing.is_image.tolist(), False]
    parts = []
    for image, group in groupby(range(len(prompt.tokens)), key=lambda i: is_image[i]):
        places = list(group)
        if image:
            parts.append(_image_box(routing.first_choices[layer, places].tolist(), colors))
            continue
        for place in places:
            if place == prompt.answer_start:
                parts.append('<span class="answer">answer:</span>')
            parts.append(_token_box(prompt, layer, place, colors))
    return f'<div class="strip">{"".join(parts)}</div>\n<p class="soft">{_told(prompt, layer)}</p>'


def percent(share: float | None) -> str:
    """A share in 0..1 for reading, such as 12.5%; a dash for None."""
    if share is None:
        return "&ndash;"
    return f"{100 * share:.1f}".removesuffix(".0") + "%"


def token_text(tokenizer: Any, token: int) -> str:
    """The text of a token inside a text: with the blank before a word, which many tokenizers take
    off at the start of what they decode."""
    return tokenizer.decode([token, token])[len(tokenizer.decode([token])) :]


def visible(text: str) -> str:
    """A token's text without the blank before a word, line breaks and lone blanks made visible."""
    if not text.strip(" "):
        return "␣" * len(text) or "(empty)"
    return text.removeprefix(" ").replace("\n", "⏎").replace("\t", "⇥")


def _token_box(prompt: TracedPrompt, layer: int, place: int, colors: Sequence[str]) -> str:
    text = prompt.tokens[place]
    kind = "special" if prompt.is_special[place] else ""
    starts_word = text.startswith((" ", "\n")) or kind or not place or prompt.is_special[place - 1]
    classes = " ".join(filter(None, ["token", kind, "word" if starts_word else ""]))
    if place >= len(prompt.routing.token_ids):
        why = "The last token of the answer: nothing comes after it, so it is not routed."
        return (
            f'<span class="{classes} unrouted" title="{why}"><span>{escape(visible(text))}</span>'
            "<small>end</small></span>"
        )
    experts = prompt.routing.experts[layer, place].tolist()
    weights = prompt.routing.weights[layer, place].tolist()
    pairs = list(zip(experts, weights, strict=True))
    title = ", ".join(f"expert {expert}: {weight:.2f}" for expert, weight in pairs)
    if len(pairs) <= MOST_WITH_WEIGHTS:
        below = [f"<b>{expert}</b> {weight:.2f}".replace("0.", ".") for expert, weight in pairs]
    else:
        below = [f"<b>{experts[0]}</b>", *map(str, experts[1:MOST_BELOW])]
        below += ["&hellip;"] if len(experts) > MOST_BELOW else []
    color = colors[experts[0]]
    return (
        f'<span class="{classes}" style="background:{color};color:{text_color(color)}" '
        f'title="{title}"><span>{escape(visible(text))}</span>'
        f"<small>{' &middot; '.join(below)}</small></span>"
    )


def _image_box(first_choices: Sequence[int], colors: Sequence[str]) -> str:
    """One box for the tokens of an image or tile, striped in proportion to their first experts."""
    counts = Counter(first_choices).most_common()
    stripes, start = [], 0.0
    for expert, count in counts:
        stop = start + 100 * count / len(first_choices)
        stripes.append(f"{colors[expert]} {start:.2f}% {stop:.2f}%")
        start = stop
    title = ", ".join(f"expert {expert}: {count} tokens" for expert, count in counts)
    below = " &middot; ".join(f"<b>{one}</b> &times;{count}" for one, count in counts[:MOST_BELOW])
    more = " &hellip;" if len(counts) > MOST_BELOW else ""
    return (
        f'<span class="token word image" style="background:linear-gradient(90deg,'
        f'{",".join(stripes)})" title="{title}"><span>image ({len(first_choices)} tokens)</span>'
        f"<small>{below}{more}</small></span>"
    )


def _told(prompt: TracedPrompt, layer: int) -> str:
    routing = prompt.routing
    first = routing.first_choices[layer][~routing.is_image].tolist()
    expert, count = Counter(first).most_common(1)[0]
    return (
        f"The first experts of the {len(first)} text tokens are {len(set(first))} of the layer's "
        f"{routing.num_experts}, most often expert {expert} ({percent(count / len(first))})."
    )

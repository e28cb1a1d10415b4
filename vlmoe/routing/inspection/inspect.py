# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Inspect a model's routing: on a dataset, on one question, and against an earlier state."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from torch.utils.data import Subset
from transformers import PreTrainedModel

from ...data.answers import Picture, evaluation_mode, open_images, prompt_inputs
from ...data.conversations import parse_row
from ...data.images import open_image
from ...data.long_rows import prompt_limit, require_room
from ...data.native_collator import prompt_collator
from ...data.rows import ConversationRows, Rows, as_rows
from ...hub.json_files import JsonObject
from ...hub.saved_model import Processor
from ...processing.image_sources import DEFAULT_LIMITS, ImageLimits
from .analysis import DatasetRouting, dataset_routing
from .report import RoutingInspection
from .tokens import TracedPrompt, trace_prompt

if TYPE_CHECKING:
    import datasets

PROMPTS_SHOWN = 3


@dataclass(frozen=True)
class _Sources:
    """Where images may come from, and how large they may be."""

    limits: ImageLimits
    allow_urls: bool


def inspect_routing(
    model: PreTrainedModel,
    processor: Processor,
    rows: "Rows | datasets.Dataset | None" = None,
    *,
    question: str | None = None,
    images: Picture | Sequence[Picture] | None = None,
    max_rows: int = 200,
    batch_size: int = 32,
    max_new_tokens: int = 32,
    before: PreTrainedModel | DatasetRouting | None = None,
    before_processor: Processor | None = None,
    name: str | None = None,
    dataset_name: str = "rows",
    before_name: str | None = None,
    image_limits: ImageLimits = DEFAULT_LIMITS,
    allow_image_urls: bool = False,
    progress: bool = False,
) -> RoutingInspection:
    """Record to which experts a model routes the tokens of rows, of a question, or of both.

    Args:
        model: on any device; it runs in evaluation mode and keeps the mode it was in.
        processor: the model's; of a language model its tokenizer.
        rows: data, as `as_rows` takes them. Without a question, three are shown token by token.
        question: shown token by token with its answer, about `images` (files or PIL images).
        max_rows: only the first rows are run, `batch_size` conversations at a time.
        max_new_tokens: the longest answer, in tokens.
        before: an earlier state of the model, to compare on the rows; or its `dataset_routing`, so
            that the two models need not be in memory together.
        before_processor: the earlier state's processor, if it is another.
        image_limits: on the size of images; a `VLMoEProcessor` has its own.
        name, dataset_name, before_name: for the page; by default where a model was loaded from.
        allow_image_urls: download images that rows name by http(s) URL.
        progress: show a progress bar.

    Raises:
        ValueError: arguments do not go together, an image or a row cannot be used, a model has no
            experts or gives NaN, or the experts of the two models differ.
        FileNotFoundError: an image file does not exist.
    """
    check_request(rows is not None, question, images is not None, before is not None)
    data = None if rows is None else first_rows(rows, max_rows)
    sources = _Sources(image_limits, allow_image_urls)
    run = partial(_run, data, batch_size, sources, progress)
    with evaluation_mode(model):
        if question:
            prompts = [_asked(model, processor, question, images, max_new_tokens, sources)]
        else:
            prompts = _from_rows(model, processor, data or [], max_new_tokens, sources)
    inspection = RoutingInspection.of_prompts(name or _name(model), prompts)
    if data is not None:
        inspection.add_rows(f"{dataset_name}, {len(data):,} rows", run(model, processor))
    if isinstance(before, PreTrainedModel):
        before_name = before_name or _name(before)
        before = run(before, before_processor or processor)
    if before is not None:
        inspection.compare(before_name or "before", before)
    return inspection


def first_rows(rows: "Rows | datasets.Dataset", most: int) -> Rows:
    """Return the first rows as messages.

    Raises:
        ValueError: there are none, or `most` is below 1.
    """
    if most < 1:
        raise ValueError(f"max_rows must be at least 1, got {most}.")
    converted = as_rows(rows[:most] if isinstance(rows, list | tuple) else rows)
    if len(converted) == 0:
        raise ValueError("empty dataset: there are no rows to inspect.")
    if len(converted) <= most:
        return converted
    if hasattr(converted, "select"):  # a `datasets.Dataset`, whose images are not decoded for this
        return converted.select(range(most))
    return Subset(converted, range(most))  # type: ignore[arg-type, return-value]


def check_request(has_rows: bool, question: str | None, has_images: bool, has_before: bool) -> None:
    """Check that arguments of `inspect_routing` go together, without any of the objects.

    Raises:
        ValueError: they do not; the message says what is missing.
    """
    if not question and not has_rows:
        raise ValueError("Nothing to inspect: give data (rows, `dataset`) or a question.")
    if has_images and not question:
        raise ValueError("An image goes with a question, which is missing: what to ask about it.")
    if has_before and not has_rows:
        raise ValueError("`before` compares two models on data: give rows (`dataset`).")


def short_name(source: str | os.PathLike[str]) -> str:
    """Return a name for a page that may be published: of an absolute path the last two parts."""
    path = Path(source).expanduser()
    return "/".join(path.parts[-2:]) if path.is_absolute() else str(source)


def _name(model: PreTrainedModel) -> str:
    return short_name(getattr(model, "name_or_path", "")) or type(model).__name__


def _run(
    rows: Rows | None,
    batch_size: int,
    sources: _Sources,
    progress: bool,
    model: PreTrainedModel,
    processor: Processor,
) -> DatasetRouting:
    assert rows is not None
    with evaluation_mode(model):
        return dataset_routing(
            model,
            processor,
            rows,
            batch_size,
            image_limits=sources.limits,
            allow_image_urls=sources.allow_urls,
            progress=progress,
        )


def _asked(
    model: PreTrainedModel,
    processor: Processor,
    question: str,
    images: Picture | Sequence[Picture] | None,
    max_new_tokens: int,
    sources: _Sources,
) -> TracedPrompt:
    opened = open_images(images, processor, sources.limits)
    inputs = prompt_inputs(processor, question, opened)
    require_room(model, inputs["input_ids"].shape[1], max_new_tokens)
    return trace_prompt(model, processor, inputs, opened, question, max_new_tokens)


def _from_rows(
    model: PreTrainedModel,
    processor: Processor,
    rows: Rows,
    max_new_tokens: int,
    sources: _Sources,
) -> list[TracedPrompt]:
    """Trace a few questions of the rows; see `_chosen_questions`."""
    limit, allow_urls = prompt_limit(model, max_new_tokens), sources.allow_urls
    limits = getattr(processor, "image_limits", sources.limits)
    collator = prompt_collator(processor, limit, limits=limits, allow_image_urls=allow_urls)
    prompts = []
    for row in _chosen_questions(rows):
        parsed, batch = collator.parsed(row, 0), collator([row])
        asked = [turn.text() for turn in parsed.conversations[0] if turn.role == "user"][-1]
        images = [
            open_image(image, parsed.name, limits=limits, allow_urls=allow_urls)
            for image in parsed.images
        ]
        prompt = trace_prompt(
            model,
            processor,
            batch.inputs,
            images,
            asked,
            max_new_tokens,
            question_type=batch.question_types[0],
            reference=batch.references[0],
        )
        prompts.append(prompt)
    return prompts


def _chosen_questions(rows: Rows) -> list[JsonObject]:
    """Return the first questions, each of another row and, if rows have types, of another type."""
    chosen: list[JsonObject] = []
    types: set[str] = set()
    for position in range(len(rows)):
        row = rows[position]
        for number, kind in enumerate(parse_row(row, position).question_types):
            if not kind or kind not in types:
                types.add(kind)
                chosen.append(ConversationRows([row])[number])
                break
        if len(chosen) == PROMPTS_SHOWN:
            break
    return chosen

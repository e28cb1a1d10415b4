# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Inspect a model's routing: on a dataset, on one question, and against an earlier state."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.utils.data import Subset

from ...data.answers import Picture, evaluation_mode, open_images, prompt_inputs
from ...data.collator import VLMoEPromptCollator
from ...data.conversations import parse_row
from ...data.images import open_image
from ...data.long_rows import prompt_limit, require_room
from ...data.rows import ConversationRows, Rows, as_rows
from ...processing.processing_vlmoe import VLMoEProcessor
from .analysis import change, dataset_routing, specialisation
from .report import BeforeTraining, RoutingInspection
from .tokens import TracedPrompt, trace_prompt

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedModel

PROMPTS_SHOWN = 3


def inspect_routing(
    model: "PreTrainedModel",
    processor: VLMoEProcessor,
    rows: "Rows | datasets.Dataset | None" = None,
    *,
    question: str | None = None,
    images: Picture | Sequence[Picture] | None = None,
    max_rows: int = 200,
    batch_size: int = 32,
    max_new_tokens: int = 32,
    before: "PreTrainedModel | None" = None,
    before_processor: VLMoEProcessor | None = None,
    name: str | None = None,
    dataset_name: str = "rows",
    before_name: str | None = None,
    allow_image_urls: bool = False,
    progress: bool = False,
) -> RoutingInspection:
    """Record to which experts a model routes the tokens of rows, of a question, or of both.

    Args:
        model: on any device; it runs in evaluation mode and keeps the mode it was in.
        processor: the model's.
        rows: data, as `as_rows` takes them. Without a question, three of them are shown token by
            token.
        question: what to ask and to show token by token.
        images: image files or PIL images of the question.
        max_rows: only the first rows are run.
        batch_size: conversations at a time.
        max_new_tokens: the longest answer, in tokens.
        before: an earlier state of the model, to compare on the rows.
        before_processor: the earlier state's processor, if it is another.
        name: what the page calls the model; by default where it was loaded from, or its class.
        dataset_name: what the page calls the rows.
        before_name: what the page calls the earlier state.
        allow_image_urls: download images that rows name by http(s) URL.
        progress: show a progress bar.

    Example:
        >>> inspect_routing(model, processor, rows).save("outputs/inspect")

    Raises:
        ValueError: arguments do not go together, an image or a row cannot be used, a model has no
            experts or gives NaN, or the experts of the two models differ.
        FileNotFoundError: an image file does not exist.
    """
    check_request(rows is not None, question, images is not None, before is not None)
    if max_rows < 1:
        raise ValueError(f"max_rows must be at least 1, got {max_rows}.")
    data = None if rows is None else _first_rows(rows, max_rows)
    with evaluation_mode(model):
        if question:
            prompts = [_asked(model, processor, question, images, max_new_tokens)]
        else:
            assert data is not None
            prompts = _from_rows(model, processor, data, max_new_tokens, allow_image_urls)
        routing = prompts[0].routing
        inspection = RoutingInspection(
            model=name or _name(model),
            layers=routing.layers,
            num_experts=routing.num_experts,
            top_k=routing.experts.shape[-1],
            prompts=prompts,
        )
        if data is None:
            return inspection
        running: dict[str, Any] = {
            "batch_size": batch_size,
            "allow_image_urls": allow_image_urls,
            "progress": progress,
        }
        found = dataset_routing(model, processor, data, **running)
    inspection.dataset = f"{dataset_name}, {len(data):,} rows"
    inspection.routing = found
    inspection.types = specialisation(found.counts, found.question_types)
    if before is not None:
        with evaluation_mode(before):
            old = dataset_routing(before, before_processor or processor, data, **running)
        inspection.before = BeforeTraining(before_name or _name(before), old, change(old, found))
    return inspection


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


def _name(model: "PreTrainedModel") -> str:
    return short_name(getattr(model, "name_or_path", "")) or type(model).__name__


def _first_rows(rows: "Rows | datasets.Dataset", most: int) -> Rows:
    converted = as_rows(rows[:most] if isinstance(rows, list | tuple) else rows)
    if len(converted) == 0:
        raise ValueError("empty dataset: there are no rows to inspect.")
    if len(converted) <= most:
        return converted
    if hasattr(converted, "select"):  # a `datasets.Dataset`, whose images are not decoded for this
        return converted.select(range(most))
    return Subset(converted, range(most))  # type: ignore[arg-type, return-value]


def _asked(
    model: "PreTrainedModel",
    processor: VLMoEProcessor,
    question: str,
    images: Picture | Sequence[Picture] | None,
    max_new_tokens: int,
) -> TracedPrompt:
    opened = open_images(images, processor)
    inputs = prompt_inputs(processor, question, opened)
    require_room(model, inputs["input_ids"].shape[1], max_new_tokens)
    return trace_prompt(model, processor, inputs, opened, question, max_new_tokens)


def _from_rows(
    model: "PreTrainedModel",
    processor: VLMoEProcessor,
    rows: Rows,
    max_new_tokens: int,
    allow_urls: bool,
) -> list[TracedPrompt]:
    """Trace a few questions of the rows; see `_chosen_questions`."""
    limit, limits = prompt_limit(model, max_new_tokens), processor.image_limits
    collator = VLMoEPromptCollator(
        processor, limit, share_images=False, allow_image_urls=allow_urls
    )
    prompts = []
    for row in _chosen_questions(rows):
        parsed, batch = parse_row(row, 0), collator([row])
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


def _chosen_questions(rows: Rows) -> list[dict[str, Any]]:
    """Return the first questions, each of another row and, if rows have types, of another type."""
    chosen: list[dict[str, Any]] = []
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

# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""The rows of `vlmoe train`: which are read, which are used, and how they are collated."""

import functools
from typing import TYPE_CHECKING, Any

from .option_parser import require
from .options import DataOptions, ImageOptions

if TYPE_CHECKING:
    from transformers import TrainingArguments


def load_data(
    options: DataOptions, arguments: "TrainingArguments", image_options: ImageOptions | None = None
) -> tuple[Any, Any | None]:
    """The rows to train on, and those to evaluate on, if any."""
    from vlmoe.data.loading import load_rows

    from .loading import image_limits

    source = require(options.dataset, "dataset", "train")
    images = image_options or ImageOptions()
    load = functools.partial(
        load_rows,
        with_images=not options.without_images,
        allow_outside_images=images.allow_outside_images,
        allow_image_urls=images.allow_image_urls,
        image_limits=image_limits(images),
    )
    with arguments.main_process_first(desc="loading data"):
        train_rows = load(
            source,
            options.train_split,
            limit=options.max_train_rows,
            altered_copies=options.altered_copies,
        )
        if not (options.eval_dataset or options.eval_split):
            return train_rows, None
        eval_rows = load(
            options.eval_dataset or source,
            options.eval_split or "test",
            limit=options.max_eval_rows,
        )
    return train_rows, eval_rows


def row_collator(
    model: Any, processor: Any, options: DataOptions, *, allow_image_urls: bool = False
) -> Any:
    """The collator of the rows, with the length that the options and the model allow."""
    from vlmoe.data.collator import VLMoECollator
    from vlmoe.data.long_rows import length_limit

    return VLMoECollator(
        processor,
        length_limit(model.config, options.max_length),
        shorten_prompts=options.on_long_rows == "shorten-prompt",
        allow_image_urls=allow_image_urls,
    )


def checked_rows(
    rows: Any, collator: Any, options: DataOptions, arguments: "TrainingArguments", what: str
) -> Any:
    """The rows that can be used; how many are too long is logged once.

    Raises:
        ValueError: a row is too long, malformed or has nothing to learn; it is named.
    """
    from vlmoe.data.long_rows import usable_rows

    is_first = arguments.process_index == 0
    usable = usable_rows(rows, collator, options.on_long_rows, progress=is_first)
    if is_first:
        usable.log(what, collator.max_length)
    return usable.rows


def texts_of(rows: Any) -> Any:
    """Every text of every conversation, once per occurrence, in order."""
    from vlmoe.data.conversations import parse_row

    for position, row in enumerate(rows):
        for conversation in parse_row(row, position).conversations:
            yield from (turn.text() for turn in conversation)

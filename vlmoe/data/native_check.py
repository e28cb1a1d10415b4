# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Check a dataset for a model of transformers, by its own processor: `check.py` for VLMoE's."""

from collections.abc import Sequence
from itertools import groupby

import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from .check import EXAMPLES, LEARNED, SplitReport, checked_images
from .conversations import ParsedRow
from .native_chat import Chat
from .native_collator import NativeCollator
from .row_datasets import is_faulty
from .row_fields import Rows

SHOWN_WHOLE = 3
"""A run of equal tokens that is longer is shown once, with its length."""


def check_native_rows(
    rows: Rows,
    collator: NativeCollator,
    name: str = "train",
    *,
    faults: Sequence[str] = (),
    limit: int | None = None,
    progress: bool = True,
) -> SplitReport:
    """Process every row as training would, and collect errors instead of raising them.

    Args:
        rows: as `load_rows` gives them.
        collator: of the model's processor.
        name: the split's name.
        faults: the errors that reading the rows collected.
        limit: the longest conversation in tokens that the model takes.
        progress: show a progress bar.
    """
    report = SplitReport(name, rows=len(rows), faults=list(faults))
    bar = logging.tqdm(rows, desc=f"checking {name}", unit="row", disable=not progress)
    for position, row in enumerate(bar):
        if is_faulty(row):
            continue
        try:
            parsed = collator.parsed(row, position)
            report.question_types.update(kind for kind in parsed.question_types if kind)
            _check_row(parsed, collator, limit, report)
        except ValueError as error:
            report.faults.append(str(error))
    return report


def _check_row(
    parsed: ParsedRow, collator: NativeCollator, limit: int | None, report: SplitReport
) -> None:
    """Count the tokens of a row's conversations; raise `ValueError` for one that cannot be used."""
    images = checked_images(parsed, collator.limits, collator.allow_image_urls, report)
    if images is None:
        return
    tokenizer = collator.encode.tokenizer
    if images and collator.processor is tokenizer:
        raise ValueError(f"{parsed.name} has images, but the model reads text alone.")
    for conversation in parsed.conversations:
        chat = Chat(conversation, images, parsed.name)
        inputs, is_learned = collator.encode([chat], side="right")
        ids, learned = inputs["input_ids"][0], is_learned[0]
        report.lengths.append(len(ids))
        report.label_lengths.append(int(learned.sum()))
        if len(report.examples) < EXAMPLES:
            report.examples.append(as_seen(ids, learned, tokenizer))
        if not any(each.role == "assistant" and each.text().strip() for each in conversation):
            report.faults.append(f"{parsed.name}: no token to learn; it needs an assistant turn.")
        if limit is not None and len(ids) > limit:
            report.faults.append(
                f"{parsed.name}: a conversation has {len(ids)} tokens, more than {limit}."
            )


def as_seen(ids: torch.Tensor, learned: torch.Tensor, tokenizer: PreTrainedTokenizerBase) -> str:
    """Show (tokens,) as text, learned ones between marks, runs of an image token as `[TOKEN x N]`.

    Args:
        ids: of the tokens.
        learned: True where a token has a loss.
        tokenizer: decodes them.
    """
    text = ""
    for is_learned, span in groupby(
        zip(ids.tolist(), learned.tolist(), strict=True), lambda x: x[1]
    ):
        piece = ""
        for added, run in groupby((token for token, _ in span), tokenizer.added_tokens_decoder.get):
            tokens = list(run)
            is_long = added is not None and len(tokens) > SHOWN_WHOLE
            shown = tokenizer.decode(tokens[:1] if is_long else tokens)
            piece += f"[{shown} x {len(tokens)}]" if is_long else shown
        text += f"{LEARNED[0]}{piece}{LEARNED[1]}" if is_learned else piece
    return text

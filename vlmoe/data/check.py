# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Check a dataset without training: its contents, every fault by row, what a model sees."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

import numpy as np
from PIL import Image
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from ..figures.plots import BLUE, GRAY, GREEN, ORANGE, RED, new_figure, save_figure
from ..figures.text import as_it_is, drawable
from ..processing.image_sources import ImageLimits
from .collator import VLMoECollator
from .conversations import Conversation, ParsedRow, row_name
from .encoding import EncodedConversation
from .images import open_image
from .long_rows import RowMeasure
from .row_datasets import is_faulty
from .row_fields import Rows

EXAMPLES = 3
COLORS = (BLUE, ORANGE, GREEN, GRAY)
MOST_BINS = 40
LEARNED = ("«", "»")
"""Around the tokens that have a loss."""


@dataclass
class SplitReport:
    """The contents of a split.

    Attributes:
        name: its name.
        rows: how many rows were read.
        lengths: tokens of each conversation, its images included.
        label_lengths: tokens with a loss of each conversation.
        sizes: (width, height) of each image.
        question_types: how many conversations have each.
        faults: all of them, each naming its row.
        examples: the first conversations as the model sees them.
    """

    name: str
    rows: int = 0
    lengths: list[int] = field(default_factory=list)
    label_lengths: list[int] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    question_types: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    examples: list[str] = field(default_factory=list)


def check_rows(
    rows: Rows,
    collator: VLMoECollator,
    name: str = "train",
    *,
    faults: Sequence[str] = (),
    limit: int | None = None,
    progress: bool = True,
) -> SplitReport:
    """Read every row as training would, and collect errors instead of raising them.

    Args:
        rows: as `load_rows` gives them.
        collator: one without `max_length`, whose processor counts the tokens.
        name: the split's name.
        faults: the errors that reading the rows collected.
        limit: the longest conversation in tokens that the model takes.
        progress: show a progress bar.
    """
    report = SplitReport(name, rows=len(rows), faults=list(faults))
    measure = RowMeasure(collator)
    bar = logging.tqdm(rows, desc=f"checking {name}", unit="row", disable=not progress)
    for position, row in enumerate(bar):
        if is_faulty(row):
            continue
        try:
            parsed = collator.parsed(row, position)
        except ValueError as error:
            report.faults.append(str(error))
            continue
        limits, allow_urls = collator.processor.image_limits, collator.encode_image.allow_urls
        images = checked_images(parsed, limits, allow_urls, report)
        lengths = None
        if images is not None:
            lengths = measure.lengths_of(parsed.images, [each.size[::-1] for each in images])
        report.question_types.update(kind for kind in parsed.question_types if kind)
        for conversation in parsed.conversations:
            _check_conversation(conversation, row_name(row, position), lengths, collator, report)
        if limit is not None:
            longest = max(report.lengths[-len(parsed.conversations) :], default=0)
            if longest > limit:
                report.faults.append(
                    f"{parsed.name}: a conversation has {longest} tokens, more than {limit}."
                )
    return report


def report_text(reports: Sequence[SplitReport], limit: int | None) -> str:
    """Format the reports: a table, the first conversations as the model sees them, all faults."""
    lines = [
        f"{'split':<12} {'rows':>9} {'conversations':>13} {'images':>9} {'tokens':>17} "
        f"{'learned':>15} {'faults':>7}"
    ]
    for report in reports:
        lines.append(
            f"{report.name:<12} {report.rows:>9,} {len(report.lengths):>13,} "
            f"{len(report.sizes):>9,} {_range(report.lengths):>17} "
            f"{_range(report.label_lengths):>15} {len(report.faults):>7,}"
        )
    lines.append("(tokens and learned tokens of a conversation: least, median, most)")
    if limit is not None:
        lines.append(f"The model has positions for {limit:,} tokens.")
    for report in reports:
        lines += [f"{report.name}: {line}" for line in _details(report)]
    for report in reports:
        if report.examples:
            opened, closed = LEARNED
            lines.append(
                f"\nThe first conversations of {report.name} as the model sees them, learned "
                f"tokens in {opened}{closed}:"
            )
            lines += report.examples
    for report in reports:
        if report.faults:
            lines.append(f"\nFaults of {report.name}:")
            lines += [f"- {fault}" for fault in report.faults]
    return "\n".join(lines)


def plot_data(reports: Sequence[SplitReport], path: str | Path, limit: int | None = None) -> Path:
    """Draw histograms of tokens and learned tokens per conversation, and the images' sizes.

    Args:
        reports: of the splits, one color each.
        path: the PNG file to write.
        limit: the longest conversation that the model takes; drawn where it is near.
    """
    figure = new_figure(13.0, 4.2)
    tokens, learned, sizes = figure.subplots(1, 3)
    names = drawable([report.name for report in reports])
    colors = [COLORS[number % len(COLORS)] for number in range(len(reports))]
    for axis, values, title in (
        (tokens, [report.lengths for report in reports], "Tokens of a conversation"),
        (learned, [report.label_lengths for report in reports], "Learned tokens"),
    ):
        axis.hist(values, bins=_edges(values), color=colors, label=names, stacked=True)
        axis.set(title=title, xlabel="tokens", ylabel="conversations")
        axis.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    longest = max((max(report.lengths, default=0) for report in reports), default=0)
    if limit is not None and longest > limit / 2:
        tokens.axvline(limit, color=RED, linewidth=1.2)
    for report, color in zip(reports, colors, strict=True):
        widths = [width for width, _ in report.sizes]
        heights = [height for _, height in report.sizes]
        sizes.scatter(widths, heights, s=9, alpha=0.4, color=color, label=report.name)
    sizes.set(title="Sizes of the images", xlabel="width in pixels", ylabel="height in pixels")
    as_it_is(tokens.legend(framealpha=0.9, edgecolor="none").get_texts())
    faults = sum(len(report.faults) for report in reports)
    rows = sum(report.rows for report in reports)
    figure.suptitle(f"{rows:,} rows, {faults:,} faults", color=RED if faults else "black")
    return save_figure(figure, path)


def as_seen(
    encoded: EncodedConversation,
    sizes: Sequence[tuple[int, int]],
    lengths: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
) -> str:
    """Show a conversation as the model sees it, its images as `[image WIDTHxHEIGHT: N tokens]`."""
    text = ""
    for position, (ids, mask) in enumerate(zip(encoded.segments, encoded.masks, strict=True)):
        if position:
            width, height = sizes[position - 1]
            text += f"[image {width}x{height}: {lengths[position - 1]} tokens]"
        for learned, run in groupby(zip(ids.tolist(), mask.tolist(), strict=True), lambda x: x[1]):
            piece = tokenizer.decode([token for token, _ in run])
            text += f"{LEARNED[0]}{piece}{LEARNED[1]}" if learned else piece
    return text


def checked_images(
    parsed: ParsedRow, limits: ImageLimits, allow_urls: bool, report: SplitReport
) -> list[Image.Image] | None:
    """Open the images of a row, and report their sizes and faults; None if one cannot be used."""
    images: list[Image.Image] = []
    for position, image in enumerate(parsed.images):
        if is_faulty(image):
            continue  # its error was collected when it was read
        try:
            where = f"{parsed.name}, image {position}"
            images.append(open_image(image, where, limits=limits, allow_urls=allow_urls))
        except (ValueError, OSError) as error:
            report.faults.append(str(error))
    report.sizes += [image.size for image in images]
    return images if len(images) == len(parsed.images) else None


def _check_conversation(
    conversation: Conversation,
    name: str,
    image_lengths: list[int] | None,
    collator: VLMoECollator,
    report: SplitReport,
) -> None:
    """Count a conversation's tokens, and show it if it is one of the first."""
    try:
        encoded = collator.encode_conversation(conversation, name)
    except ValueError as error:
        report.faults.append(str(error))
        return
    learned = int(sum(mask.sum() for mask in encoded.masks))
    if not learned:
        report.faults.append(f"{name}: a conversation has no token with a loss; it has no answer.")
    if image_lengths is None:
        return
    if len(report.examples) < EXAMPLES:
        sizes = report.sizes[len(report.sizes) - len(image_lengths) :]
        report.examples.append(as_seen(encoded, sizes, image_lengths, collator.processor.tokenizer))
    report.label_lengths.append(learned)
    report.lengths.append(sum(map(len, encoded.segments)) + sum(image_lengths))


def _details(report: SplitReport) -> Iterator[str]:
    """Sizes of the images, and types of question."""
    if report.sizes:
        widths, heights = np.array(report.sizes).T.tolist()
        yield f"images are {_range(widths)} pixels wide and {_range(heights)} high"
    if report.question_types:
        counts = report.question_types.most_common(8)
        yield "question types: " + ", ".join(f"{kind} {count:,}" for kind, count in counts)


def _range(values: Sequence[int]) -> str:
    """Least, median and most."""
    if not values:
        return "-"
    return f"{min(values):,}/{int(np.median(values)):,}/{max(values):,}"


def _edges(values: Sequence[Sequence[int]]) -> list[float]:
    """Edges of bins as wide as a whole number."""
    known = [value for each in values for value in each] or [0]
    low, high = min(known), max(known)
    width = -(-(high - low + 1) // MOST_BINS)
    count = -(-(high - low + 1) // width)
    return [low - 0.5 + width * number for number in range(count + 1)]

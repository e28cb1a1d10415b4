# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""One picture of a checked dataset: lengths in tokens, what is learned, sizes of the images."""

from collections.abc import Sequence
from pathlib import Path

from ..figures.plots import BLUE, GREEN, GREY, ORANGE, RED, new_figure, save_figure
from ..figures.text import as_it_is, drawable
from .check import SplitReport

COLORS = (BLUE, ORANGE, GREEN, GREY)
MOST_BINS = 40


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


def _edges(values: Sequence[Sequence[int]]) -> list[float]:
    """Edges of bins as wide as a whole number."""
    known = [value for each in values for value in each] or [0]
    low, high = min(known), max(known)
    width = -(-(high - low + 1) // MOST_BINS)
    count = -(-(high - low + 1) // width)
    return [low - 0.5 + width * number for number in range(count + 1)]

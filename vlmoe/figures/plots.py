# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Pictures of a run, as PNG files: answers on test images, training curves, expert load.

Every function takes plain data and a path, writes the file atomically and returns its path.
Matplotlib draws to memory (Agg), without a screen; it is imported when the first figure is drawn.

Colors: blue for images and training, orange for text and evaluation, green and red only for right
and wrong.
"""

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image

from ..hub.atomic_files import atomic_path
from .text import as_it_is, drawable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, RED, GRAY = "#2a78d6", "#d9731a", "#1a7f37", "#c62828", "#6b6b6b"
DOTS_PER_INCH = 150
MOST_EXPERTS_SIDE_BY_SIDE = 10


@dataclass
class AnsweredQuestion:
    """One question about one image, with the model's answer and the truth."""

    image: Image.Image
    question: str
    answer: str
    truth: str

    @property
    def is_right(self) -> bool:
        """Whether the answer is the truth, up to case and surrounding blanks."""
        return self.answer.strip().casefold() == self.truth.strip().casefold()


def plot_answers(
    answers: Sequence[AnsweredQuestion], path: str | Path, columns: int = 4, title: str = ""
) -> Path:
    """Draw a grid of images with question and answer: green if right, else red with the truth.

    Raises:
        ValueError: there are no answers to draw.
    """
    if not answers:
        raise ValueError("There are no answered questions to draw.")
    columns = min(columns, len(answers))
    rows = -(-len(answers) // columns)
    figure = new_figure(2.7 * columns, 3.2 * rows + 0.6)
    figure.set_layout_engine("constrained", h_pad=0.12)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis in axes[len(answers) :]:
        axis.set_axis_off()
    texts = drawable(
        [text for item in answers for text in (item.question, item.answer.strip(), item.truth)]
    )
    for axis, item, question, answer, truth in zip(
        axes, answers, texts[::3], texts[1::3], texts[2::3], strict=False
    ):
        axis.imshow(np.asarray(item.image.convert("RGB")), interpolation="nearest", aspect="equal")
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
        as_it_is(axis.set_title(_wrapped(question, 30), fontsize=9.5, pad=7))
        verdict = answer or "(nothing)"
        verdict = verdict if item.is_right else f"{verdict}\n(truth: {truth})"
        color = GREEN if item.is_right else RED
        as_it_is(
            axis.set_xlabel(_wrapped(verdict, 28), color=color, fontsize=10.5, fontweight="bold")
        )
    right = sum(item.is_right for item in answers)
    figure.suptitle(title or f"{right} of these {len(answers)} answers are right", fontsize=13)
    return save_figure(figure, path)


def plot_training(
    log_history: Sequence[dict[str, Any]],
    path: str | Path,
    metric: str = "eval_exact_match",
    evaluated: str = "evaluation data",
) -> Path:
    """Draw loss by step, and accuracy by step if the history has `metric`.

    Args:
        log_history: `trainer.state.log_history`, entries with `step` and `loss`, `eval_loss` or
            `metric`.
        path: the PNG file to write.
        metric: the share of right answers, in 0..1, as evaluation during training counts them:
            teacher-forced, with the true tokens before each one.
        evaluated: the name of the evaluated data, for the title.

    Raises:
        ValueError: the history has no loss at all.
    """
    training, evaluation = _series(log_history, "loss"), _series(log_history, "eval_loss")
    accuracy = _series(log_history, metric)
    if not training[0] and not evaluation[0]:
        raise ValueError("The log history holds neither `loss` nor `eval_loss`.")
    panels = 2 if accuracy[0] else 1
    figure = new_figure(6.2 * panels, 4.2)
    axes = figure.subplots(1, panels, squeeze=False).flatten()
    axes[0].plot(*training, color=BLUE, linewidth=1.6, label="training")
    if evaluation[0]:
        axes[0].plot(
            *evaluation, color=ORANGE, linewidth=1.6, marker="o", markersize=4.5, label="evaluation"
        )
    positive = all(value > 0 for value in (*training[1], *evaluation[1]))
    axes[0].set(title="Loss", xlabel="optimizer step", yscale="log" if positive else "linear")
    axes[0].legend(frameon=False)
    if accuracy[0]:
        percent = [100 * value for value in accuracy[1]]
        axes[1].plot(accuracy[0], percent, color=ORANGE, linewidth=1.6, marker="o", markersize=4.5)
        axes[1].annotate(
            f"{percent[-1]:.1f}%",
            xy=(accuracy[0][-1], percent[-1]),
            xytext=(-4, -14),
            textcoords="offset points",
            ha="right",
            fontweight="bold",
        )
        axes[1].set(
            title=f"Right answers, teacher-forced, on {evaluated}",
            xlabel="optimizer step",
            ylabel="%",
            ylim=(0, 102),
        )
    for axis in axes:
        axis.grid(alpha=0.25, which="both", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    return save_figure(figure, path)


def plot_expert_load(
    image_shares: ArrayLike,
    text_shares: ArrayLike,
    path: str | Path,
    layers: Sequence[int] | None = None,
) -> Path:
    """Draw heatmaps of layers x experts, image tokens beside text tokens; see `plot_shares`.

    Args:
        image_shares: (layers, experts), the share of a layer's image tokens that each expert got.
        text_shares: the same of text tokens.
        path: the PNG file to write.
        layers: names of the layers, by default their numbers from 0.

    Raises:
        ValueError: the two are not matrices of one shape.
    """
    panels = {"image tokens": image_shares, "text tokens": text_shares}
    names = range(len(np.asarray(image_shares))) if layers is None else layers
    return plot_shares(panels, path, row_names=names, row_label="sparse layer")


def plot_shares(
    panels: Mapping[str, ArrayLike],
    path: str | Path,
    *,
    row_names: Sequence[object],
    row_label: str = "",
    title: str = "Expert load",
) -> Path:
    """Draw heatmaps of rows x experts on one color scale, side by side if they are narrow.

    White is the fair share (1 / experts), blue less and red more. Large cells show numbers.

    Args:
        panels: title -> shares, (rows, experts) each.
        path: the PNG file to write.
        row_names: names of the rows; a number replaces one that no font can draw (`text.py`).
        row_label: the axis label of the rows.
        title: above all panels.

    Raises:
        ValueError: the shares are not matrices of one shape.
    """
    matrices = {name: np.asarray(shares, dtype=float) for name, shares in panels.items()}
    shapes = [matrix.shape for matrix in matrices.values()]
    if len(shapes[0]) != 2 or len(set(shapes)) > 1:
        raise ValueError(
            "Shares must be (rows, experts) matrices of one shape; got "
            f"{' and '.join(map(str, shapes))}."
        )
    rows, experts = shapes[0]
    fair, largest = 100 / experts, 100 * max(matrix.max() for matrix in matrices.values())
    with_numbers = experts <= 18 and rows <= 26
    figure, axes = _share_panels(len(matrices), rows, experts, with_numbers)
    from matplotlib.colors import TwoSlopeNorm

    norm = TwoSlopeNorm(vcenter=fair, vmin=0, vmax=max(largest, 2 * fair))
    labels = drawable([str(name) for name in row_names])
    for axis in axes.flatten()[len(matrices) :]:
        axis.set_axis_off()
    for axis, (name, matrix) in zip(axes.flatten(), matrices.items(), strict=False):
        mesh = axis.imshow(100 * matrix, cmap="RdBu_r", norm=norm, aspect="auto")
        xticks = range(0, experts, math.ceil(experts / 32))
        axis.set(title=name, xlabel="expert", xticks=xticks, yticks=range(rows))
        as_it_is(axis.set_yticklabels(labels))
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
        if with_numbers:
            _write_cells(axis, 100 * matrix, norm)
    for axis in axes[:, 0]:
        axis.set_ylabel(row_label)
    bar = figure.colorbar(mesh, ax=list(axes.flatten()), pad=0.02, fraction=0.05)
    bar.set_label("% of choices")
    bar.ax.axhline(fair, color="black", linewidth=1.2)
    figure.suptitle(f"{title}; the fair share is {fair:.3g}% (white)", fontsize=12)
    return save_figure(figure, path)


def plot_accuracies(accuracies: Mapping[str, float], path: str | Path, title: str = "") -> Path:
    """Draw a bar for each model: its share of right answers.

    Args:
        accuracies: by model, in 0..1.
        path: the PNG file to write.
        title: of the figure.
    """
    figure = new_figure(6.2, 0.5 * len(accuracies) + 1.2)
    axis = figure.subplots()
    percent = [100 * share for share in accuracies.values()]
    colors = [GRAY, *[BLUE] * (len(percent) - 1)]
    bars = axis.barh(range(len(percent)), percent, color=colors, height=0.6)
    axis.bar_label(bars, fmt="%.1f%%", padding=3)
    axis.set(xlim=(0, 112), xticks=range(0, 101, 20), xlabel="right answers, %", title=title)
    axis.set_yticks(range(len(percent)))
    as_it_is(axis.set_yticklabels(drawable(list(accuracies))))
    axis.invert_yaxis()
    axis.spines[["top", "right"]].set_visible(False)
    return save_figure(figure, path)


def _wrapped(text: str, width: int) -> str:
    """Wrap a text, keeping its own line breaks."""
    return "\n".join("\n".join(textwrap.wrap(line, width)) for line in text.splitlines())


def _share_panels(
    count: int, rows: int, experts: int, with_numbers: bool
) -> tuple["Figure", np.ndarray]:
    """Make a figure with `count` axes, or more, for matrices of (rows, experts)."""
    columns = min(count, 2 if experts <= MOST_EXPERTS_SIDE_BY_SIDE else 1)
    lines = -(-count // columns)
    width = min(max(3.6, 0.5 * experts), 9)
    height = min(max((0.42 if with_numbers else 0.25) * rows, 0.9) + 0.8, 14)
    figure = new_figure(columns * width + 1.5, lines * height + 0.5)
    return figure, figure.subplots(lines, columns, sharey=True, squeeze=False)


def _write_cells(axis: "Axes", percent: np.ndarray, norm: "Normalize") -> None:
    """Write each cell's percentage, white on dark colors."""
    for (layer, expert), value in np.ndenumerate(percent):
        dark = abs(norm(value) - 0.5) > 0.32
        axis.text(
            expert,
            layer,
            f"{value:.0f}",
            ha="center",
            va="center",
            fontsize=9,
            color="w" if dark else "k",
        )


def _series(log_history: Sequence[dict[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """Return steps and values of `key`; a step logged again after a resume has its later value."""
    values = {entry["step"]: entry[key] for entry in log_history if key in entry}
    return list(values), list(values.values())


def new_figure(width: float, height: float) -> "Figure":
    """Make a figure that draws to memory, whatever backend the environment names."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('Figures need matplotlib: pip install "vlmoe[train]"') from error
    figure = Figure(figsize=(width, height), dpi=DOTS_PER_INCH, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: "Figure", path: str | Path) -> Path:
    """Write a figure as PNG, atomically."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", facecolor="white")
    return Path(path)

# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Pictures of a run, as PNG files: answers on test images, training curves, expert load.

Every function takes plain data and a path, writes the file atomically and returns its path.
Matplotlib draws to memory (Agg), without a screen; it is imported when the first figure is drawn.

Colours: blue for images and training, orange for text and evaluation, green and red only for right
and wrong.
"""

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .atomic_files import atomic_path

BLUE, ORANGE, GREEN, RED, GREY = "#2a78d6", "#d9731a", "#1a7f37", "#c62828", "#6b6b6b"


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
    """A grid of images with question and answer; green for right, red with the truth beside it for
    wrong.

    Raises:
        ValueError: there are no answers to draw.
    """
    if not answers:
        raise ValueError("There are no answered questions to draw.")
    columns = min(columns, len(answers))
    rows = -(-len(answers) // columns)
    figure = _figure(2.7 * columns, 3.2 * rows + 0.6)
    figure.get_layout_engine().set(h_pad=0.12)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis in axes[len(answers) :]:
        axis.set_axis_off()
    for axis, item in zip(axes, answers, strict=False):
        axis.imshow(np.asarray(item.image.convert("RGB")), interpolation="nearest", aspect="equal")
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
        axis.set_title(_wrapped(item.question, 30), fontsize=9.5, pad=7)
        verdict = item.answer.strip() or "(nothing)"
        verdict = verdict if item.is_right else f"{verdict}\n(truth: {item.truth})"
        color = GREEN if item.is_right else RED
        axis.set_xlabel(_wrapped(verdict, 28), color=color, fontsize=10.5, fontweight="bold")
    right = sum(item.is_right for item in answers)
    figure.suptitle(title or f"{right} of these {len(answers)} answers are right", fontsize=13)
    return _save(figure, path)


def plot_training(
    log_history: Sequence[dict[str, Any]], path: str | Path, metric: str = "eval_exact_match"
) -> Path:
    """Loss by step, training and evaluation, and accuracy by step where the history holds `metric`.

    Args:
        log_history: `trainer.state.log_history`, entries with `step` and `loss`, `eval_loss` or
            `metric`.
        path: the PNG file to write.
        metric: the share of right answers to draw, in 0..1.

    Raises:
        ValueError: the history holds no loss at all.
    """
    training, evaluation = _series(log_history, "loss"), _series(log_history, "eval_loss")
    accuracy = _series(log_history, metric)
    if not training[0] and not evaluation[0]:
        raise ValueError("The log history holds neither `loss` nor `eval_loss`.")
    panels = 2 if accuracy[0] else 1
    figure = _figure(6.2 * panels, 4.2)
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
            title="Right answers on evaluation data",
            xlabel="optimizer step",
            ylabel="%",
            ylim=(0, 102),
        )
    for axis in axes:
        axis.grid(alpha=0.25, which="both", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    return _save(figure, path)


def plot_expert_load(image_shares: Any, text_shares: Any, path: str | Path) -> Path:
    """Heatmaps of layers x experts, image tokens beside text tokens, on one colour scale.

    White is the fair share (1 / experts), blue less and red more; cells that are large enough tell
    their percentage.

    Args:
        image_shares: (layers, experts), the share of a layer's image tokens that each expert got.
        text_shares: the same of text tokens.
        path: the PNG file to write.

    Raises:
        ValueError: the two are not matrices of one shape.
    """
    image, text = np.asarray(image_shares, dtype=float), np.asarray(text_shares, dtype=float)
    if image.ndim != 2 or image.shape != text.shape:
        raise ValueError(
            f"Shares must be two (layers, experts) matrices of one shape; got {image.shape} and "
            f"{text.shape}."
        )
    layers, experts = image.shape
    fair = 1 / experts
    width, height = min(max(3.4, 0.62 * experts), 11), min(max(2.6, 0.5 * layers + 1.9), 14)
    figure = _figure(2 * width + 1.6, height)
    from matplotlib.colors import TwoSlopeNorm

    norm = TwoSlopeNorm(
        vcenter=100 * fair, vmin=0, vmax=100 * max(image.max(), text.max(), 2 * fair)
    )
    axes = figure.subplots(1, 2, sharey=True)
    for axis, shares, name in zip(
        axes, (image, text), ("image tokens", "text tokens"), strict=True
    ):
        mesh = axis.imshow(100 * shares, cmap="RdBu_r", norm=norm, aspect="auto")
        every = math.ceil(experts / 32)
        axis.set(title=name, xlabel="expert", xticks=range(0, experts, every), yticks=range(layers))
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
        if experts <= 18 and layers <= 26:
            _write_cells(axis, 100 * shares, norm)
    axes[0].set_ylabel("sparse layer")
    bar = figure.colorbar(mesh, ax=list(axes), pad=0.02, fraction=0.05)
    bar.set_label("% of the layer's assignments")
    bar.ax.axhline(100 * fair, color="black", linewidth=1.2)
    figure.suptitle(f"Expert load; the fair share is {100 * fair:.3g}% (white)", fontsize=12)
    return _save(figure, path)


def _wrapped(text: str, width: int) -> str:
    """The text with line breaks, its own kept."""
    return "\n".join("\n".join(textwrap.wrap(line, width)) for line in text.splitlines())


def _write_cells(axis: Any, percent: np.ndarray, norm: Any) -> None:
    for (layer, expert), value in np.ndenumerate(percent):
        dark = abs(norm(value) - 0.5) > 0.32
        axis.text(
            expert,
            layer,
            f"{value:.0f}",
            ha="center",
            va="center",
            fontsize=8,
            color="w" if dark else "k",
        )


def _series(log_history: Sequence[dict[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """Steps and values of `key`; of a step that was logged twice (before and after a resume) the
    later value."""
    values = {entry["step"]: entry[key] for entry in log_history if key in entry}
    return list(values), list(values.values())


def _figure(width: float, height: float) -> Any:
    """A figure that draws to memory, whatever backend the environment names."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('Figures need matplotlib: pip install "vlmoe[train]"') from error
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Any, path: str | Path) -> Path:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", facecolor="white")
    return Path(path)

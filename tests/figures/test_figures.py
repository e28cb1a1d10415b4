"""Figures are PNG files that show what they were given."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlmoe.figures.plots import (
    AnsweredQuestion,
    _series,
    plot_accuracies,
    plot_answers,
    plot_expert_load,
    plot_training,
)


def colours(path: Path) -> set[tuple[int, ...]]:
    with Image.open(path) as image:
        assert image.format == "PNG" and min(image.size) > 200
        return {tuple(pixel) for pixel in np.asarray(image.convert("RGB")).reshape(-1, 3)}


GREEN, RED = (0x1A, 0x7F, 0x37), (0xC6, 0x28, 0x28)


@pytest.mark.parametrize(
    ("answers", "drawn", "not_drawn"),
    [
        ([" Blue"], {GREEN}, {RED}),
        (["red", ""], {RED}, {GREEN}),
        (["blue", "x"], {GREEN, RED}, set()),
    ],
)
def test_right_answers_are_green_and_wrong_ones_red(
    answers: list[str],
    drawn: set[tuple[int, ...]],
    not_drawn: set[tuple[int, ...]],
    tmp_path: Path,
) -> None:
    grey = Image.new("L", (20, 30), 128)
    items = [AnsweredQuestion(grey, "what color is it?", answer, "blue") for answer in answers]
    found = colours(plot_answers(items, tmp_path / "answers.png"))
    assert drawn <= found and not not_drawn & found
    assert (128, 128, 128) in found
    assert os.listdir(tmp_path) == ["answers.png"]


def test_curves_are_drawn_with_and_without_accuracy(tmp_path: Path) -> None:
    log = [{"step": step, "loss": 3.0 / step} for step in range(1, 9)]
    alone = plot_training(log, tmp_path / "loss.png")
    log += [{"step": 4, "eval_loss": 1.0, "eval_exact_match": 0.5}]
    both = plot_training([*log, {"step": 8, "train_loss": 0.1}], tmp_path / "curves.png")
    blue, orange = (0x2A, 0x78, 0xD6), (0xD9, 0x73, 0x1A)
    assert blue in colours(alone) and orange not in colours(alone)
    assert {blue, orange} <= colours(both)
    with Image.open(alone) as narrow, Image.open(both) as wide:
        assert wide.size[0] == 2 * narrow.size[0]


def test_a_bar_is_as_long_as_the_share_of_right_answers(tmp_path: Path) -> None:
    path = plot_accuracies({"dense": 0.25, "16 experts": 0.75}, tmp_path / "capacity.png")
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"))
    gray, blue = ((pixels == color).all(-1).sum() for color in ((0x6B,) * 3, (0x2A, 0x78, 0xD6)))
    assert blue / gray == pytest.approx(3, rel=0.05)


def test_a_loss_that_reaches_zero_can_be_drawn(tmp_path: Path) -> None:
    plot_training([{"step": 1, "loss": 0.0}, {"step": 2, "loss": -0.1}], tmp_path / "a.png")


def test_of_a_step_logged_twice_the_later_value_counts() -> None:
    log = [{"step": 1, "loss": 9.0}, {"step": 2, "loss": 8.0}, {"step": 2, "loss": 7.0}]
    assert _series(log, "loss") == ([1, 2], [9.0, 7.0])


@pytest.mark.parametrize("shape", [(1, 4), (2, 8), (24, 64)])
def test_expert_load_is_drawn_from_even_to_collapsed(
    shape: tuple[int, int], tmp_path: Path
) -> None:
    even = np.full(shape, 1 / shape[1])
    collapsed = np.zeros(shape)
    collapsed[:, 0] = 1.0
    path = plot_expert_load(even, collapsed.tolist(), tmp_path / "load.png")
    assert (255, 255, 255) in colours(path)


def test_data_that_cannot_be_drawn_are_refused_and_nothing_is_written(tmp_path: Path) -> None:
    calls: list[tuple[Callable[[], Path], str]] = [
        (lambda: plot_answers([], tmp_path / "a.png"), "no answered questions"),
        (lambda: plot_training([{"step": 1}], tmp_path / "a.png"), "neither `loss` nor"),
        (lambda: plot_expert_load([[1.0]], [[0.5, 0.5]], tmp_path / "a.png"), "of one shape"),
    ]
    for call, message in calls:
        with pytest.raises(ValueError, match=message):
            call()
    assert os.listdir(tmp_path) == []

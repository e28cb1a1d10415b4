"""Text from outside in figures: drawn as it is, or a number in its place; never empty boxes."""

import logging
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlmoe.figures import text as figure_text
from vlmoe.figures.plots import AnsweredQuestion, new_figure, plot_answers, plot_shares
from vlmoe.figures.text import as_it_is, drawable, font_families

LATEX = ["$\\frac{1}{$", "a $ b $ c", "100 $", "x_{", "\\alpha", "^{^", "50 %"]
SCRIPTS = ["形状", "かたち", "모양", "شكل", "צורה", "आकार", "🙂 shape", "👩‍👩‍👧", "\ue000", "größe"]


@pytest.fixture(autouse=True)
def missing_glyphs_are_errors() -> object:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Glyph .* missing")
        yield


@pytest.mark.parametrize("texts", [LATEX, SCRIPTS])
def test_labels_of_any_script_and_with_latex_are_drawn(texts: list[str], tmp_path: Path) -> None:
    shares = np.full((len(texts), 4), 0.25)
    path = plot_shares({"layer 0": shares}, tmp_path / "a.png", row_names=texts)
    image = Image.new("RGB", (8, 8))
    answers = [AnsweredQuestion(image, text, text, f"{text} not") for text in texts]
    for drawn in (path, plot_answers(answers, tmp_path / "b.png")):
        assert drawn.read_bytes().startswith(b"\x89PNG")


def test_a_number_replaces_a_text_that_no_font_has_and_the_log_names_it_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    texts = ["color", "\ue000", "größe", "a\ue001b"]
    with caplog.at_level(logging.WARNING, logger="vlmoe.figures.text"):
        for _ in range(2):
            assert drawable(texts) == ["color", "[2]", "größe", "[4]"]
    (record,) = caplog.records
    assert "[2] '\\ue000'" in record.message and "[4]" in record.message


def test_an_installed_font_is_used_for_what_the_default_lacks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from matplotlib import font_manager

    other = font_manager.FontEntry(
        fname=font_manager.findfont("STIXGeneral"), name=figure_text.FONTS[0]
    )
    monkeypatch.setattr(
        font_manager.fontManager, "ttflist", [*font_manager.fontManager.ttflist, other]
    )
    font_families.cache_clear()
    try:
        assert font_families()[1] == other.name
    finally:
        font_families.cache_clear()


def test_only_outside_text_is_freed_of_formulas() -> None:
    figure = new_figure(2, 2)
    axis = figure.subplots()
    title, label = axis.set_title("$x"), axis.set_xlabel("$10^2$")
    as_it_is(title)
    assert not title.get_parse_math() and label.get_parse_math()

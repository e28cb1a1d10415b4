# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Text from outside in figures: question types, questions, answers.

Such text is drawn as it is: a dollar sign starts no formula. After matplotlib's own font, those of
`FONTS` that are installed are tried; matplotlib itself shapes and orders Arabic or Hebrew letters.
A character that no font has would be an empty box: a number, `[1]`, replaces a text with such a
character, and the log names the text once per process.
"""

import functools
import logging
import unicodedata
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.text import Text

logger = logging.getLogger(__name__)

FONTS = (
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "Source Han Sans SC",
    "Noto Sans SC",
    "WenQuanYi Micro Hei",
    "WenQuanYi Zen Hei",
    "Droid Sans Fallback",
    "NanumGothic",
    "PingFang SC",
    "Hiragino Sans",
    "Apple SD Gothic Neo",
    "Arial Unicode MS",
    "Microsoft YaHei",
    "Yu Gothic",
    "Malgun Gothic",
    "Segoe UI",
    "Segoe UI Emoji",
    "Noto Sans",
    "Noto Sans Arabic",
    "Noto Sans Hebrew",
    "Noto Sans Devanagari",
    "Noto Sans Thai",
    "Noto Emoji",
    "Symbola",
    "FreeSans",
    "Unifont",
)
"""Fonts of Linux, macOS and Windows for scripts that matplotlib's own font lacks."""

_UNSEEN = {"Cc", "Cf", "Mn", "Zs"}  # categories of characters that need no glyph of their own


def drawable(texts: Sequence[str]) -> list[str]:
    """Return the texts, with a number in place of each that no installed font can draw.

    The same texts give the same numbers, so that a page can explain those of its figures.
    """
    shown = [text if _has_glyphs(text) else f"[{i}]" for i, text in enumerate(texts, start=1)]
    missing = [
        f"{label} {text!r}" for label, text in zip(shown, texts, strict=True) if label != text
    ]
    if missing:
        _warn_of(", ".join(missing))
    return shown


@functools.cache  # several figures show the same texts
def _warn_of(missing: str) -> None:
    logger.warning(
        "No installed font can draw %s. The figure shows the numbers; for the text install a font "
        "such as Noto Sans CJK or Noto Emoji.",
        missing,
    )


def as_it_is(artists: "Text | Sequence[Text]") -> None:
    """Draw a text of matplotlib, or several, without formulas and in the fonts that fit."""
    for artist in artists if isinstance(artists, Sequence) else [artists]:
        artist.set_parse_math(False)
        artist.set_fontfamily(list(font_families()))


@functools.cache
def font_families() -> tuple[str, ...]:
    """Return matplotlib's default font and those of `FONTS` that are installed."""
    from matplotlib import font_manager, rcParams

    installed = {font.name for font in font_manager.fontManager.ttflist}
    default = font_manager.FontProperties(family=rcParams["font.family"]).get_name()
    return (default, *(name for name in FONTS if name in installed and name != default))


@functools.cache
def _character_maps() -> tuple[Mapping[int, int], ...]:
    """Return the glyph of each character, for each font that is tried."""
    from matplotlib import font_manager

    paths = [font_manager.findfont(name) for name in font_families()]
    return tuple(font_manager.get_font(path).get_charmap() for path in paths)


def _has_glyphs(text: str) -> bool:
    return all(
        unicodedata.category(character) in _UNSEEN
        or any(ord(character) in glyphs for glyphs in _character_maps())
        for character in text
    )

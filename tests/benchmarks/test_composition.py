"""The compositional task: its answers are read from the pixels again, by other code."""

import io
import re
from collections import Counter, defaultdict
from itertools import product

import numpy as np
import pytest
from composition import composition_rows
from datasets import Dataset
from PIL import Image

IMAGES = {"train": 400, "test": 100}
COLORS = {(220, 40, 40): "red", (40, 160, 60): "green", (40, 80, 220): "blue"}
COLORS[240, 200, 40] = "yellow"
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "middle", "right")
NUMBERS = ("zero", "one", "two", "three")
Seen = dict[str, dict]  # by colour and shape


@pytest.fixture(scope="module")
def splits() -> dict[str, Dataset]:
    return composition_rows(IMAGES, seed=1)


def pixels(row: dict) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(row["images"][0]["bytes"])).convert("RGB"))


def things(image: np.ndarray) -> Seen:
    """What is in a picture: per cell the one colour, the shape by how it fills its box."""
    assert image.shape == (48, 48, 3)
    found = {}
    for row, column in product(range(3), range(3)):
        cell = image[16 * row : 16 * row + 16, 16 * column : 16 * column + 16]
        inked = (cell != 255).any(-1)
        if not inked.any():
            continue
        [color] = {tuple(map(int, pixel)) for pixel in cell[inked]}
        down, across = np.flatnonzero(inked.any(1)), np.flatnonzero(inked.any(0))
        box = inked[down[0] : down[-1] + 1, across[0] : across[-1] + 1]
        first = box[0].mean()  # of a triangle the top row is a tip
        shape = "square" if box.all() else "triangle" if first < 0.25 else "circle"
        size = "small" if box.shape[1] < 10 else "big"
        name = f"{COLORS[color]} {shape}"
        assert name not in found, "two alike"
        found[name] = {"color": COLORS[color], "shape": shape, "size": size}
        found[name] |= {"row": row, "column": column}
    return found


def answer(question: str, seen: Seen) -> str:
    """The answer to a question, by its words."""
    all_things = list(seen.values())
    words = question.removesuffix("?").split()

    def number(word: str) -> int:
        stem = word.removesuffix("s")
        return sum(stem in (thing["color"], thing["shape"]) for thing in all_things)

    if words[:2] == ["how", "many"]:
        return NUMBERS[number(words[2])]
    if match := re.fullmatch(r"which (row|column) is the (\w+ \w+) in\?", question):
        return (ROWS if match[1] == "row" else COLUMNS)[seen[match[2]][match[1]]]
    if match := re.fullmatch(r"what size is the (\w+ \w+)\?", question):
        return seen[match[1]]["size"]
    if match := re.fullmatch(r"what (\w+) is the thing at the (\w+) (\w+)\?", question):
        place = ROWS.index(match[2]), COLUMNS.index(match[3])
        [thing] = [each for each in all_things if (each["row"], each["column"]) == place]
        return thing[match[1]]
    if match := re.fullmatch(r"what (\w+) is the (\w+) thing\?", question):
        axis = "column" if match[2] in ("leftmost", "rightmost") else "row"
        end = min if match[2] in ("leftmost", "highest") else max
        best = end(thing[axis] for thing in all_things)
        [thing] = [each for each in all_things if each[axis] == best]
        return thing[match[1]]
    if match := re.fullmatch(
        r"are there more (\w+)(?: shapes)? than (\w+)(?: shapes)?\?", question
    ):
        return "yes" if number(match[1]) > number(match[2]) else "no"
    match = re.fullmatch(r"is the (\w+ \w+) ([\w ]+) the (\w+ \w+)\?", question)
    assert match, question
    one, other = seen[match[1]], seen[match[3]]
    big = one["size"] == "big", other["size"] == "big"
    holds = {
        "left of": one["column"] < other["column"],
        "right of": one["column"] > other["column"],
        "above": one["row"] < other["row"],
        "below": one["row"] > other["row"],
        "bigger than": big == (True, False),
        "smaller than": big == (False, True),
    }
    return "yes" if holds[match[2]] else "no"


def one_described(request: str, seen: Seen) -> str:
    """One thing, by its place or by its name."""
    words = request.removeprefix("describe the ").removesuffix(".")
    for name, thing in seen.items():
        place = f"{ROWS[thing['row']]} {COLUMNS[thing['column']]}"
        if words in (place, name):
            return f"{thing['size']} {name if words == place else place}"
    raise AssertionError(request)


def asked(rows: Dataset) -> list[tuple[str, str, str]]:
    """(question, answer, kind) of all rows."""
    return [
        (user["content"][1]["text"], assistant["content"][0]["text"], kind)
        for row in rows
        for (user, assistant), kind in zip(row["messages"], row["question_type"], strict=True)
    ]


def test_every_answer_is_what_the_pixels_say(splits: dict[str, Dataset]) -> None:
    for split in ("train", "test"):
        checked = Counter()
        for row in splits[split]:
            seen = things(pixels(row))
            assert 3 <= len(seen) <= 6
            for question, given, kind in asked([row]):
                if kind == "description":
                    assert split == "train"
                    assert given == one_described(question, seen), (row["id"], question)
                    continue
                assert given == answer(question, seen), (row["id"], question)
                assert " " not in given
                checked[kind] += 1
        kinds = {"place", "find", "count", "position", "size", "more", "extreme"}
        assert set(checked) == kinds and min(checked.values()) > 20


def test_descriptions_say_what_the_pixels_show(splits: dict[str, Dataset]) -> None:
    assert splits["descriptions"]["id"] == [f"composition/descriptions/{i}" for i in range(400)]
    for row in splits["descriptions"]:
        [(_, given, _)] = asked([row])
        order = sorted(things(pixels(row)).values(), key=lambda each: (each["row"], each["column"]))
        told = (
            f"{ROWS[t['row']]} {COLUMNS[t['column']]} {t['size']} {t['color']} {t['shape']}"
            for t in order
        )
        assert given == ", ".join(told)


def test_no_picture_is_in_both_splits_nor_twice_in_one(splits: dict[str, Dataset]) -> None:
    pictures = [pixels(row).tobytes() for name in ("descriptions", "test") for row in splits[name]]
    assert len(pictures) == sum(IMAGES.values()) == len(set(pictures))
    described = {row["images"][0]["bytes"] for row in splits["descriptions"]}
    assert {row["images"][0]["bytes"] for row in splits["train"]} <= described


def test_the_question_does_not_tell_the_answer(splits: dict[str, Dataset]) -> None:
    templates: dict[str, Counter] = defaultdict(Counter)
    for question, given, kind in asked(splits["train"]):
        if kind == "description":
            continue
        names = r"the (red|green|blue|yellow) (circle|square|triangle)"
        templates[re.sub(names, "it", question)][given] += 1
    for template, answers in templates.items():
        assert len(answers) > 1, template
        assert len(set(answers.values())) == 1, template
    total = sum(map(Counter.total, templates.values()))
    majority = sum(max(answers.values()) for answers in templates.values()) / total
    assert majority < 0.5


def test_the_exact_words_of_training_questions_do_not_tell_test_answers(
    splits: dict[str, Dataset],
) -> None:
    known: dict[str, Counter] = defaultdict(Counter)
    for question, given, _ in asked(splits["train"]):
        known[question][given] += 1
    test = asked(splits["test"])
    hits = sum(known[q].most_common(1)[0][0] == given for q, given, _ in test if known[q])
    assert hits / len(test) < 0.55


def test_the_same_arguments_give_the_same_bytes(splits: dict[str, Dataset]) -> None:
    again = composition_rows(IMAGES, seed=1)
    assert {name: rows.to_list() for name, rows in again.items()} == {
        name: rows.to_list() for name, rows in splits.items()
    }
    other = composition_rows({"train": 50}, seed=2)["train"]
    assert other[0]["images"] != splits["train"][0]["images"]


def test_too_few_pictures_are_refused() -> None:
    with pytest.raises(ValueError, match="allowed: 50 or more"):
        composition_rows({"train": 50, "test": 49})

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
HOLDS = {
    "left of": lambda one, other: one["column"] < other["column"],
    "right of": lambda one, other: one["column"] > other["column"],
    "above": lambda one, other: one["row"] < other["row"],
    "below": lambda one, other: one["row"] > other["row"],
}
ENDS = {"leftmost": "left of", "rightmost": "right of", "highest": "above", "lowest": "below"}
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


def such(words: str, among: list[dict]) -> list[dict]:
    """Those that "big red shapes" or "circles" mean."""
    features = [word.removesuffix("s") for word in words.split()]
    features = [word for word in features if word != "shape"]
    return [each for each in among if all(word in each.values() for word in features)]


def answer(question: str, seen: Seen) -> str:
    """The answer to a question, by its words."""
    all_things = list(seen.values())
    if match := re.fullmatch(r"which (row|column) is the (\w+ \w+) in\?", question):
        return (ROWS if match[1] == "row" else COLUMNS)[seen[match[2]][match[1]]]
    if match := re.fullmatch(r"what (\w+) is the shape at the (\w+) (\w+)\?", question):
        place = ROWS.index(match[2]), COLUMNS.index(match[3])
        [thing] = [each for each in all_things if (each["row"], each["column"]) == place]
        return thing[match[1]]
    if match := re.fullmatch(rf"what size is the ({'|'.join(seen)})\?", question):
        return seen[match[1]]["size"]
    if match := re.fullmatch(r"how many ([\w ]+) are there\?", question):
        return NUMBERS[len(such(match[1], all_things))]
    sides = "left of|right of|above|below"
    if match := re.fullmatch(rf"how many ([\w ]+) are ({sides}) the (\w+ \w+)\?", question):
        there = [each for each in all_things if HOLDS[match[2]](each, seen[match[3]])]
        return NUMBERS[len(such(match[1], there))]
    if match := re.fullmatch(
        rf"what (\w+) is the shape directly ({sides}) the (\w+ \w+)\?", question
    ):
        thing = seen[match[3]]
        [beside] = [
            each
            for each in all_things
            if HOLDS[match[2]](each, thing)
            and abs(each["row"] - thing["row"]) + abs(each["column"] - thing["column"]) == 1
        ]
        return beside[match[1]]
    if match := re.fullmatch(r"are there more ([\w ]+) than ([\w ]+)\?", question):
        one, other = (len(such(words, all_things)) for words in match.groups())
        assert one != other
        return "yes" if one > other else "no"
    if match := re.fullmatch(r"what (\w+) is the (\w+) ([\w ]+)\?", question):
        among = such(match[3], all_things)
        assert len(among) > 1
        [thing] = [
            each
            for each in among
            if sum(HOLDS[ENDS[match[2]]](each, other) for other in among) == len(among) - 1
        ]
        return thing[match[1]]
    match = re.fullmatch(rf"is the (\w+ \w+) ({sides}) the (\w+ \w+)\?", question)
    assert match, question
    return "yes" if HOLDS[match[2]](seen[match[1]], seen[match[3]]) else "no"


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
            assert 2 <= len(seen) <= 6
            for question, given, kind in asked([row]):
                if kind == "description":
                    assert split == "train"
                    assert given == one_described(question, seen), (row["id"], question)
                    continue
                assert given == answer(question, seen), (row["id"], question)
                assert " " not in given
                checked[kind] += 1
        kinds = {"count", "side", "beside", "more", "extreme", "position"}
        kinds |= {"place", "find"} if split == "train" else set()
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
        if kind != "description":
            templates[template(question, kind)][given] += 1
    for words, answers in templates.items():
        assert len(answers) > 1, words
        assert len(set(answers.values())) == 1, words
    total = sum(map(Counter.total, templates.values()))
    majority = sum(max(answers.values()) for answers in templates.values()) / total
    assert majority < 0.45


def template(question: str, kind: str) -> str:
    """The question without the words that tell nothing."""
    if kind == "beside":  # the next one has another colour than this one more often than not
        asked_for = question.split()[1]
        names = {"color": r"\1", "shape": r"\2", "size": "it"}[asked_for]
        return re.sub(r"(\w+) (\w+)\?", names, question)
    if kind == "extreme":
        return " ".join(question.split()[:5])
    if kind == "side":  # "how many circles are left of the red circle": one less, it is one itself
        words = question.removesuffix("?").replace("s ", " ").split()
        assert len(words) == len(set(words)), question
    names = r"the (red|green|blue|yellow) (circle|square|triangle)"
    words = re.sub(names, "it", question)
    if kind in ("side", "more"):  # colours are alike, and so are shapes
        words = re.sub("(red|green|blue|yellow) shapes", "colors", words)
        words = re.sub("(circles|squares|triangles)", "forms", words)
        words = re.sub("(big|small) shapes", "sizes", words)
    return words


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

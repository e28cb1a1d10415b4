# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""A compositional task: pictures of three to six shapes, questions with answers of one word.

    python benchmarks/composition.py --output_dir outputs/composition --train 8000 --test 600

The folder holds `train` and `test`, which `vlmoe train --dataset outputs/composition` reads.

- A picture is 48 x 48 pixels, white, with a grid of 3 x 3 cells. A shape stands alone in its cell,
  a pixel off the middle at most. It is a circle, square or triangle, of four colours, big or small;
  no two shapes of a picture have the same colour and shape, so that "the red circle" is one.
- Types of questions: `place` ("what color is the thing at the top left?"), `find` ("which row is
  the red circle in?"), `count` ("how many red shapes are there?"), `position` (left of, right of,
  above, below), `size` (bigger than, smaller than), `more` ("are there more circles than
  squares?"), `extreme` ("what color is the leftmost thing?").
- Within each template every answer is equally frequent, so that the question alone does not help.
  A template is a question with "the red circle" and its like left out: those are as likely in each
  place of a question, whatever the answer.
- Training rows describe some things, too ("describe the top left.", "small red circle").
- No picture is in both splits, nor twice in one. The same arguments give the same bytes.
"""

import argparse
import io
import random
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw

if TYPE_CHECKING:
    from datasets import Dataset

COLORS = {"red": (220, 40, 40), "green": (40, 160, 60), "blue": (40, 80, 220)}
COLORS["yellow"] = (240, 200, 40)
SHAPES = ("circle", "square", "triangle")
HALF = {"small": 3, "big": 6}  # half of the width, in pixels
CELLS, CELL = 3, 16
BACKGROUND = (255, 255, 255)
NUMBERS = ("zero", "one", "two", "three")
OBJECTS = (3, 6)
DESCRIPTION = "describe the picture."
DESCRIBED = 2
"""Things of each training picture that are described one by one."""

PLACES = {"column": ("left", "middle", "right"), "row": ("top", "middle", "bottom")}
PER_TYPE = {"place": 3, "find": 2, "position": 2, "size": 1, "more": 1, "extreme": 1}
"""Questions drawn from each picture, before the balancing; of `count` all."""


@dataclass(frozen=True)
class Thing:
    """A shape in a picture: cell (column and row from the top left) and offset in pixels."""

    color: str
    shape: str
    size: str
    column: int
    row: int
    shift: tuple[int, int]

    @property
    def name(self) -> str:
        """What questions call it."""
        return f"{self.color} {self.shape}"

    @property
    def place(self) -> str:
        """What questions call its cell."""
        return f"{PLACES['row'][self.row]} {PLACES['column'][self.column]}"


Scene = tuple[Thing, ...]


@dataclass(frozen=True)
class Question:
    """A question about a scene, and the group of questions within which answers are balanced."""

    kind: str
    template: str
    text: str
    answer: str


def draw_scene(rng: random.Random) -> Scene:
    """A random scene, its things in reading order."""
    number = rng.randint(*OBJECTS)
    names = rng.sample([(color, shape) for color in COLORS for shape in SHAPES], number)
    cells = sorted(rng.sample(range(CELLS * CELLS), number))
    return tuple(
        Thing(
            *name,
            size=rng.choice(list(HALF)),
            column=cell % CELLS,
            row=cell // CELLS,
            shift=(rng.randint(-1, 1), rng.randint(-1, 1)),
        )
        for name, cell in zip(names, cells, strict=True)
    )


def picture(scene: Scene) -> bytes:
    """The PNG of a scene, without anti-aliasing."""
    image = Image.new("RGB", (CELLS * CELL, CELLS * CELL), BACKGROUND)
    draw = ImageDraw.Draw(image)
    for thing in scene:
        half, color = HALF[thing.size], COLORS[thing.color]
        x = thing.column * CELL + CELL // 2 + thing.shift[0]
        y = thing.row * CELL + CELL // 2 + thing.shift[1]
        box = (x - half, y - half, x + half, y + half)
        if thing.shape == "circle":
            draw.ellipse(box, fill=color)
        elif thing.shape == "square":
            draw.rectangle(box, fill=color)
        else:
            draw.polygon([(x - half, y + half), (x + half, y + half), (x, y - half)], fill=color)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def description(scene: Scene) -> str:
    """Place, size, colour and shape of each thing, in reading order."""
    return ", ".join(f"{thing.place} {thing.size} {thing.name}" for thing in scene)


def single_descriptions(scene: Scene, rng: random.Random) -> Iterator[Question]:
    """Some things described, by their place and by their name."""
    for thing in rng.sample(scene, DESCRIBED):
        by_place = f"describe the {thing.place}."
        yield Question("description", by_place, by_place, f"{thing.size} {thing.name}")
        by_name = f"describe the {thing.name}."
        yield Question("description", by_name, by_name, f"{thing.size} {thing.place}")


def candidates(scene: Scene, rng: random.Random) -> Iterator[Question]:
    """Questions about a scene, before the balancing."""
    yield from _counts(scene)
    pairs = list(combinations(scene, 2))
    drawn = {
        "place": [q for thing in scene for q in _places(thing)],
        "find": [q for thing in scene for q in _finds(thing)],
        "position": [q for pair in pairs for q in _positions(*pair)],
        "size": [q for pair in pairs for q in _sizes(*pair)],
        "more": list(_mores(scene)),
        "extreme": list(_extremes(scene)),
    }
    for kind, questions in drawn.items():
        yield from rng.sample(questions, min(PER_TYPE[kind], len(questions)))


def _counts(scene: Scene) -> Iterator[Question]:
    for word, number in _totals(scene).items():
        what = f"{word}s" if word in SHAPES else f"{word} shapes"
        text = f"how many {what} are there?"
        if number < len(NUMBERS):
            yield Question("count", text, text, NUMBERS[number])


def _totals(scene: Scene) -> dict[str, int]:
    """How many things there are of each colour and shape."""
    words = (*COLORS, *SHAPES)
    return {word: sum(word in (t.color, t.shape) for t in scene) for word in words}


def _places(thing: Thing) -> Iterator[Question]:
    for asked in ("color", "shape", "size"):
        text = f"what {asked} is the thing at the {thing.place}?"
        yield Question("place", text, text, getattr(thing, asked))


def _finds(thing: Thing) -> Iterator[Question]:
    yield Question("find", "what size", f"what size is the {thing.name}?", thing.size)
    for axis, words in PLACES.items():
        text = f"which {axis} is the {thing.name} in?"
        yield Question("find", f"which {axis}", text, words[getattr(thing, axis)])


def _positions(first: Thing, second: Thing) -> Iterator[Question]:
    for words, axis in ((("left of", "right of"), "column"), (("above", "below"), "row")):
        places = getattr(first, axis), getattr(second, axis)
        if places[0] != places[1]:
            yield from _yes_no("position", words, (first, second), places)


def _sizes(first: Thing, second: Thing) -> Iterator[Question]:
    sizes = HALF[first.size], HALF[second.size]
    if sizes[0] != sizes[1]:
        words = ("smaller than", "bigger than")
        yield from _yes_no("size", words, (first, second), sizes)


def _yes_no(
    kind: str, words: tuple[str, str], things: tuple[Thing, Thing], values: tuple[int, int]
) -> Iterator[Question]:
    """Each word of less and more about two things in both orders."""
    for a, b in ((0, 1), (1, 0)):
        for word, holds in zip(words, (values[a] < values[b], values[a] > values[b]), strict=True):
            text = f"is the {things[a].name} {word} the {things[b].name}?"
            yield Question(kind, word, text, "yes" if holds else "no")


def _mores(scene: Scene) -> Iterator[Question]:
    totals = _totals(scene)
    for group in (tuple(COLORS), SHAPES):
        for a, b in combinations(group, 2):
            for one, other in ((a, b), (b, a)):
                if totals[one] != totals[other]:
                    name = "{}s" if group is SHAPES else "{} shapes"
                    text = f"are there more {name.format(one)} than {name.format(other)}?"
                    answer = "yes" if totals[one] > totals[other] else "no"
                    yield Question("more", text, text, answer)


def _extremes(scene: Scene) -> Iterator[Question]:
    for word, axis, sign in (
        *(("leftmost", "column", 1), ("rightmost", "column", -1)),
        *(("highest", "row", 1), ("lowest", "row", -1)),
    ):
        places = [sign * getattr(thing, axis) for thing in scene]
        if places.count(min(places)) == 1:
            thing = scene[places.index(min(places))]
            for asked, answer in (("color", thing.color), ("shape", thing.shape)):
                text = f"what {asked} is the {word} thing?"
                yield Question("extreme", text, text, answer)


def balanced(asked: list[tuple[int, Question]], rng: random.Random) -> dict[int, list[Question]]:
    """Of (picture, question) those that are kept, by picture: as many of each answer of a template
    as there are of its rarest one."""
    groups: dict[str, dict[str, list[tuple[int, Question]]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for number, question in asked:
        groups[question.template][question.answer].append((number, question))
    kept: dict[int, list[Question]] = defaultdict(list)
    for answers in groups.values():
        fewest = min(map(len, answers.values()))
        for each in answers.values():
            for number, question in rng.sample(each, fewest):
                kept[number].append(question)
    return kept


def composition_rows(images: Mapping[str, int], seed: int = 0) -> dict[str, "Dataset"]:
    """The splits as conversational rows, one per picture, as easy-VQA's.

    Args:
        images: how many pictures each split has. `descriptions` are those of `train`, with
            `DESCRIPTION` as the one question, to teach a vision tower to see.
        seed: of everything.

    Raises:
        ValueError: fewer than 50 pictures: some answer would not come up.
    """
    if min(images.values()) < 50:
        raise ValueError(f"`images` is {dict(images)}; allowed: 50 or more of every split.")
    seen: set[Scene] = set()
    splits: dict[str, Dataset] = {}
    for split, number in images.items():
        rng = random.Random(f"{seed} {split}")
        scenes: list[Scene] = []
        while len(scenes) < number:
            scene = draw_scene(rng)
            if scene not in seen:
                seen.add(scene)
                scenes.append(scene)
        asked = [(i, each) for i, scene in enumerate(scenes) for each in candidates(scene, rng)]
        kept = balanced(asked, rng)
        if split == "train":
            for i, scene in enumerate(scenes):
                kept[i] += single_descriptions(scene, rng)
        splits[split] = _dataset(split, scenes, kept)
        if split == "train":
            described = {
                i: [Question("description", "", DESCRIPTION, description(scene))]
                for i, scene in enumerate(scenes)
            }
            splits["descriptions"] = _dataset("descriptions", scenes, described)
    return splits


def _dataset(split: str, scenes: list[Scene], asked: Mapping[int, list[Question]]) -> "Dataset":
    from vlmoe.training.easy_vqa import conversation, dataset

    return dataset(
        [
            {
                "id": f"composition/{split}/{number}",
                "messages": [conversation(q.text, q.answer) for q in asked[number]],
                "images": [{"bytes": picture(scene), "path": f"{number}.png"}],
                "question_type": [q.kind for q in asked[number]],
            }
            for number, scene in enumerate(scenes)
            if asked.get(number)
        ]
    )


def main() -> None:
    """Write the data set."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--train", type=int, default=8000, help="pictures")
    parser.add_argument("--test", type=int, default=600, help="pictures")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/composition"))
    options = parser.parse_args()
    from datasets import DatasetDict

    splits = composition_rows({"train": options.train, "test": options.test}, options.seed)
    DatasetDict(splits).save_to_disk(options.output_dir)


if __name__ == "__main__":
    main()

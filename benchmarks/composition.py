# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""A compositional task: pictures of two to six shapes, questions with answers of one word.

    python benchmarks/composition.py --output_dir outputs/composition --train 12000 --test 600

The folder holds `train` and `test`, which `vlmoe train --dataset outputs/composition` reads.

- A picture is 48 x 48 pixels, white, with a grid of 3 x 3 cells. A shape stands alone in its cell,
  a pixel off the middle at most. It is a circle, square or triangle, of four colours, big or small;
  no two shapes of a picture have the same colour and shape, so that "the red circle" is one.
- Types of questions: `place` ("what size is the shape at the top left?"), `find` ("which row is
  the red circle in?"), `count` ("how many red shapes are there?"), `side` ("how many circles are
  left of the red square?"), `beside` ("what color is the shape directly above the red circle?"),
  `more` ("are there more red shapes than circles?"), `extreme` ("what size is the leftmost
  circle?"), `position` ("is the red circle left of the blue square?"). The test does without the
  first two, which are about one shape.
- Within each template every answer is equally frequent, so that the question alone does not help.
  A template is a question without what tells nothing of its answer, such as the name in `position`.
- Training rows describe some things, too ("describe the top left.", "small red circle").
- No picture is in both splits, nor twice in one. The same arguments give the same bytes.
"""

import argparse
import io
import random
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import permutations
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
OBJECTS = (2, 6)
DESCRIPTION = "describe the picture."
DESCRIBED = 2
"""Things of each training picture that are described one by one."""

PLACES = {"column": ("left", "middle", "right"), "row": ("top", "middle", "bottom")}
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
"""Where things lie that have this relation to another: columns to the right, rows down."""
EXTREMES = {"leftmost": "left of", "rightmost": "right of", "highest": "above", "lowest": "below"}
PER_TYPE = {"place": 3, "find": 2, "count": 2, "side": 2, "beside": 2, "more": 1, "extreme": 1}
PER_TYPE |= {"position": 1}
"""Questions drawn from each picture, before the balancing."""
EASY = ("place", "find")
"""About one shape: not asked in the test. Without them, and without pictures of few shapes, a tiny
model takes many times as long to learn to find a shape."""


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
    """Draw a random scene, its things in reading order."""
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
    """Encode a scene as PNG, without anti-aliasing."""
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
    """Describe some things, by their place and by their name."""
    for thing in rng.sample(scene, DESCRIBED):
        by_place = f"describe the {thing.place}."
        yield Question("description", by_place, by_place, f"{thing.size} {thing.name}")
        by_name = f"describe the {thing.name}."
        yield Question("description", by_name, by_name, f"{thing.size} {thing.place}")


def candidates(scene: Scene, rng: random.Random) -> Iterator[Question]:
    """Questions about a scene, before the balancing."""
    pairs = list(permutations(scene, 2))
    drawn = {
        "place": [q for thing in scene for q in _places(thing)],
        "find": [q for thing in scene for q in _finds(thing)],
        "count": list(_counts(scene)),
        "side": [q for thing in scene for q in _sides(thing, scene)],
        "beside": [q for pair in pairs for q in _besides(*pair)],
        "more": list(_mores(scene)),
        "extreme": list(_extremes(scene)),
        "position": [q for pair in pairs for q in _positions(*pair)],
    }
    for kind, questions in drawn.items():
        yield from rng.sample(questions, min(PER_TYPE[kind], len(questions)))


def _number(things: Iterable[Thing], word: str) -> int:
    """How many of these have this colour, shape or size; "" for all."""
    return sum(word in ("", thing.color, thing.shape, thing.size) for thing in things)


def _plural(word: str) -> str:
    return f"{word}s" if word in SHAPES else f"{word} shapes".strip()


def _kind(word: str) -> str:
    """Colours are alike, whatever is asked, and so are shapes."""
    kinds = {"color": COLORS, "shape": SHAPES, "size": HALF}
    return next((kind for kind, words in kinds.items() if word in words), "")


def _numbered(
    kind: str, template: str, text: str, number: int, allowed: range
) -> Iterator[Question]:
    """Ask for a number, unless the answer is one that rarely comes up."""
    if number in allowed:
        yield Question(kind, template, text, NUMBERS[number])


def _places(thing: Thing) -> Iterator[Question]:
    for asked in ("color", "shape", "size"):
        text = f"what {asked} is the shape at the {thing.place}?"
        yield Question("place", text, text, getattr(thing, asked))


def _finds(thing: Thing) -> Iterator[Question]:
    yield Question("find", "what size", f"what size is the {thing.name}?", thing.size)
    for axis, words in PLACES.items():
        text = f"which {axis} is the {thing.name} in?"
        yield Question("find", f"which {axis}", text, words[getattr(thing, axis)])


def _counts(scene: Scene) -> Iterator[Question]:
    for word in (*COLORS, *SHAPES):
        allowed = range(1, 4) if word in SHAPES else range(3)
        text = f"how many {_plural(word)} are there?"
        yield from _numbered("count", text, text, _number(scene, word), allowed)


def _sides(thing: Thing, scene: Scene) -> Iterator[Question]:
    for relation in RELATIONS:
        there = [other for other in scene if _holds(other, relation, thing)]
        for word in ("", *COLORS, *SHAPES):
            if word not in (thing.color, thing.shape):  # of these it is one itself
                text = f"how many {_plural(word)} are {relation} the {thing.name}?"
                template = f"{_kind(word)} {relation}"
                yield from _numbered("side", template, text, _number(there, word), range(3))


def _besides(thing: Thing, other: Thing) -> Iterator[Question]:
    """Ask for the thing in the next cell; a color is likelier when the thing does not have it."""
    for relation, (right, down) in RELATIONS.items():
        if (other.column, other.row) == (thing.column + right, thing.row + down):
            for asked in ("color", "shape", "size"):
                text = f"what {asked} is the shape directly {relation} the"
                own = "" if asked == "size" else getattr(thing, asked)
                answer = getattr(other, asked)
                yield Question("beside", f"{text} {own}", f"{text} {thing.name}?", answer)


def _mores(scene: Scene) -> Iterator[Question]:
    for one, other in (*permutations((*COLORS, *SHAPES), 2), *permutations(HALF)):
        numbers = _number(scene, one), _number(scene, other)
        if numbers[0] != numbers[1]:
            text = f"are there more {_plural(one)} than {_plural(other)}?"
            template = f"{_kind(one)} {_kind(other)}"
            yield Question("more", template, text, _yes_no(numbers[0] > numbers[1]))


def _extremes(scene: Scene) -> Iterator[Question]:
    for word, relation in EXTREMES.items():
        for color in COLORS:
            same = [thing for thing in scene if thing.color == color]
            yield from _extreme(same, word, relation, f"{color} shape", ("shape", "size"))
        for shape in SHAPES:
            same = [thing for thing in scene if thing.shape == shape]
            yield from _extreme(same, word, relation, shape, ("color", "size"))


def _extreme(
    among: list[Thing], word: str, relation: str, name: str, features: tuple[str, ...]
) -> Iterator[Question]:
    """About the one of several things that has the relation to all others, if there is one."""
    for thing in among if len(among) > 1 else []:
        if all(_holds(thing, relation, other) for other in among if other != thing):
            for asked in features:
                text = f"what {asked} is the {word}"
                yield Question("extreme", text, f"{text} {name}?", getattr(thing, asked))


def _positions(first: Thing, second: Thing) -> Iterator[Question]:
    for relation, (right, _) in RELATIONS.items():
        if (first.column != second.column) if right else (first.row != second.row):
            text = f"is the {first.name} {relation} the {second.name}?"
            yield Question("position", relation, text, _yes_no(_holds(first, relation, second)))


def _holds(first: Thing, relation: str, second: Thing) -> bool:
    """Whether the first is left of the second, or what else the relation says; not how far."""
    right, down = RELATIONS[relation]
    return right * (first.column - second.column) + down * (first.row - second.row) > 0


def _yes_no(holds: bool) -> str:
    return "yes" if holds else "no"


def balanced(asked: list[tuple[int, Question]], rng: random.Random) -> dict[int, list[Question]]:
    """Keep as many questions for each answer of a template as its rarest answer has, by picture.

    A template with a single answer is left out.
    """
    groups: dict[str, dict[str, list[tuple[int, Question]]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for number, question in asked:
        groups[question.template][question.answer].append((number, question))
    kept: dict[int, list[Question]] = defaultdict(list)
    for answers in groups.values():
        fewest = min(map(len, answers.values())) if len(answers) > 1 else 0  # one tells itself
        for each in answers.values():
            for number, question in rng.sample(each, fewest):
                kept[number].append(question)
    return kept


def composition_rows(images: Mapping[str, int], seed: int = 0) -> dict[str, "Dataset"]:
    """Write the splits as conversational rows, one per picture, as easy-VQA's.

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
        if split == "test":
            kept = {i: [q for q in each if q.kind not in EASY] for i, each in kept.items()}
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
    from vlmoe.data.easy_vqa import conversation, dataset

    return dataset(
        [
            {
                "id": f"composition/{split}/{number}",
                "messages": [conversation(q.text, q.answer) for q in asked[number]],
                "images": [{"bytes": picture(scene), "path": None}],
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
    parser.add_argument("--train", type=int, default=12000, help="pictures")
    parser.add_argument("--test", type=int, default=600, help="pictures")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/composition"))
    options = parser.parse_args()
    from datasets import DatasetDict

    splits = composition_rows({"train": options.train, "test": options.test}, options.seed)
    DatasetDict(splits).save_to_disk(options.output_dir)


if __name__ == "__main__":
    main()

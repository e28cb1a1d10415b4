"""Files of numbered rows: question n, answer n and picture n."""

import json
from pathlib import Path
from typing import Any

import datasets
from builders import assistant, png, user
from PIL import Image

from vlmoe.data.conversations import parse_row


def picture(seed: int) -> Image.Image:
    """A small image without symmetry."""
    return Image.frombytes("RGB", (3, 2), bytes((7 * i + 31 * seed) % 256 for i in range(18)))


def conversation(number: int, images: int = 1) -> list[dict[str, Any]]:
    return [user(f"question {number}?", images), assistant(f"answer {number}")]


def write_json(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_pictures(folder: Path, count: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        picture(number).save(folder / f"{number}.png")


def as_dataset(count: int = 3) -> datasets.Dataset:
    """Rows with decoded images embedded, as a dataset on the Hub has them."""
    rows = {
        "messages": [conversation(number) for number in range(count)],
        "images": [[{"bytes": png(picture(number)), "path": None}] for number in range(count)],
        "source": ["made up"] * count,
    }
    dataset = datasets.Dataset.from_dict(rows)
    return dataset.cast_column("images", datasets.List(datasets.Image()))


def answers(rows: datasets.Dataset) -> list[str]:
    return [parse_row(row, 0).conversations[0][-1].text() for row in rows]

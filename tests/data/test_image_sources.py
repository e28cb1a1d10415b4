"""Sources of pictures x {processor, collators, load_rows}: the same pixels, or the same refusal."""

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from builders import png, user
from PIL import Image

from vlmoe.data.collator import VLMoECollator, VLMoEPreferenceCollator, VLMoEPromptCollator
from vlmoe.data.loading import load_rows
from vlmoe.processing.processing_vlmoe import VLMoEProcessor

QUESTION = user("what?", 1)
ANSWER = {"role": "assistant", "content": [{"type": "text", "text": "a shape"}]}
ENTRIES = ["processor", "training", "prompts", "preferences", "json", "typed", "typed list"]
LOADED = ENTRIES[4:]
URL = "http://127.0.0.1:9/a.png"  # nobody answers there


def text(content: bytes) -> str:
    return base64.b64encode(content).decode()


SOURCES: dict[str, Callable[[Image.Image, Path], Any]] = {
    "PIL": lambda image, path: image,
    "opened": lambda image, path: Image.open(path),
    "path": lambda image, path: str(path),
    "Path": lambda image, path: path,
    "bytes": lambda image, path: png(image),
    "bytearray": lambda image, path: bytearray(png(image)),
    "memoryview": lambda image, path: memoryview(png(image)),
    "base64": lambda image, path: text(png(image)),
    "data URL": lambda image, path: f"data:image/png;base64,{text(png(image))}",
    "dict of bytes": lambda image, path: {"bytes": png(image), "path": None},
    "dict of both": lambda image, path: {"bytes": png(image), "path": "elsewhere.png"},
    "dict of a path": lambda image, path: {"bytes": None, "path": str(path)},
    "dict of base64": lambda image, path: {"bytes": text(png(image)), "path": None},
    "array": lambda image, path: np.array(image),
    "tensor": lambda image, path: torch.from_numpy(np.array(image)).permute(2, 0, 1),
}
STORED = {
    "json": ("path", "base64", "data URL", "dict of a path", "dict of base64"),
    "typed": ("path", "bytes", "base64", "data URL", "dict of bytes", "dict of both"),
}
BAD: dict[str, tuple[Any, str]] = {
    "missing": ("nowhere/a.png", "nowhere/a.png"),
    "missing Path": (Path("nowhere/a.png"), "there is no file nowhere/a.png"),
    "missing, long": ("a/" * 3000 + "a.png", "a/a/a"),
    "missing in a dict": ({"bytes": None, "path": "nowhere/a.png"}, "nowhere/a.png"),
    "empty text": ("", "empty|no image file|is a folder"),
    "empty bytes": (b"", "is empty"),
    "no picture": (b"no picture", "cannot be decoded"),
    "URL": (URL, "127.0.0.1:9/a.png"),
    "URL in a dict": ({"bytes": None, "path": URL}, "127.0.0.1:9/a.png"),
    "another URL": ("file:///etc/a.png", "a URL of a kind that is not opened"),
    "None": (None, "got None"),
    "a number": (7, "got int 7|expected a file path, got 7"),
    "nothing in a dict": ({"bytes": None, "path": None}, "got None"),
}


def pixels(entry: str, source: Any, processor: VLMoEProcessor, folder: Path) -> torch.Tensor:
    """The pixels of a picture by one of the ways in."""
    if entry == "processor":
        return processor(images=[[source]], text=["<image>"], return_tensors="pt")["pixel_values"]
    row = {"messages": [QUESTION, ANSWER], "images": [source]}
    if entry == "preferences":
        pair = row | {"prompt": [QUESTION], "chosen": [ANSWER], "rejected": [ANSWER]}
        return VLMoEPreferenceCollator(processor, share_images=False)([pair])["pixel_values"][:1]
    if entry == "prompts":
        return VLMoEPromptCollator(processor)([row]).inputs["pixel_values"]
    if entry == "json":
        path = folder / "rows.jsonl"
        path.write_text(json.dumps(row))
    elif entry in LOADED:
        path = folder / "rows.parquet"
        kind: Any = datasets.Image(decode=False)
        value = source if isinstance(source, dict) else {"bytes": None, "path": source}
        value = {"bytes": source, "path": None} if isinstance(source, bytes) else value
        is_list = entry == "typed list"
        rows = datasets.Dataset.from_dict({"messages": [row["messages"]]}).add_column(
            "images",
            [[value]] if is_list else [value],
            feature=datasets.List(kind) if is_list else kind,
        )
        pq.write_table(rows.data.table, path)
    rows = load_rows(str(path)) if entry in LOADED else [row]
    return VLMoECollator(processor)(list(rows))["pixel_values"]


def can_hold(entry: str, name: str) -> bool:
    """Whether such a source can stand in a file of data."""
    return entry not in LOADED or name in STORED[entry.removesuffix(" list")]


@pytest.mark.parametrize(
    ("entry", "name", "side"),
    [
        (entry, name, side)
        for entry in ENTRIES
        for name in SOURCES
        for side in ((2, 64, 200) if name in ("base64", "data URL") else (64,))
        if can_hold(entry, name)
    ],
)
def test_every_source_gives_the_same_pixels_by_every_way_in(
    entry: str,
    name: str,
    side: int,
    processor: VLMoEProcessor,
    make_image: Callable[..., Image.Image],
    tmp_path: Path,
) -> None:
    image, path = make_image(size=(side, side)), tmp_path / "a picture.png"
    image.save(path)
    wanted = processor(images=image, text="<image>", return_tensors="pt")["pixel_values"]
    found = pixels(entry, SOURCES[name](image, path), processor, tmp_path)
    assert torch.equal(found.view_as(wanted), wanted)


def storable(entry: str, source: Any) -> bool:
    """Whether it can be given there as a picture; to the processor None is a row without any."""
    if entry == "processor":
        return source is not None
    if entry == "json":
        return not isinstance(source, bytes | Path)
    return entry not in LOADED or (isinstance(source, str | bytes | dict) and source is not None)


@pytest.mark.parametrize(
    ("entry", "name"), [(e, n) for e in ENTRIES for n in BAD if storable(e, BAD[n][0])]
)
def test_what_cannot_be_used_names_row_and_picture_by_every_way_in(
    entry: str, name: str, processor: VLMoEProcessor, tmp_path: Path
) -> None:
    source, message = BAD[name]
    where = "sample 0" if entry == "processor" else "row (0|'train\\[0\\]')"
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        pixels(entry, source, processor, tmp_path)
    found = str(error.value)
    assert error.match(f"{where}.*(image 0: |1 image parts).*({message}|but the row has 0 images)")
    assert len(found) < 600

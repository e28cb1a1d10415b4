"""Rows that were prepared before are found again, and prepared again where a file has changed."""

import json
import os
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image
from row_files import answers, as_dataset, conversation, write_json, write_pictures

from vlmoe.data.images import open_image
from vlmoe.data.loading import load_rows


def test_derived_rows_are_found_in_the_cache_again(tmp_path: Path) -> None:
    as_dataset().save_to_disk(tmp_path / "one")
    first = load_rows(str(tmp_path / "one"), altered_copies=1, with_images=False)
    files = sorted(tmp_path.rglob("*.arrow"))
    again = load_rows(str(tmp_path / "one"), altered_copies=1, with_images=False)
    assert first.to_dict() == again.to_dict()
    assert sorted(tmp_path.rglob("*.arrow")) == files


def write_again(path: Path, content: bytes) -> None:
    """Other content of the same size and time, as a tool that restores times may leave it."""
    before = path.stat()
    assert len(content) == before.st_size
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("options", [{}, {"with_images": False}, {"altered_copies": 1}])
@pytest.mark.parametrize("form", ["messages", "question and answer"])
def test_a_data_file_of_the_same_size_and_time_is_read_again(
    tmp_path: Path, options: dict[str, Any], form: str
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(
        json.dumps({"messages": conversation(1, images=0)})
        if form == "messages"
        else json.dumps({"question": "question 1?", "answer": "answer 1"})
    )
    assert set(answers(load_rows(str(path), **options))) == {"answer 1"}
    write_again(path, path.read_bytes().replace(b"answer 1", b"answer 2"))
    assert set(answers(load_rows(str(path), **options))) == {"answer 2"}


def test_a_saved_dataset_is_known_by_its_content(tmp_path: Path) -> None:
    rows = as_dataset(2).remove_columns("images")
    for answer in ("answer 0", "answer 5"):
        messages = [conversation(0, images=0), conversation(0, images=0)]
        for turns in messages:
            turns[1]["content"][0]["text"] = answer
        made = rows.remove_columns("messages").add_column(
            "messages", messages, new_fingerprint="the same"
        )
        made.save_to_disk(tmp_path / "saved")
        for options in ({}, {"with_images": False}, {"altered_copies": 1}):
            loaded = load_rows(str(tmp_path / "saved"), **options)
            assert set(answers(loaded)) == {answer}, options


@pytest.mark.parametrize("name", ["rows.jsonl", "metadata.jsonl"])
def test_altered_copies_follow_an_overwritten_picture(tmp_path: Path, name: str) -> None:
    column = "file_name" if name == "metadata.jsonl" else "image"
    write_json(tmp_path / name, [{"messages": conversation(0), column: "a.png"}])
    source = str(tmp_path if name == "metadata.jsonl" else tmp_path / name)
    for color in ("red", "blue"):
        Image.new("RGB", (8, 8), color).save(tmp_path / "a.png", compress_level=0)
        os.utime(tmp_path / "a.png", (1e9, 1e9))
        rows = load_rows(source, altered_copies=2)
        seen = {open_image(row["images"][0], "x").getpixel((4, 4)) for row in rows}
        assert seen == {Image.new("RGB", (1, 1), color).getpixel((0, 0))}


def test_altered_copies_of_unchanged_pictures_are_found_again(tmp_path: Path) -> None:
    write_pictures(tmp_path, 2)
    rows = [{"messages": conversation(n), "image": f"{n}.png"} for n in range(2)]
    path = str(write_json(tmp_path / "rows.jsonl", rows))
    first = load_rows(path, altered_copies=1)
    files = sorted(Path(datasets.config.HF_DATASETS_CACHE).rglob("*.arrow"))
    again = load_rows(path, altered_copies=1)
    assert first.to_dict() == again.to_dict()
    assert sorted(Path(datasets.config.HF_DATASETS_CACHE).rglob("*.arrow")) == files
    assert any("cache-" in file.name for file in files)

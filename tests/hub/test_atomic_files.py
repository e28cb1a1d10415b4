"""Files and folders are whole or absent, wherever writing stops."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from vlmoe.hub.atomic_files import (
    atomic_path,
    publish_folder,
    remove_folder,
    staging_folder,
    write_json,
)


def test_an_error_while_writing_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    write_json(file, {"a": 1})
    with pytest.raises(RuntimeError, match="stop"), atomic_path(file) as temporary:
        temporary.write_text("{")
        raise RuntimeError("stop")
    assert json.loads(file.read_text()) == {"a": 1}
    assert os.listdir(tmp_path) == ["results.json"]


def test_a_block_that_writes_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="Nothing was written"), atomic_path(tmp_path / "a"):
        pass


def test_unwritable_data_leave_nothing(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"a": object()})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("data", "place"),
    [
        ({"load": {"layers": [1.0, float("nan")]}}, r"load\.layers\[1\] is nan"),
        ([{"a": 1}, {"b": (float("inf"),)}], r"\[1\]\.b\[0\] is inf"),
        (-float("inf"), "the value is -inf"),
    ],
)
def test_json_holds_no_number_that_is_none(tmp_path: Path, data: Any, place: str) -> None:
    with pytest.raises(ValueError, match=rf"a\.json: {place}, which is no number"):
        write_json(tmp_path / "a.json", data)
    assert os.listdir(tmp_path) == []


def stage(destination: Path, content: str) -> Path:
    staging = staging_folder(destination)
    for name in ("config.json", "model-1.safetensors", "tokenizer.json", "sub/x.txt"):
        (staging / name).parent.mkdir(exist_ok=True)
        (staging / name).write_text(content)
    return staging


@pytest.mark.parametrize("moves", range(5))
def test_a_kill_between_two_moves_leaves_nothing_that_loads(
    tmp_path: Path, moves: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish_folder(stage(tmp_path, "old"), tmp_path)
    (tmp_path / "model-2.safetensors").write_text("a shard of the old model only")
    (tmp_path / "checkpoint-1").mkdir()
    left = [moves]
    replace = os.replace

    def dying(*arguments: Any) -> None:
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        replace(*arguments)

    staging = stage(tmp_path, "new")
    monkeypatch.setattr(os, "replace", dying)
    if moves < 4:
        with pytest.raises(KeyboardInterrupt):
            publish_folder(staging, tmp_path)
        assert not (tmp_path / "config.json").exists()
        monkeypatch.undo()
        publish_folder(stage(tmp_path, "new"), tmp_path)
    else:
        publish_folder(staging, tmp_path)
    files = {
        str(f.relative_to(tmp_path)): f.read_text() for f in tmp_path.rglob("*.*") if f.is_file()
    }
    names = ("config.json", "model-1.safetensors", "tokenizer.json", "sub/x.txt")
    assert files.pop("_replaced-weights/model-2.safetensors") == "a shard of the old model only"
    assert files == dict.fromkeys(names, "new")
    assert (tmp_path / "checkpoint-1").is_dir()


def test_an_unfinished_staging_folder_is_not_published(tmp_path: Path) -> None:
    staging = stage(tmp_path, "new")
    (staging / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        publish_folder(staging, tmp_path)


def test_a_removed_folder_is_gone_at_once(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    (folder / "a").touch()
    remove_folder(folder)
    assert os.listdir(tmp_path) == []


def test_weights_that_would_not_be_loaded_in_place_of_the_new_ones_stay(tmp_path: Path) -> None:
    for name in ("mine.safetensors", "vision.safetensors", "pytorch_model.bin"):
        (tmp_path / name).write_text("the user's")
    publish_folder(stage(tmp_path, "new"), tmp_path)
    for name in ("mine.safetensors", "vision.safetensors", "pytorch_model.bin"):
        assert (tmp_path / name).read_text() == "the user's"


def test_what_is_published_may_be_read_as_the_umask_allows(tmp_path: Path) -> None:
    staging = stage(tmp_path, "new")
    (staging / "model-1.safetensors").chmod(0o600)
    before = os.umask(0o027)
    try:
        publish_folder(staging, tmp_path)
        with atomic_path(tmp_path / "adapter.safetensors") as temporary:
            temporary.touch(mode=0o600)
    finally:
        os.umask(before)
    for name in ("model-1.safetensors", "config.json", "adapter.safetensors"):
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o640


def test_an_error_names_the_file_and_not_the_temporary_one(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "folder", tmp_path / "gone" / "x.json"):
        with pytest.raises(OSError) as error, atomic_path(path) as temporary:
            if "gone" in str(path):
                temporary.parent.rmdir()
            temporary.write_text("")
        assert f"'{path}'" in str(error.value) and ".tmp" not in str(error.value)


def test_a_long_name_is_written(tmp_path: Path) -> None:
    write_json(tmp_path / ("ü" * 120 + ".json"), {})
    assert os.listdir(tmp_path) == ["ü" * 120 + ".json"]

"""Files and folders are whole or absent, wherever writing stops."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from vlmoe.training.atomic_files import (
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

"""`vlmoe data`: a dataset checked without training."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image

from vlmoe_cli import main


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
    datasets.disable_progress_bars()


def run(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    code = main.main(["data", *map(str, arguments)])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_a_sound_dataset_is_described(
    data_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "new" / "data.png"
    code, out, _ = run(capsys, data_folder, "--output", picture)
    assert code == 0
    table = {line.split()[0]: line.split()[1:4] for line in out.splitlines() if line}
    assert table["train"] == ["10", "20", "10"] and table["test"] == ["3", "6", "3"]
    assert "The model has positions for 2,048 tokens." in out
    assert "train: question types: color 10, yes/no 10" in out
    assert out.count("«") == 2 + 3 + 3 and "[image 24x20: " in out
    with Image.open(picture) as drawn:
        assert drawn.format == "PNG"


def test_a_saved_models_tokens_and_positions_are_used(
    data_folder: Path, saved_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model", saved_model, "--split", "test", "--output", tmp_path / "a.png"]
    code, out, _ = run(capsys, data_folder, *options)
    assert code == 0 and "positions for 128 tokens" in out and "\ntrain" not in out
    code, out, error = run(capsys, data_folder, *options, "--max_length", 5)
    assert code == 2 and out.count("more than 5.") == 3 and "has 3 faults" in error


def test_all_faults_of_all_rows_are_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (8, 8), "red").save(tmp_path / "good.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    turns = [{"from": "human", "value": "<image>what?"}, {"from": "gpt", "value": "red"}]
    rows: list[dict[str, Any]] = [
        {"id": "good", "image": "good.png", "conversations": turns},
        {"id": "gone", "image": "gone.png", "conversations": turns},
        {"id": "outside", "image": "/etc/passwd", "conversations": turns},
        {"id": "broken", "image": "broken.png", "conversations": turns},
        {"id": "fewer", "image": None, "conversations": turns},
        {"id": "key", "image": "good.png", "conversations": [{**turns[0], "los": 1}, turns[1]]},
        {"id": "silent", "image": "good.png", "conversations": turns[:1]},
        {
            "id": "role",
            "image": "good.png",
            "conversations": [turns[0], {"from": "x", "value": ""}],
        },
    ]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    code, out, error = run(capsys, tmp_path, "--output", tmp_path / "data.png")
    faults = [line for line in out.splitlines() if line.startswith("- ")]
    assert code == 2 and len(faults) == 7 and "has 7 faults" in error
    for said in (
        "row 1, image 0: there is no image file",
        "row 2, image 0: '/etc/passwd' is /etc/passwd, outside",
        "row 5: a turn has the key 'los'",
        "row 'broken' ('what?'), image 0",
        "row 'fewer' ('what?'): a conversation has 1 image parts, but the row has 0 images",
        "row 'silent' ('what?'): ",
        "row 'role' ('what?'): unknown role 'x'",
    ):
        assert any(said in fault for fault in faults), (said, faults)
    assert (tmp_path / "data.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "Missing argument 'DATASET'"),
        (["/nowhere"], "there is no file or folder /nowhere"),
        (["DATA", "--split", "dev"], "has no split 'dev'; it has: test, train"),
        (["DATA", "--model", "huge"], "neither a preset"),
        (["DATA", "--max_length", "9999"], "max_position_embeddings=2048"),
    ],
)
def test_wrong_input_is_named(
    arguments: list[str], said: str, data_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [str(data_folder) if each == "DATA" else each for each in arguments]
    code, _, error = run(capsys, *given)
    assert code == 2 and said in error.strip().splitlines()[-1]

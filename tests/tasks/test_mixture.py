"""Several sources as one dataset: their rows, tasks and weights; sources that cannot be read."""

import json
from pathlib import Path
from typing import Any

import pytest
from builders import picture

from vlmoe import VLMoETrainer, load_rows
from vlmoe.training.data import TrainingData
from vlmoe_cli.main import main


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of questions and a folder of captions, each with two splits."""
    monkeypatch.chdir(tmp_path)
    for split in ("train", "test"):
        rows = [{"question": f"how many? {n}", "answer": "two"} for n in range(3)]
        (tmp_path / "counts").mkdir(exist_ok=True)
        text = "\n".join(map(json.dumps, rows))
        (tmp_path / "counts" / f"{split}.jsonl").write_text(text)
        folder = tmp_path / "captions" / split
        folder.mkdir(parents=True)
        for n in range(2):
            picture(n).save(folder / f"{n}.png")
        lines = [
            {"file_name": f"{n}.png", "text": "a red circle, seen from afar"} for n in range(2)
        ]
        (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path


MIXTURE: list[Any] = [
    {"source": "counts"},
    {"source": "captions", "task": "image-captioning", "weight": "balanced"},
]


def test_rows_of_sources_follow_each_other_with_task_and_weight(data: Path) -> None:
    rows = load_rows(MIXTURE)
    assert len(rows) == 5
    assert [row["task"] for row in rows] == ["counts"] * 3 + ["image-captioning"] * 2
    assert [row["loss_weight"] for row in rows] == [1.0] * 3 + ["balanced"] * 2
    assert len({row["id"] for row in rows}) == 5 and rows[3]["id"].startswith("captions: ")
    assert len(rows[3]["images"]) == 1
    assert [row["id"] for row in rows.select([4, 0])] == [rows[4]["id"], rows[0]["id"]]
    plain = load_rows([{"source": "counts"}, {"source": "captions"}])
    assert not any("loss_weight" in row for row in plain)


def test_a_trainer_takes_sources_and_logs_their_losses(data: Path, saved_model: Path) -> None:
    arguments = {"max_steps": 2, "logging_steps": 1, "report_to": "none", "use_cpu": True}
    trainer = VLMoETrainer(
        str(saved_model),
        arguments | {"output_dir": "out", "per_device_train_batch_size": 5},
        train_dataset=MIXTURE,
    )
    trainer.train()
    log = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert {"loss/counts", "loss/image-captioning"} <= log.keys()
    assert trainer.row_weights.balanced.keys() == {"image-captioning"}


def test_the_config_file_and_the_command_line_take_a_list(
    data: Path, saved_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("train.yaml").write_text(
        f"model: {saved_model}\nmax_steps: 1\nuse_cpu: true\nreport_to: none\noutput_dir: out\n"
        "eval_split: test\ndataset:\n  - {source: counts, weight: 2}\n"
        "  - {source: captions, task: image-captioning, weight: balanced}\n"
    )
    assert main(["train", "--config", "train.yaml"]) == 0, capsys.readouterr().err
    results = json.loads(Path("out/train_results.json").read_text())
    assert results["eval_questions"] == 5
    stages = json.loads(Path("out/training_stages.json").read_text())
    assert stages[0]["data"]["name"] == "counts + captions" and stages[0]["data"]["rows"] == 5
    card = Path("out/README.md").read_text()
    assert "counts + captions" in card and "\ndatasets:" not in card
    bad = json.dumps([{"source": "counts", "weight": -1}])
    assert main(["train", "--model", str(saved_model), "--dataset", bad]) != 0
    assert "dataset[0] (counts): `weight` is -1" in capsys.readouterr().err
    assert TrainingData(MIXTURE, eval_split="test").load().evaluation is not None


@pytest.mark.parametrize(
    ("sources", "facts"),
    [
        ([], "empty list"),
        ([{"source": "counts"}, {"split": "test"}], r"dataset\[1\].*`source`"),
        ([{"source": "counts", "weigth": 1}], r"dataset\[0\] \(counts\).*'weigth'.*'weight'"),
        ([{"source": "counts", "weight": float("nan")}], r"\(counts\): `weight` is nan"),
        ([{"source": "counts", "weight": "much"}], r"\(counts\): `weight` is 'much'"),
        ([{"source": "counts", "task": "counting", "weight": 1}], "counting"),
    ],
)
def test_a_source_that_cannot_be_read_is_named(data: Path, sources: Any, facts: str) -> None:
    with pytest.raises(ValueError, match=facts):
        load_rows(sources)

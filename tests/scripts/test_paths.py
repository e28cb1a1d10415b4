"""Folders with names that libraries read in their own way, and `~`, in every command."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from vlmoe_cli import main

NAMES = ("run [1] a*b? {c} ünï 模型 %41 'q' #1;& $", pytest.param("~", marks=pytest.mark.slow))
STEP = ["--use_cpu", "--max_steps", "1", "--report_to", "none", "--save_strategy", "steps"]
STEP += ["--save_steps", "1"]


def run(*argv: Any) -> None:
    assert main.main([str(each) for each in argv]) == 0, argv


@pytest.mark.parametrize("name", NAMES)
def test_every_command_takes_a_folder_of_any_name(
    name: str, saved_model: Path, data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Model, data, configuration and outputs lie below it; `~` is given as a path that is not
    below the home folder."""
    place = tmp_path / name
    place.mkdir()
    monkeypatch.chdir(tmp_path)
    model, data = place / "model", place / "data"
    shutil.copytree(saved_model, model)
    shutil.copytree(data_folder, data)
    (place / "data*").mkdir()  # what a pattern would find, too
    shutil.copy(data / "train.jsonl", place / "data*" / "train.jsonl")
    output = place / "out"
    config = place / "train.yaml"
    config.write_text(yaml.dump({"model": str(model), "dataset": str(data / "train.jsonl")}))
    run("train", "--config", config, "--output_dir", output, *STEP)
    run(
        "train",
        "--config",
        config,
        "--output_dir",
        output,
        *STEP,
        "--resume_from_checkpoint",
        "last",
    )
    evaluation = ["--batch_size", "2", "--max_new_tokens", "1", "--max_rows", "1"]
    run("evaluate", "--model", output, "--dataset", data, *evaluation)
    run(
        "inspect", "--model", output, "--dataset", data, *evaluation, "--output_dir", place / "page"
    )
    image = data / "test_0.png"
    run("generate", "--model", output, "--image", image, "--max_new_tokens", "1", "what?")
    run("card", output, "--output", place / "card")
    adapter, merged = place / "adapter", place / "merged"
    lora = ["--model", model, "--dataset", data, "--lora", "--lora_r", "1"]
    run("train", *lora, "--output_dir", adapter, *STEP)
    run("merge", adapter, "--output_dir", merged)
    run("export-lora", adapter, "--output_dir", place / "exported")
    results = json.loads((output / "evaluate_results.json").read_text())
    assert results["questions"] == 2
    assert (place / "page" / "inspection.html").is_file()
    assert {path.name for path in tmp_path.iterdir()} == {name}


@pytest.mark.parametrize("name", ["a::b", "$HOME", "${HOME}x"])
def test_a_name_that_datasets_would_read_in_its_own_way_is_refused(
    name: str, data_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(data_folder, tmp_path / name)
    options = ["--model", "tiny", "--output_dir", str(tmp_path / "out"), *STEP]
    assert main.main(["train", "--dataset", str(tmp_path / name), *options]) == 2
    assert "rename the file or folder." in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("way", ["words", "equals", "yaml"])
def test_the_home_folder_is_found_however_a_path_is_given(
    way: str, saved_model: Path, data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(saved_model, tmp_path / "model")
    shutil.copytree(data_folder, tmp_path / "data")
    given = {"model": "~/model", "dataset": "~/data", "output": "~/results.json"}
    given |= {"save_predictions": "~/predictions.json"}
    few = ["--max_rows", "1", "--max_new_tokens", "1"]
    if way == "words":
        run("evaluate", *few, *(word for n, v in given.items() for word in (f"--{n}", v)))
    elif way == "equals":
        run("evaluate", *few, *(f"--{name}={value}" for name, value in given.items()))
    else:
        (tmp_path / "e.yaml").write_text(yaml.dump(given))
        run("evaluate", *few, "--config", "~/e.yaml")
    for name in ("results.json", "predictions.json"):
        assert (tmp_path / name).is_file()
    assert not os.path.exists("~")


def test_a_folder_argument_may_be_in_the_home_folder(
    saved_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(saved_model, tmp_path / "model")
    run("card", "~/model", "--output=~/card")
    assert (tmp_path / "card" / "README.md").is_file()

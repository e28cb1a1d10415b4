"""Every command that writes into a folder: one at a time, and what cannot be written is found
before the work."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from lock_holder import holder
from peft import get_peft_model

from vlmoe import VLMoEForConditionalGeneration, expert_lora_config
from vlmoe_cli import main

COMMANDS: dict[str, Callable[[Path, Path, Path], list[str]]] = {
    "train": lambda out, model, data: ["--model", str(model), "--dataset", str(data), "--use_cpu"],
    "inspect": lambda out, model, data: ["--model", str(model), "--dataset", str(data)],
    "merge": lambda out, model, data: [str(model.parent / "adapter")],
    "export-lora": lambda out, model, data: [str(model.parent / "adapter")],
    "demo": lambda out, model, data: [],
}
IN_PLACE: dict[str, Callable[[Path, Path], list[str]]] = {
    "evaluate": lambda model, data: ["--model", str(model), "--dataset", str(data)],
    "card": lambda model, data: [str(model)],
    "push": lambda model, data: [str(model), "--repo_id", "user/name"],
}


@pytest.fixture
def model(saved_model: Path, tmp_path: Path) -> Path:
    """A copy of the saved model, beside an adapter of it."""
    copy = Path(shutil.copytree(saved_model, tmp_path / "models" / "model"))
    base = VLMoEForConditionalGeneration.from_pretrained(copy)
    get_peft_model(base, expert_lora_config(base)).save_pretrained(copy.parent / "adapter")
    return copy


def refusal(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a command ends with."""
    capsys.readouterr()
    assert main.main(argv) == 2
    out, error = capsys.readouterr()
    assert out == ""
    [line] = [each for each in error.splitlines() if each.startswith("vlmoe ")]
    return line


@pytest.mark.parametrize("command", COMMANDS)
def test_a_folder_in_use_is_one_line_and_stays_as_it_was(
    command: str, model: Path, data_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    argv = [command, *COMMANDS[command](output, model, data_folder), "--output_dir", str(output)]
    with holder(output) as (process, _):
        before = sorted(output.iterdir())
        line = refusal(argv, capsys)
        assert f"{output} is being written to by process {process.pid} on" in line
        assert sorted(output.iterdir()) == before
    assert not output.exists()


@pytest.mark.parametrize("command", IN_PLACE)
def test_a_model_in_use_is_one_line_and_stays_as_it_was(
    command: str, model: Path, data_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with holder(model) as (process, _):
        before = {path: path.stat().st_mtime_ns for path in model.iterdir()}
        line = refusal([command, *IN_PLACE[command](model, data_folder)], capsys)
        assert f"{model} is being written to by process {process.pid} on" in line
        assert {path: path.stat().st_mtime_ns for path in model.iterdir()} == before


def test_two_conversions_do_not_meet(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["upcycle", str(model), "--output_dir", str(tmp_path / "sparse")]
    with holder(tmp_path / "sparse", beside=True):
        assert "sparse is being written to by process" in refusal(argv, capsys)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("place", ["file", "link", "/proc/nothing", "file/below"])
def test_an_output_that_cannot_be_written_is_found_before_the_work(
    command: str,
    place: str,
    model: Path,
    data_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def work(*arguments: object, **named: object) -> None:
        raise AssertionError("work before the output was looked at")

    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    monkeypatch.setattr(VLMoEForConditionalGeneration, "from_pretrained", work)
    output = tmp_path / place
    argv = [command, *COMMANDS[command](output, model, data_folder), "--output_dir", str(output)]
    line = refusal(argv, capsys)
    assert str(output) in line and "_vlmoe" not in line and "Errno" not in line


@pytest.mark.parametrize("place", ["file", "link", "/proc/nothing", "file/below"])
def test_a_conversion_that_cannot_be_written_is_refused_before_the_work(
    place: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    line = refusal(["upcycle", str(model), "--output_dir", str(tmp_path / place)], capsys)
    assert str(tmp_path / "file") in line or place in line
    assert ".lock" not in line and "Errno" not in line


@pytest.mark.parametrize("option", ["--output", "--save_predictions"])
@pytest.mark.parametrize("place", ["folder", "file/x.json", "link/x.json", "/proc/nothing/x.json"])
def test_results_that_cannot_be_written_are_found_before_the_evaluation(
    option: str,
    place: str,
    saved_model: Path,
    data_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    monkeypatch.setattr("vlmoe.data.loading.load_rows", lambda *_, **__: pytest.fail("work first"))
    argv = ["evaluate", "--model", str(saved_model), "--dataset", str(data_folder)]
    argv += ["--output", str(tmp_path / "r.json"), option, str(tmp_path / place)]
    line = refusal(argv, capsys)
    if option == "--output":
        data = ["data", str(data_folder), "--output", str(tmp_path / place)]
        assert refusal(data, capsys).partition("error: ")[2] == line.partition("error: ")[2]
    assert str(tmp_path / place.partition("/")[0]) in line or place in line
    assert ".tmp" not in line


@pytest.mark.parametrize(
    ("command", "output", "message"),
    [
        (["merge", "{adapter}"], "adapter", "adapter holds an adapter (adapter_config.json)"),
        (["export-lora", "{adapter}"], "adapter", "{adapter} is the adapter itself"),
        (["export-lora", "{adapter}"], "model", "model holds a model (config.json)"),
        (
            ["train", "--dataset", "x", "--lora", "--model", "{model}"],
            "model",
            "holds a model (config",
        ),
        (
            ["train", "--dataset", "x", "--model", "{model}"],
            "adapter",
            "holds an adapter (adapter_config.json)",
        ),
        (["card", "{model}", "--output"], "other", "holds model.safetensors"),
        (
            ["merge", "{adapter}", "--model", "{model}"],
            "model",
            "{model} is the base model itself",
        ),
    ],
)
def test_a_model_and_an_adapter_do_not_replace_each_other(
    command: list[str], output: str, message: str, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"model": model, "adapter": model.parent / "adapter"}
    shutil.copytree(model, model.parent / "other")
    argv = [each.format(**places) for each in command]
    argv += [] if command[0] == "card" else ["--output_dir"]
    before = {path: path.stat().st_mtime_ns for path in model.parent.rglob("*") if path.is_file()}
    line = refusal([*argv, str(model.parent / output)], capsys)
    assert message.format(**places) in line
    assert {
        path: path.stat().st_mtime_ns for path in model.parent.rglob("*") if path.is_file()
    } == before

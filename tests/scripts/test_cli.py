"""The command `vlmoe`: help without heavy imports, options, one-line errors."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import pytest
import typer

from vlmoe.training import run as training_run
from vlmoe.training.arguments import (
    FROM_SCRATCH_LENGTH,
    FROM_SCRATCH_RATE,
    TRAINING_DEFAULTS,
    training_arguments,
)
from vlmoe.training.data import TrainingData
from vlmoe_cli import main
from vlmoe_cli.command_line import run_command
from vlmoe_cli.commands import call, command
from vlmoe_cli.config_file import ConfigFile
from vlmoe_cli.json_options import json_object


def command_of(name: str) -> Any:
    """The command as typer knows it."""
    return command(main.command_function(name))


@pytest.mark.parametrize("command", [[], *([name] for name in main.MODULES)])
def test_help_imports_neither_torch_nor_transformers(command: list[str]) -> None:
    program = (
        "import sys; from vlmoe_cli.main import main; code = main(sys.argv[1:]); "
        "heavy = {'torch', 'transformers', 'vlmoe', 'numpy', 'datasets', 'PIL'} & set(sys.modules);"
        "assert code == 0 and not heavy, heavy"
    )
    arguments = [sys.executable, "-c", program, *command, "--help"]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "examples:\n  vlmoe" in done.stdout
    for param in command_of(command[0]).params if command else ():
        assert param.opts[0].upper() in done.stdout.upper()
        assert param.help, f"{param.name} has no help text"


def test_the_help_of_train_names_our_defaults_and_help_all_every_option(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main.main(["train", "--help"]) == 0
    short = capsys.readouterr().out
    assert "--resume_from_checkpoint last" in short and "--adam_beta1" not in short
    defaults = [*TRAINING_DEFAULTS.items(), *(FROM_SCRATCH_LENGTH | FROM_SCRATCH_RATE).items()]
    assert all(f"{name} {value}" in " ".join(short.split()) for name, value in defaults)
    assert main.main(["train", "--help-all"]) == 0
    long = capsys.readouterr().out
    assert all(word in long for word in ("--adam_beta1", "--dataset", "--model_overrides"))


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("vlmoe ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "vlmoe: error: there is no command 'trian' (did you mean train?)"),
        (["train"], "vlmoe train: error: Missing option '--dataset'"),
        (["train", "--datset", "x"], "no option '--datset' (did you mean --dataset"),
        (["train", "--dataset", "x", "--learnin_rate", "1"], "did you mean --learning_rate"),
        (["train", "--learning_rate", "abc"], "invalid float value: 'abc'"),
        (["train", "--config", "nowhere.yaml"], "There is no config file nowhere.yaml"),
        (["train", "--dataset", "./nowhere.parquet"], "there is no file or folder ./nowhere"),
        (["train", "--eval_strategy", "often"], "often"),
        (["evaluate", "--dataset", "easy_vqa"], "vlmoe evaluate: error: Missing option '--model'"),
        (
            ["evaluate", "--model", "x", "--dataset", "x", "--batch_size", "many"],
            "'--batch_size': must be a valid integer",
        ),
        (["evaluate", "--model", "", "--dataset", "x"], "'--model': an empty text"),
        (["generate", "--model", "x"], "Missing argument 'QUESTION'"),
        (["generate", "question"], "Missing option '--model'"),
        (["generate", "--model", "x", "one", "two"], "(two)"),
        (["generate", "--model", "x", "?", "--tempature", "1"], "--temperature"),
        (["inspect", "--dataset", "easy_vqa"], "vlmoe inspect: error: Missing option '--model'"),
        (["merge", "nowhere", "--output_dir", "x"], "nowhere holds no adapter_config.json"),
        (["merge", "nowhere"], "Missing option '--output_dir'"),
        (["export-lora", "nowhere", "--output_dir", "x"], "nowhere holds no adapter_config.json"),
        (["export-lora", "x", "--output_dir", "y", "--layout", "z"], "not one of 'per-expert'"),
        (["push", "--repo_id", "user/name"], "Missing argument 'FOLDER'"),
        (["push", "outputs"], "vlmoe push: error: Missing option '--repo_id'"),
        (["push", "outputs", "--repo_id", "x/y", "--private=perhaps"], "--private takes true or"),
        (["upcycle", "x", "--output_dir", "y", "--fields", "{"], "'--fields': not valid JSON"),
        (["upcycle", "x", "--output_dir", "y", "--fields", "[1]"], "'--fields': a JSON object"),
        (["upcycle", "x", "--output_dir", "y", "--fields.num"], "--fields.num needs a value"),
        (
            ["upcycle", "x", "--output_dir", "y", "--fields.a", "1", "--fields.a.b", "2"],
            "--fields.a.b: a has a value",
        ),
        (["push", "nowhere", "--repo_id", "user/name"], "There is no model folder nowhere"),
        (["push", "nowhere", "--repo_id", "a/b/c"], "a/b/c"),
    ],
)
def test_wrong_input_gives_one_line_and_exit_code_2(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("dataset", "model", "message"),
    [
        ("data", "huge", "'huge' is neither a preset (base, small, tiny) nor a folder"),
        ("data", "./nowhere", "There is no model folder ./nowhere"),
        ("data", "data", "holds no whole model: model.safetensors: missing; config.json: missing"),
        ("data/train_0.png", "tiny", "unknown file type"),
        ("empty.jsonl", "tiny", "empty"),
        ("columns.jsonl", "tiny", "lacks the column `messages`"),
        ("silent.jsonl", "tiny", "('hello'): "),
        ("broken.jsonl", "tiny", "bad.png cannot be decoded"),
    ],
)
def test_unusable_data_and_models_are_named_before_training(
    dataset: str,
    model: str,
    message: str,
    data_folder: Path,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(data_folder)
    user = '{"role": "user", "content": "hello"}'
    answer = '{"role": "assistant", "content": "hello"}'
    with_image = '{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}'
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "columns.jsonl").write_text('{"ask": "?", "reply": "!"}\n')
    (tmp_path / "silent.jsonl").write_text(f'{{"messages": [{user}]}}\n')
    (tmp_path / "bad.png").write_bytes((data_folder / "train_0.png").read_bytes()[:300])
    (tmp_path / "broken.jsonl").write_text(
        f'{{"messages": [{with_image}, {answer}], "images": ["bad.png"]}}\n'
    )
    arguments = ["--dataset", dataset, "--model", model, "--use_cpu", "--output_dir", "out"]
    assert main.main(["train", *arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert message in error[-1] and error[-1].startswith("vlmoe train: error: ")
    assert not any("Traceback" in line for line in error)
    assert not (tmp_path / "out" / "config.json").exists()


def raising(error: BaseException) -> Callable[[list[str]], None]:
    def command(argv: list[str]) -> None:
        raise error

    return command


def test_the_traceback_is_shown_on_demand(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = raising(ValueError("two\n  lines"))
    assert run_command("vlmoe x", command, []) == 2
    assert capsys.readouterr().err == "vlmoe x: error: two lines\n"
    assert run_command("vlmoe x", command, ["--traceback"]) == 2
    assert "Traceback" in capsys.readouterr().err
    monkeypatch.setenv("VLMOE_TRACEBACK", "1")
    assert run_command("vlmoe x", command, []) == 2
    assert "Traceback" in capsys.readouterr().err


def test_an_error_of_a_data_worker_is_told_without_its_traceback(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = "Caught ValueError in DataLoader worker process 0.\nOriginal Traceback (most recent ..."
    error = ValueError(f"{text}\n  File x\nValueError: row 7: image 0 is empty\n")
    assert run_command("vlmoe x", raising(error), []) == 2
    assert capsys.readouterr().err == "vlmoe x: error: row 7: image 0 is empty\n"


def test_interruption_is_no_error_and_a_bug_keeps_its_traceback() -> None:
    assert run_command("vlmoe x", raising(KeyboardInterrupt()), []) == 130
    with pytest.raises(RuntimeError, match="a bug"):
        run_command("vlmoe x", raising(RuntimeError("a bug")), [])


EASY = ("--dataset", "easy_vqa", "--use_cpu")


def parse_training(argv: list[str]) -> Any:
    """What `vlmoe train` calls the library with."""
    with mock.patch.object(training_run, "train", side_effect=KeyboardInterrupt) as train:
        with pytest.raises(KeyboardInterrupt):
            call(command_of("train"), "vlmoe train", argv)
    return train.call_args


CONFIG = """
model: outputs/tiny
dataset: easy_vqa
max-train-rows: 12
altered_copies: 3
learning_rate: 5e-4
eval_strategy: no
model_overrides: {text_config: {num_experts: 4}}
include_num_input_tokens_seen: all
"""


def test_flags_win_over_the_config_file_and_the_file_over_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "train.yaml"
    file.write_text(CONFIG)
    flags = ["--max-train-rows=7", "--config", str(file), "--seed", "3", "--use_cpu"]
    asked = parse_training([*flags, "--output_dir", str(tmp_path)])
    model, data, arguments = asked.args
    assert model == "outputs/tiny"
    assert asked.kwargs["model_overrides"] == {"text_config": {"num_experts": 4}}
    assert (data.dataset, data.max_train_rows, data.altered_copies) == ("easy_vqa", 7, 3)
    assert (arguments.learning_rate, arguments.seed, arguments.eval_strategy) == (5e-4, 3, "no")
    assert arguments.include_num_input_tokens_seen == "all"
    assert arguments.save_total_limit == TRAINING_DEFAULTS["save_total_limit"]
    assert arguments.remove_unused_columns is False


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (
            [],
            {"max_steps": 1000, "save_steps": 0.2, "learning_rate": 1e-3, "eval_strategy": "no"},
        ),
        (["--eval_split", "test"], FROM_SCRATCH_LENGTH | FROM_SCRATCH_RATE),
        (["--learning_rate", "5e-5"], {"max_steps": 1000, "learning_rate": 5e-5}),
        (["--max_steps=7"], FROM_SCRATCH_RATE | {"max_steps": 7, "eval_strategy": "no"}),
        (["--num-train-epochs", "3"], FROM_SCRATCH_RATE | {"max_steps": -1}),
        (["--save_strategy", "no"], FROM_SCRATCH_RATE | {"max_steps": 1000, "save_strategy": "no"}),
        (["--model", "user/saved"], {"max_steps": -1, "learning_rate": 5e-5}),
    ],
)
@pytest.mark.parametrize("in_file", [False, True])
def test_a_preset_has_a_length_and_a_rate_of_its_own_where_none_is_given(
    tmp_path: Path, flags: list[str], expected: dict[str, Any], in_file: bool
) -> None:
    if in_file and flags:
        name, value = flags[0].split("=") if len(flags) == 1 else flags
        file = tmp_path / "options.yaml"
        file.write_text(f"{name.lstrip('-')}: {value}")
        flags = ["--config", str(file)]
    arguments = parse_training([*flags, *EASY, "--output_dir", str(tmp_path)]).args[2]
    assert {name: getattr(arguments, name) for name in expected} == expected


def test_options_parsed_without_flags_are_our_defaults(tmp_path: Path) -> None:
    flags = ["--model", "user/saved", "--eval_split", "test"]
    parsed = parse_training([*flags, *EASY]).args[2]
    built = training_arguments(use_cpu=True)
    assert parsed.to_dict() == built.to_dict()
    for name, value in TRAINING_DEFAULTS.items():
        assert getattr(parsed, name) == value, name


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learnin_rate: 1", r"no option 'learnin_rate' \(did you mean learning_rate"),
        ("- a list", "must be a mapping"),
        ("model: [unclosed", "not valid YAML"),
        ("max_train_rows: 1.5", "1.5"),
        ("altered_copies: maybe", "maybe"),
        ("max_train_rows: [1]", r"--max_train_rows cannot be \[1\]"),
        ("altered_copies: true", "--altered_copies cannot be True"),
        ("dataset: 2020-01-01", "--dataset cannot be"),
        ("num_train_epochs: .nan\nx: 1", "no option 'x'"),
    ],
)
def test_a_wrong_config_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "train.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        call(command_of("train"), "vlmoe train", ["--config", str(file), *EASY[2:]])


def test_an_empty_config_file_changes_nothing(tmp_path: Path) -> None:
    file = tmp_path / "empty.yaml"
    file.write_text("")
    _, data, _ = parse_training(["--config", str(file), *EASY]).args
    assert data == TrainingData("easy_vqa")


def parsed(argv: list[str]) -> dict[str, Any]:
    """What a command with an option of each kind is called with."""
    calls: list[dict[str, Any]] = []

    def function(
        word: Annotated[str | None, typer.Argument()] = None,
        image: Annotated[list[str] | None, typer.Option()] = None,
        max_rows: Annotated[int | None, typer.Option(min=1)] = None,
        top_p: float = 1.0,
        name: str = "x",
        lora: bool = False,
        model_overrides: Annotated[
            dict[str, Any] | None, typer.Option(parser=json_object, metavar="JSON")
        ] = None,
        config: ConfigFile = None,
    ) -> None:
        calls.append(locals())

    call(command(function), "vlmoe x", argv)
    (given,) = calls
    return {name: value for name, value in given.items() if name != "calls"}


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], {"lora": False, "image": None, "max_rows": None, "model_overrides": None}),
        (["--image", "a", "w", "--image=b"], {"image": ["a", "b"], "word": "w"}),
        (["--max-rows", "3", "--top_p=0.5"], {"max_rows": 3, "top_p": 0.5}),
        (["--max_rows", "3", "--max-rows=4"], {"max_rows": 4}),
        (["--lora"], {"lora": True}),
        (["--lora", "true", "w"], {"lora": True, "word": "w"}),
        (["--lora", "w"], {"lora": True, "word": "w"}),
        (["--lora", "False"], {"lora": False}),
        (["--lora=yes"], {"lora": True}),
        (["--lora", "--no-lora"], {"lora": False}),
        (["--", "--lora"], {"lora": False, "word": "--lora"}),
        (["--", "--model.a"], {"model_overrides": None, "word": "--model.a"}),
        (["--name", "a-b=c"], {"name": "a-b=c"}),
        (["--model_overrides", '{"a": {"b": 1}}'], {"model_overrides": {"a": {"b": 1}}}),
        (["--model.a.b", "0", "--model.a.c=x"], {"model_overrides": {"a": {"b": 0, "c": "x"}}}),
        (["--model.a", "null", "w"], {"model_overrides": {"a": None}, "word": "w"}),
        (["--model.a", "[1, 2]"], {"model_overrides": {"a": [1, 2]}}),
        (["--model.a", "NaN"], {"model_overrides": {"a": "NaN"}}),
        (
            ["--model.a.b", "2", "--model-overrides", '{"a": {"b": 1, "c": 1}}'],
            {"model_overrides": {"a": {"b": 2, "c": 1}}},
        ),
    ],
)
def test_the_forms_of_options(argv: list[str], expected: dict[str, Any]) -> None:
    given = parsed(argv)
    assert {name: given[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("text", "argv", "expected"),
    [
        ("max-rows: 3\nlora: true\nname: no-one", [], {"max_rows": 3, "lora": True}),
        ("max_rows: 3\nlora: true", ["--max_rows", "4", "--lora", "false"], {"lora": False}),
        ("max_rows: 3", ["--max_rows", "4"], {"max_rows": 4}),
        ("image: [a, b]", [], {"image": ["a", "b"]}),
        ("image: [a, b]", ["--image", "c"], {"image": ["c"]}),
        ("name: 5", [], {"name": "5"}),
        ("max_rows:", [], {"max_rows": None}),
        (
            "model_overrides: {a: {b: 1}}",
            ["--model.a.c", "2"],
            {"model_overrides": {"a": {"b": 1, "c": 2}}},
        ),
        ("", [], {"name": "x"}),
    ],
)
def test_a_config_file_gives_defaults(
    tmp_path: Path, text: str, argv: list[str], expected: dict[str, Any]
) -> None:
    (tmp_path / "x.yaml").write_text(text)
    given = parsed(["--config", str(tmp_path / "x.yaml"), *argv])
    assert {name: given[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("text", "facts"),
    [
        ("max_row: 1", "no option 'max_row' (did you mean max_rows"),
        ("config: x.yaml", "no option 'config'"),
        ("word: x", "no option 'word'"),
        ("- a list", "must be a mapping"),
        ("name: [unclosed", "not valid YAML"),
        ("max_rows: 1.5", "'--max_rows': must be a valid integer"),
        ("max_rows: 0", "'--max_rows': must be greater than or equal to 1, got '0'"),
        ("max_rows: maybe", "got 'maybe'"),
        ("max_rows: [1]", "--max_rows cannot be [1]"),
        ("max_rows: true", "--max_rows cannot be True"),
        ("name: 2020-01-01", "--name cannot be"),
        ("image: a", "--image cannot be 'a'"),
        ("lora: perhaps", "got 'perhaps'"),
        ("model_overrides: [1]", "--model_overrides cannot be"),
    ],
)
def test_a_wrong_config_file_is_named_with_the_option(
    tmp_path: Path, text: str, facts: str
) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ValueError) as caught:
        parsed(["--config", str(tmp_path / "x.yaml")])
    assert facts in str(caught.value) and "x.yaml" in str(caught.value)


def test_a_missing_config_file_is_named() -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.yaml"):
        parsed(["--config", "nowhere.yaml"])

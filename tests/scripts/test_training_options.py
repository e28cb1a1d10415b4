"""Options of `vlmoe train` that are fields of TrainingArguments: typed, checked, named."""

from pathlib import Path
from typing import Any

import pytest
import typer

from vlmoe_cli.commands import call, command
from vlmoe_cli.config_file import ConfigFile
from vlmoe_cli.training_options import given_arguments


def given(argv: list[str]) -> dict[str, Any]:
    """The training arguments of a command with two options of its own."""
    calls: list[dict[str, Any]] = []

    def function(
        ctx: typer.Context, dataset: str = "x", lora: bool = False, config: ConfigFile = None
    ) -> None:
        calls.append(given_arguments(ctx))

    call(command(function), "vlmoe train", argv)
    (arguments,) = calls
    return arguments


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], {}),
        (["--dataset", "y", "--lora", "true", "--seed", "3"], {"seed": 3}),
        (["--max_steps", "-1", "--learning-rate=5e-4"], {"max_steps": -1, "learning_rate": 5e-4}),
        (["--use_cpu", "--lora"], {"use_cpu": True}),
        (["--use_cpu", "false", "--dataset", "y"], {"use_cpu": False}),
        (["--eval_strategy", "no"], {"eval_strategy": "no"}),
        (
            ["--include_num_input_tokens_seen", "all"],
            {"include_num_input_tokens_seen": "all"},
        ),
        (["--report_to", "none"], {"report_to": "none"}),
    ],
)
def test_given_arguments_are_typed_and_no_others_are_returned(
    argv: list[str], expected: dict[str, Any]
) -> None:
    assert given(argv) == expected


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(
        "dataset: y\nlearning_rate: 5e-4\neval_strategy: no\nmax-steps: 4\nuse_cpu: true\n"
        "save_total_limit: null\ninclude_num_input_tokens_seen: all"
    )
    argv = ["--config", str(tmp_path / "x.yaml"), "--max_steps", "5", "--seed", "1"]
    assert given(argv) == {
        "learning_rate": 5e-4,
        "eval_strategy": "no",
        "max_steps": 5,
        "use_cpu": True,
        "save_total_limit": None,
        "include_num_input_tokens_seen": "all",
        "seed": 1,
    }


@pytest.mark.parametrize(
    ("argv", "facts"),
    [
        (["--datset", "x"], "no option '--datset' (did you mean --dataset"),
        (["--learnin_rate", "1"], "'--learnin_rate' (did you mean --learning_rate"),
        (["--learn", "1"], "no option '--learn'"),
        (["--learning_rate", "abc"], "invalid float value: 'abc'"),
        (["--eval_strategy", "often"], "often"),
        (["word"], "'word' belongs to no option"),
        (["--seed", "-1"], "--seed must be 0 or more and at most 4294967295, got -1"),
        (["--max_grad_norm", "nan"], "--max_grad_norm must be 0 or more, got nan"),
    ],
)
def test_a_wrong_argument_is_named(argv: list[str], facts: str) -> None:
    with pytest.raises(ValueError) as caught:
        given(argv)
    assert facts in str(caught.value)


@pytest.mark.parametrize(
    ("text", "facts"),
    [
        ("learnin_rate: 1", "no option 'learnin_rate' (did you mean learning_rate"),
        ("datset: x", "no option 'datset' (did you mean dataset"),
        ("learning_rate: fast", "invalid float value: 'fast'"),
        ("max_steps: 1.5", "invalid int value: '1.5'"),
        ("num_train_epochs: .nan", "--num_train_epochs must be above 0, got nan"),
    ],
)
def test_a_wrong_argument_of_a_file_is_named(tmp_path: Path, text: str, facts: str) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ValueError) as caught:
        given(["--config", str(tmp_path / "x.yaml")])
    assert facts in str(caught.value)


def test_messages_spell_arguments_as_options() -> None:
    def function(ctx: typer.Context, dtype: str = "x") -> None:
        given_arguments(ctx)
        raise ValueError("`dtype` and `max_steps`, but not `messages` or `vlmoe train`.")

    with pytest.raises(ValueError, match=r"^--dtype and --max_steps, but not `messages` or `vlmoe"):
        call(command(function), "vlmoe train", [])

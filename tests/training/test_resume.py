"""Resuming gives the numbers of the run that was never interrupted, bit for bit."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from vlmoe.training.arguments import training_arguments
from vlmoe.training.data import TrainingData
from vlmoe.training.run import TrainResult, train

STEPS, STEPS_PER_EPOCH = 7, 5  # 10 rows, 1 per batch, 2 batches per step
TIMES = ("runtime", "per_second")


def run(
    output: Path, model: Path, data: Path, resume: str | None = None, **more: Any
) -> TrainResult:
    arguments = training_arguments(
        output_dir=str(output),
        resume_from_checkpoint=resume,
        max_steps=STEPS,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=None,
        report_to="none",
        use_cpu=True,
        **more,
    )
    options = TrainingData(str(data), eval_split="test")
    return train(str(model), options, arguments)


@pytest.fixture(scope="module")
def uninterrupted(
    tmp_path_factory: pytest.TempPathFactory, saved_model: Path, data_folder: Path
) -> TrainResult:
    return run(tmp_path_factory.mktemp("whole"), saved_model, data_folder)


def numbers(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The log without times, and without the summary of a session."""
    kept = [entry for entry in log if "train_loss" not in entry]
    return [
        {key: value for key, value in entry.items() if not any(word in key for word in TIMES)}
        for entry in kept
    ]


def assert_equal(one: Any, other: Any) -> None:
    """Equal bit for bit, through dicts and lists."""
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_equal(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for each, its in zip(one, other, strict=True):
            assert_equal(each, its)
    else:
        assert one == other


@pytest.mark.parametrize("step", [3, STEPS_PER_EPOCH, 6])
def test_a_resumed_run_equals_the_uninterrupted_one(
    uninterrupted: TrainResult, step: int, tmp_path: Path, saved_model: Path, data_folder: Path
) -> None:
    name = f"checkpoint-{step}"
    shutil.copytree(uninterrupted.output_dir / name, tmp_path / name)
    torch.manual_seed(99)  # whatever the process did before
    resumed = run(tmp_path, saved_model, data_folder, "last")

    assert resumed.metrics["resumed_at_step"] == step
    for file in (f"checkpoint-{STEPS}/model.safetensors", "model.safetensors"):
        assert_equal(load_file(tmp_path / file), load_file(uninterrupted.output_dir / file))
    for file in ("optimizer.pt", "scheduler.pt"):
        ours, theirs = (
            torch.load(folder / f"checkpoint-{STEPS}" / file)
            for folder in (tmp_path, uninterrupted.output_dir)
        )
        assert_equal(ours, theirs)
    assert numbers(resumed.log_history) == numbers(uninterrupted.log_history)


def test_the_run_under_test_draws_random_numbers_and_learns(uninterrupted: TrainResult) -> None:
    assert uninterrupted.model.config.text_config.attention_dropout > 0
    assert uninterrupted.model.config.vision_config.attention_dropout > 0
    losses = [entry["loss"] for entry in uninterrupted.log_history if "loss" in entry]
    assert len(losses) == STEPS and losses[-1] < losses[0]


def test_the_same_seed_gives_the_same_numbers_and_another_seed_others(
    uninterrupted: TrainResult, tmp_path: Path, saved_model: Path, data_folder: Path
) -> None:
    again = run(tmp_path / "again", saved_model, data_folder)
    assert numbers(again.log_history) == numbers(uninterrupted.log_history)
    other = run(tmp_path / "other", saved_model, data_folder, seed=1)
    assert numbers(other.log_history) != numbers(uninterrupted.log_history)


def test_resuming_a_finished_run_trains_no_further_step(
    uninterrupted: TrainResult, tmp_path: Path, saved_model: Path, data_folder: Path
) -> None:
    name = f"checkpoint-{STEPS}"
    shutil.copytree(uninterrupted.output_dir / name, tmp_path / name)
    resumed = run(tmp_path, saved_model, data_folder, "last")
    assert resumed.metrics["steps"] == STEPS
    final = uninterrupted.output_dir / "model.safetensors"
    assert_equal(load_file(tmp_path / "model.safetensors"), load_file(final))
    assert resumed.metrics["train_loss"] == uninterrupted.metrics["train_loss"]


def test_a_checkpoint_of_another_model_is_refused(
    uninterrupted: TrainResult, tmp_path: Path, data_folder: Path
) -> None:
    checkpoint = uninterrupted.output_dir / "checkpoint-3"
    arguments = training_arguments(
        output_dir=str(tmp_path), resume_from_checkpoint=str(checkpoint), use_cpu=True
    )
    with pytest.raises(ValueError, match=r"checkpoint-3 is of another model: "):
        train("tiny", TrainingData(str(data_folder)), arguments)

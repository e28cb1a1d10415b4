"""A training that is killed at any moment, also while it writes, goes on as if it had not been.

The runs are processes of their own, forked from a server that has imported everything.
"""

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

from vlmoe.hub.folder_lock import LOCK_FILE
from vlmoe.hub.whole_model import model_problems
from vlmoe.training.checkpoints import (
    checkpoint_folders,
    checkpoint_problems,
    checkpoint_step,
)
from vlmoe.training.data import TrainingData

STEPS = 6
SIGNALS = (signal.SIGKILL, signal.SIGTERM)


def train_once(model: str, data: str, output: str) -> None:
    """Start the run, or go on with it; what it prints goes to a file."""
    from vlmoe.training.arguments import training_arguments
    from vlmoe.training.run import train

    with open(f"{output}.log", "a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    torch.set_num_threads(1)
    arguments = training_arguments(
        output_dir=output,
        resume_from_checkpoint="last",
        max_steps=STEPS,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="steps",
        save_steps=1,
        report_to="none",
        use_cpu=True,
    )
    train(model, TrainingData(data), arguments)


@pytest.fixture(scope="module")
def start(saved_model: Path, data_folder: Path) -> Callable[[Path], BaseProcess]:
    """`start(output)`: the run in a process of its own."""
    context = multiprocessing.get_context("forkserver")
    preload = ("vlmoe.training.run", "transformers.trainer")
    context.set_forkserver_preload(["datasets", "vlmoe.data.loading", *preload])

    def start_process(output: Path) -> BaseProcess:
        arguments = (str(saved_model), str(data_folder), str(output))
        process = context.Process(target=train_once, args=arguments)
        process.start()
        return process

    return start_process


@pytest.fixture(scope="module")
def whole_run(
    start: Callable[[Path], BaseProcess], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The output of the run that nobody killed."""
    output = tmp_path_factory.mktemp("whole") / "run"
    finish(start, output)
    return output


def finish(start: Callable[[Path], BaseProcess], output: Path) -> None:
    """Let the run go on to its end."""
    process = start(output)
    process.join(120)
    assert process.exitcode == 0, Path(f"{output}.log").read_text()[-2000:]


def kill_when(
    process: BaseProcess, moment: Callable[[], bool], delay: float, kind: signal.Signals
) -> bool:
    """Kill the process `delay` seconds after `moment`; False if it ended before."""
    while not moment():
        if not process.is_alive():
            return False
    time.sleep(delay)
    assert process.pid is not None
    was_alive = process.is_alive()
    try:
        os.kill(process.pid, kind)
    except ProcessLookupError:
        was_alive = False
    process.join(60)
    return was_alive


def staged(output: Path) -> list[Path]:
    """The folder in which the final model is being staged."""
    return list(output.glob(".incoming.*"))


def assert_nothing_half_written(output: Path) -> None:
    """What looks like a final model is one."""
    if (output / "config.json").exists():
        assert model_problems(output) == []


def assert_same_result(output: Path, whole_run: Path) -> None:
    for file in ("model.safetensors", f"checkpoint-{STEPS}/model.safetensors"):
        assert (output / file).read_bytes() == (whole_run / file).read_bytes()
    assert checkpoint_problems(output / f"checkpoint-{STEPS}") == []
    left = [path for path in output.rglob(".*") if path.parent.name[0] != "_"]
    assert not left  # a folder that was set aside stays as it was
    assert not (output / LOCK_FILE).exists()
    ours, theirs = (
        torch.load(folder / f"checkpoint-{STEPS}" / "optimizer.pt")["state"]
        for folder in (output, whole_run)
    )
    for index, state in theirs.items():
        assert all(torch.equal(ours[index][key], value) for key, value in state.items())


def test_a_run_killed_while_it_writes_a_checkpoint_goes_on(
    start: Callable[[Path], BaseProcess], whole_run: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    for step in range(2, STEPS + 1):  # the next one, where a busy machine let this one be finished
        checkpoint = output / f"checkpoint-{step}"
        assert kill_when(start(output), checkpoint.exists, 0.0, signal.SIGKILL)
        if checkpoint_problems(checkpoint):
            break
    assert checkpoint_problems(checkpoint) != []
    finish(start, output)
    assert "Skipping the incomplete checkpoint" in Path(f"{output}.log").read_text()
    assert_same_result(output, whole_run)


@pytest.mark.slow
@pytest.mark.parametrize("kind", SIGNALS)
def test_a_run_killed_at_every_checkpoint_goes_on(
    start: Callable[[Path], BaseProcess], whole_run: Path, tmp_path: Path, kind: signal.Signals
) -> None:
    output = tmp_path / "run"
    incomplete = 0
    for step in range(1, STEPS + 1):
        for delay in (0.0, 0.002, 0.005, 0.01, 0.02, 0.04):
            checkpoint = output / f"checkpoint-{step}"
            if checkpoint.exists() and not checkpoint_problems(checkpoint):
                break
            kill_when(start(output), checkpoint.exists, delay, kind)
            incomplete += bool(checkpoint_problems(checkpoint))
            assert_nothing_half_written(output)
    assert incomplete >= 5
    finish(start, output)
    assert_same_result(output, whole_run)


@pytest.mark.slow
def test_runs_killed_ten_times_at_random_moments_go_on(
    start: Callable[[Path], BaseProcess], whole_run: Path, tmp_path: Path
) -> None:
    """At any time between the lock and the end; a run that has ended is compared, and a new one is
    begun."""

    def works(output: Path) -> Callable[[], bool]:
        lock = output / LOCK_FILE
        before = lock.read_text() if lock.exists() else ""
        return lambda: lock.exists() and lock.read_text() not in ("", before)

    process, moment = start(tmp_path / "timed"), works(tmp_path / "timed")
    while not moment():
        assert process.is_alive()
    begun = time.monotonic()
    process.join()
    longest = time.monotonic() - begun

    generator = random.Random(0)
    outputs, kills = [tmp_path / "run-0"], []
    while len(kills) < 10:
        moment = works(outputs[-1])
        delay = generator.uniform(0.0, longest)
        if kill_when(start(outputs[-1]), moment, delay, signal.SIGKILL):
            kills.append(max(map(checkpoint_step, checkpoint_folders(outputs[-1])), default=0))
            assert_nothing_half_written(outputs[-1])
        else:
            outputs.append(tmp_path / f"run-{len(outputs)}")
    for output in outputs:
        finish(start, output)
        assert_same_result(output, whole_run)


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.0, 0.001, 0.003, 0.006, 0.01, 0.02, 0.03, 0.05])
def test_a_run_killed_while_it_saves_the_final_model_leaves_a_whole_one_or_none(
    start: Callable[[Path], BaseProcess], whole_run: Path, tmp_path: Path, delay: float
) -> None:
    output = tmp_path / "run"
    kill_when(start(output), lambda: bool(staged(output)), delay, signal.SIGKILL)
    assert_nothing_half_written(output)
    finish(start, output)
    assert_same_result(output, whole_run)

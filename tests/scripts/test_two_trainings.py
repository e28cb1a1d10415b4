"""Two trainings into one folder: one wins, as if it were alone; the other ends with one line."""

import contextlib
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from vlmoe.hub.folder_lock import LOCK_FILE
from vlmoe.hub.whole_model import model_problems

STEPS = 8
Start = Callable[[int, Path, Path], multiprocessing.process.BaseProcess]


def run_training(arguments: list[str], seed: int, log: str) -> None:
    """`vlmoe train` with a seed; what it prints goes to a file."""
    import torch

    from vlmoe_cli.main import main

    torch.set_num_threads(1)
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.exit(main(["train", *arguments, "--seed", str(seed)]))


@pytest.fixture(scope="module")
def options(saved_model: Path, data_folder: Path) -> list[str]:
    """The options of both trainings, but for seed and folder."""
    values = ["--model", str(saved_model), "--dataset", str(data_folder), "--use_cpu"]
    values += ["--max_steps", str(STEPS), "--save_strategy", "steps", "--save_steps", "2"]
    return [*values, "--learning_rate", "1e-2", "--report_to", "none"]


@pytest.fixture(scope="module")
def start(options: list[str]) -> Start:
    """`start(seed, output, log)`: the training in a process of its own."""
    context = multiprocessing.get_context("forkserver")
    preload = ["vlmoe.training.run", "transformers.trainer"]
    context.set_forkserver_preload([*preload, "datasets", "vlmoe.data.loading"])

    def start_process(seed: int, output: Path, log: Path) -> multiprocessing.process.BaseProcess:
        arguments = ([*options, "--output_dir", str(output)], seed, str(log))
        process = context.Process(target=run_training, args=arguments)
        process.start()
        return process

    return start_process


@pytest.mark.parametrize("rounds", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_of_two_trainings_one_wins_and_the_other_ends_with_one_line(
    rounds: int, start: Start, tmp_path: Path
) -> None:
    alone = {}
    for seed in (1, 2):
        process = start(seed, tmp_path / f"alone-{seed}", tmp_path / "alone.log")
        process.join()
        alone[seed] = (tmp_path / f"alone-{seed}" / "model.safetensors").read_bytes()
    assert alone[1] != alone[2]
    generator = random.Random(0)
    for number in range(rounds):
        output = tmp_path / f"run-{number}"
        logs = {seed: tmp_path / f"{number}-{seed}.log" for seed in (1, 2)}
        first, second = generator.sample((1, 2), 2)
        processes = {first: start(first, output, logs[first])}
        time.sleep(generator.uniform(0, 0.5))
        processes[second] = start(second, output, logs[second])
        for process in processes.values():
            process.join(120)
        texts = {seed: log.read_text() for seed, log in logs.items()}
        codes = {seed: process.exitcode for seed, process in processes.items()}
        assert sorted(codes.values()) == [0, 2], texts  # type: ignore[type-var]
        [winner], [loser] = ([s for s, code in codes.items() if code == given] for given in (0, 2))
        said = [line for line in texts[loser].splitlines() if "error" in line.lower()]
        assert len(said) == 1 and "Traceback" not in texts[loser], texts[loser]
        assert f"{output} is being written to by process {processes[winner].pid} on" in said[0]
        assert (output / "model.safetensors").read_bytes() == alone[winner]
        stages = json.loads((output / "training_stages.json").read_text())
        assert stages[-1]["hyperparameters"]["seed"] == winner
        assert not (output / LOCK_FILE).exists()


@pytest.mark.slow
def test_of_two_launches_on_two_ranks_one_wins_and_a_killed_one_is_gone_on_from(
    options: list[str], tmp_path: Path
) -> None:
    output = tmp_path / "run"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
    launch += "--num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no".split()
    train = ["-m", "vlmoe_cli.train", *options, "--ddp_backend", "gloo"]
    train += ["--output_dir", str(output), "--resume_from_checkpoint", "last"]

    def started(port: int, name: str) -> subprocess.Popen[bytes]:
        command = [*launch, "--main_process_port", str(port), *train]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        with open(tmp_path / name, "wb") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, env=environment)

    def first_rank(name: str, other: int = 0) -> int:
        """The process that holds the lock, as soon as there is one other than `other`."""
        end = time.monotonic() + 120
        while True:
            with contextlib.suppress(FileNotFoundError, ValueError):
                pid = json.loads((output / LOCK_FILE).read_text())["pid"]
                if pid != other:
                    return pid
            assert time.monotonic() < end, (tmp_path / name).read_text()[-2000:]
            time.sleep(0.01)

    killed = started(29631, "killed.log")
    dead = first_rank("killed.log")
    os.kill(dead, signal.SIGKILL)
    assert killed.wait(120) != 0 and (output / LOCK_FILE).exists()

    first = started(29632, "first.log")
    holder = first_rank("first.log", dead)
    os.kill(holder, signal.SIGSTOP)  # so that it has the lock, however long the second takes
    second = started(29633, "second.log")
    try:
        code, told = second.wait(120), (tmp_path / "second.log").read_text()
    finally:
        os.kill(holder, signal.SIGCONT)
    assert code != 0 and told.count("vlmoe train: error:") == 1, told
    assert f"{output} is being written to by process {holder} on" in told
    assert first.wait(180) == 0, (tmp_path / "first.log").read_text()[-2000:]
    assert model_problems(output) == []
    assert not (output / LOCK_FILE).exists()

# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Training of the upcycling benchmark's arms: to a plateau, or for a number of steps.

One recipe for all. Descriptions of pictures come first, then questions; each stage has a warm-up
and an optimizer of its own. The dense model learns from questions at the full rate, then the rate
falls to a tenth, and there it stays until two evaluations in a row bring less than 0.2 points of
validation accuracy. From this model continued arms warm up anew to the full rate, with a fresh
optimizer. An arm from scratch takes the dense model's steps and the further ones in one run at the
full rate. Over the last steps of both the rate falls to zero.
"""

import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, set_seed

from vlmoe.training.arguments import training_arguments
from vlmoe.training.checkpoints import find_checkpoint, read_state
from vlmoe.training.run import TrainResult, run
from vlmoe.training.trainer import VLMoETrainer


@dataclass(frozen=True)
class Recipe:
    """Numbers of the training, the same for every arm.

    Attributes:
        see_images, see_steps, see_learning_rate: of the stage of descriptions, as those below.
        images: of a batch of the later stage, each with all its questions.
        learning_rate, weight_decay, adam_beta2: of AdamW.
        warmup_steps: of every run.
        steady_steps: of the dense model, the warm-up among them, before its rate falls.
        decay_steps: in which a rate falls; the last of every run but the dense model's.
        low_rate: what is left of the dense model's rate then, as a share.
        evaluate_every: optimizer steps between evaluations, of the dense model on its way.
        most_steps: of the dense model, plateau or not.
        further_steps: after it.
        plateau: least gain of accuracy that counts as one.
        patience: evaluations without such a gain that make a plateau.
    """

    see_images: int = 32
    see_steps: int = 600
    see_learning_rate: float = 3e-3
    images: int = 6
    learning_rate: float = 2e-3
    weight_decay: float = 0.1
    adam_beta2: float = 0.95
    warmup_steps: int = 50
    steady_steps: int = 3000
    decay_steps: int = 500
    low_rate: float = 0.1
    evaluate_every: int = 250
    most_steps: int = 10000
    further_steps: int = 2000
    plateau: float = 0.002
    patience: int = 2

    def shortened(self, steps: int) -> "Recipe":
        """Return the same recipe with at most so many steps of every kind."""
        quarter = max(1, steps // 4)
        most = {"see_steps": steps, "most_steps": steps, "further_steps": steps}
        most |= {"steady_steps": 2 * quarter, "decay_steps": quarter}
        most |= {"evaluate_every": quarter, "warmup_steps": quarter}
        return replace(self, **{name: min(getattr(self, name), n) for name, n in most.items()})

    @property
    def least_steps(self) -> int:
        """Of the dense model: a plateau is one of the low rate."""
        return self.steady_steps + self.decay_steps + self.patience * self.evaluate_every


Rows = dict[str, Any]


def learn_to_see(
    model: Any, processor: Any, rows: Rows, recipe: Recipe, folder: Path, seed: int
) -> TrainResult:
    """Train on descriptions for `see_steps`, with a rate that falls to zero."""
    schedule = _falling(recipe.see_steps, recipe.see_steps, recipe.warmup_steps)
    schedule |= {"per_device_train_batch_size": recipe.see_images}
    schedule |= {"learning_rate": recipe.see_learning_rate}
    return _train(model, processor, rows["descriptions"], recipe, folder, seed, schedule)


def train_to_plateau(
    model: Any, processor: Any, rows: Rows, recipe: Recipe, folder: Path, seed: int
) -> TrainResult:
    """Train until validation accuracy stands still at the low rate, or for `most_steps`."""
    schedule = {
        "lr_scheduler_type": "warmup_stable_decay",
        "lr_scheduler_kwargs": {
            "num_stable_steps": recipe.steady_steps - recipe.warmup_steps,
            "num_decay_steps": recipe.decay_steps,
            "decay_type": "linear",
            "min_lr_ratio": recipe.low_rate,
        },
        "max_steps": recipe.most_steps,
        "eval_strategy": "steps",
        "eval_steps": recipe.evaluate_every,
    }
    plateau = StopAtPlateau(recipe.plateau, recipe.patience, recipe.least_steps)
    validation = rows["validation"]
    return _train(
        model, processor, rows["train"], recipe, folder, seed, schedule, plateau, validation
    )


def train_for(
    model: Any, processor: Any, rows: Rows, recipe: Recipe, folder: Path, seed: int, steps: int
) -> TrainResult:
    """Train for `steps`, the last `decay_steps` of them with a falling rate."""
    schedule = _falling(steps, recipe.decay_steps, recipe.warmup_steps)
    return _train(model, processor, rows["train"], recipe, folder, seed, schedule)


def _falling(steps: int, decay: int, warmup: int) -> dict[str, Any]:
    """Warm up, stay, and fall to zero over the last `decay` steps, the warm-up left out."""
    decay = min(decay, steps - warmup)
    return {
        "lr_scheduler_type": "warmup_stable_decay",
        "lr_scheduler_kwargs": {"num_decay_steps": decay, "decay_type": "linear"},
        "max_steps": steps,
    }


def _train(
    model: Any,
    processor: Any,
    train_rows: Any,
    recipe: Recipe,
    folder: Path,
    seed: int,
    schedule: dict[str, Any],
    plateau: "StopAtPlateau | None" = None,
    validation: Any | None = None,
) -> TrainResult:
    """Train, from the last whole checkpoint in `folder` where there is one."""
    fields: dict[str, Any] = {
        "output_dir": str(folder),
        "seed": seed,
        "per_device_train_batch_size": recipe.images,
        "per_device_eval_batch_size": 256,
        "learning_rate": recipe.learning_rate,
        "weight_decay": recipe.weight_decay,
        "adam_beta2": recipe.adam_beta2,
        "warmup_steps": recipe.warmup_steps,
        "logging_steps": min(50, recipe.evaluate_every),
        "eval_strategy": "no",
        "save_strategy": "steps",
        "save_steps": recipe.evaluate_every,
        "save_total_limit": 1,
        "report_to": "none",
        "use_cpu": True,
    }
    arguments = training_arguments(**fields | schedule)
    checkpoint = find_checkpoint("last", folder)
    if plateau and checkpoint and plateau.is_reached(read_state(checkpoint)["log_history"]):
        arguments.max_steps = read_state(checkpoint)["global_step"]  # nothing is left to train
    set_seed(seed)
    trainer = VLMoETrainer(
        model,
        arguments,
        train_dataset=train_rows,
        eval_dataset=validation,
        processing_class=processor,
    )
    trainer.add_callback(StepTimes())
    if plateau:
        trainer.add_callback(plateau)
    return run(trainer, checkpoint)


class StopAtPlateau(TrainerCallback):
    """End training when the last `patience` evaluations have not improved by `gain`.

    They are compared with the best evaluation before them, and not before `least_steps`. The
    callback reads Trainer's log, which a checkpoint keeps, and has no state.
    """

    def __init__(self, gain: float, patience: int, least_steps: int = 0):
        self.gain, self.patience, self.least_steps = gain, patience, least_steps

    def is_reached(self, log_history: list[dict[str, Any]]) -> bool:
        """Whether the log ends on a plateau."""
        evaluations = [entry for entry in log_history if "eval_exact_match" in entry]
        if not evaluations or evaluations[-1]["step"] < self.least_steps:
            return False
        found = [entry["eval_exact_match"] for entry in evaluations]
        before, last = found[: -self.patience], found[-self.patience :]
        return bool(before) and max(last) < max(before) + self.gain

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop where a plateau is reached."""
        if self.is_reached(state.log_history):
            control.should_training_stop = True


class StepTimes(TrainerCallback):
    """Add the seconds of the steps to Trainer's log, which a checkpoint keeps.

    These are the process's CPU seconds, their sum and median since the last entry, and the median
    by the clock.
    """

    def __init__(self) -> None:
        self.cpu: list[float] = []
        self.wall: list[float] = []
        self.start = 0.0, 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start both clocks; the batch has been made before."""
        self.start = time.process_time(), time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop them."""
        self.cpu.append(time.process_time() - self.start[0])
        self.wall.append(time.perf_counter() - self.start[1])

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write them down with the training loss."""
        losses = [entry for entry in state.log_history if "loss" in entry]  # others log, too
        if self.cpu and losses and "step_seconds" not in losses[-1]:
            losses[-1] |= {
                "steps_cpu_seconds": sum(self.cpu),
                "step_cpu_seconds": statistics.median(self.cpu),
                "step_seconds": statistics.median(self.wall),
            }
            self.cpu, self.wall = [], []


def times(log_history: list[dict[str, Any]]) -> dict[str, float]:
    """Median seconds of a step, by the clock and of CPU, and all CPU seconds of the steps."""
    entries = [entry for entry in log_history if "step_seconds" in entry]
    return {
        "step_seconds": statistics.median(entry["step_seconds"] for entry in entries),
        "step_cpu_seconds": statistics.median(entry["step_cpu_seconds"] for entry in entries),
        "cpu_seconds": sum(entry["steps_cpu_seconds"] for entry in entries),
    }


def one_thread() -> None:
    """Use one thread, as in every measurement of a tiny model's time."""
    torch.set_num_threads(1)

# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""`transformers.TrainingArguments` with our defaults, and checks of arguments that mislead.

Errors name the argument at fault in backticks; the commands spell it as their option.
"""

import copy
import importlib.util
import logging
from collections.abc import Collection, Mapping
from typing import Any

import torch
from transformers import IntervalStrategy, TrainingArguments
from transformers.integrations import get_available_reporting_integrations

from .argument_ranges import require_in_range

logger = logging.getLogger(__name__)

Values = dict[str, Any]
"""Training arguments by name."""

TRAINING_DEFAULTS: Values = {
    "output_dir": "outputs/train",
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "save_total_limit": 2,
    "logging_steps": 10,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.03,
    "logging_nan_inf_filter": False,
    "remove_unused_columns": False,
    "include_num_input_tokens_seen": "non_padding",
    "ddp_find_unused_parameters": False,
}
"""What differs from `TrainingArguments`; `--help` of `vlmoe train` lists it."""

# A preset's length where none is given, and its rate where none is given: three epochs at 5e-5,
# Trainer's defaults for a trained model, leave a new one where it began.
EVERY_FIFTH: Values = {
    "eval_strategy": "steps",
    "eval_steps": 0.2,
    "save_strategy": "steps",
    "save_steps": 0.2,
}
"""Evaluations and saves of a run whose length is given in steps, which may be under an epoch."""
FROM_SCRATCH_LENGTH: Values = {"max_steps": 1000, **EVERY_FIFTH}
FROM_SCRATCH_RATE: Values = {"learning_rate": 1e-3}

_OF_EVALUATION = ("load_best_model_at_end", "eval_on_start", "eval_steps", "metric_for_best_model")


def training_arguments(**values: object) -> TrainingArguments:
    """Return `TrainingArguments` with our defaults where `values` say nothing."""
    return TrainingArguments(**(training_defaults() | values))


def training_defaults() -> Values:
    """Return what differs from `TrainingArguments` on this machine."""
    has_tensorboard = importlib.util.find_spec("tensorboard") is not None
    return TRAINING_DEFAULTS | {
        "report_to": "tensorboard" if has_tensorboard else "none",
        "dataloader_pin_memory": torch.cuda.is_available(),
    }


def from_scratch_defaults(preset: str, given: Collection[str], has_evaluation: bool) -> Values:
    """Return length and rate for a preset, each where none of `given` decides it; log them.

    Args:
        preset: its name, for the log.
        given: names of the training arguments that have a value.
        has_evaluation: whether there is data to evaluate on.
    """
    length = {} if {"num_train_epochs", "max_steps"} & set(given) else FROM_SCRATCH_LENGTH
    length = _of_run(length, has_evaluation)
    rate = {} if "learning_rate" in given else FROM_SCRATCH_RATE
    defaults = {name: value for name, value in (length | rate).items() if name not in given}
    if defaults:
        chosen = ", ".join(f"{name} {value}" for name, value in defaults.items())
        logger.warning("The preset %s starts from scratch: %s.", preset, chosen)
    return defaults


def prepared_arguments(
    args: TrainingArguments | Mapping[str, object] | None, preset: str | None, has_evaluation: bool
) -> TrainingArguments:
    """Return checked arguments for our rows.

    Args:
        args: `TrainingArguments`, of which a copy is changed where our rows and callbacks need it;
            or values over our defaults.
        preset: the name of the preset that is trained from scratch, if it is one.
        has_evaluation: whether there is data to evaluate on.

    Raises:
        ValueError: a number is out of its range; as `check_arguments`.
    """
    given = vars(args) if isinstance(args, TrainingArguments) else args or {}
    for name, value in given.items():
        require_in_range(name, value)
    if isinstance(args, TrainingArguments):
        prepared = copy.copy(args)
        prepared.remove_unused_columns = False  # the collator reads `messages` and `images`
        if prepared.ddp_find_unused_parameters is None:
            prepared.ddp_find_unused_parameters = False  # every parameter gets a gradient
    else:
        values = dict(given)
        if preset is not None:
            values |= from_scratch_defaults(preset, values, has_evaluation)
        if given.get("max_steps", -1) != -1 and not EVERY_FIFTH.keys() & given.keys():
            values |= _of_run(EVERY_FIFTH, has_evaluation)
        prepared = training_arguments(**values)
    check_arguments(prepared, has_evaluation)
    if not has_evaluation:
        prepared.eval_strategy = IntervalStrategy.NO
    return prepared


def _of_run(values: Values, has_evaluation: bool) -> Values:
    """Leave the values of evaluations out of a run that has none."""
    return {
        name: value
        for name, value in values.items()
        if has_evaluation or not name.startswith("eval_")
    }


def check_arguments(arguments: TrainingArguments, has_evaluation: bool = True) -> None:
    """Refuse training arguments under which the model could not learn what it should.

    Raises:
        ValueError: names the argument and what to do.
    """
    if arguments.max_steps == 0 or arguments.max_steps < -1:
        raise ValueError(f"`max_steps` must be 1 or more, or -1, got {arguments.max_steps}.")
    _require_loggers(arguments.report_to)
    if arguments.label_smoothing_factor:
        raise ValueError(
            "`label_smoothing_factor` makes Trainer compute the loss without the router losses; "
            "leave it at 0."
        )
    if arguments.remove_unused_columns:
        raise ValueError(
            "`remove_unused_columns` drops the columns `messages` and `images`; set it to false."
        )
    if arguments.train_sampling_strategy in ("group_by_length", "batch_rebalance"):
        raise ValueError(
            f"`train_sampling_strategy` {arguments.train_sampling_strategy} needs the lengths of "
            "rows before they are collated, which conversations with images do not have; allowed: "
            "random, sequential."
        )
    if arguments.n_gpu > 1:
        raise ValueError(
            f"One process sees {arguments.n_gpu} GPUs and would cut batches by rows, which the "
            f"image inputs do not allow. Start one process per GPU: accelerate launch "
            f"--num_processes {arguments.n_gpu} -m vlmoe_cli.train ..."
        )
    for name in () if has_evaluation else _OF_EVALUATION:
        if getattr(arguments, name):
            raise ValueError(f"`{name}` needs an evaluation: give `eval_split` or `eval_dataset`.")


def _require_loggers(names: list[str]) -> None:
    """Raise `ValueError` for a logger whose package is not installed."""
    available = get_available_reporting_integrations()
    for name in names:
        if name not in available:
            allowed = ", ".join(["none", *sorted(available)])
            raise ValueError(f"`report_to` {name} cannot be used here; installed are: {allowed}.")

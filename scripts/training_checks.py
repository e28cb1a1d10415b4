# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Training arguments that nothing reads, or with which the model could not learn what it should."""

from typing import TYPE_CHECKING

from .option_ranges import RANGES, require_in_range

if TYPE_CHECKING:
    from transformers import TrainingArguments

_OF_EVALUATION = ("load_best_model_at_end", "eval_on_start", "eval_steps", "metric_for_best_model")


def check_arguments(arguments: "TrainingArguments") -> None:
    """Refuse training arguments under which the model could not learn what it should.

    Raises:
        ValueError: names the argument and what to do.
    """
    for name in RANGES:
        require_in_range(name, getattr(arguments, name, None))
    if arguments.max_steps == 0 or arguments.max_steps < -1:
        raise ValueError(f"--max_steps must be 1 or more, or -1, got {arguments.max_steps}.")
    _require_loggers(arguments.report_to)
    if arguments.label_smoothing_factor:
        raise ValueError(
            "--label_smoothing_factor makes Trainer compute the loss without the router losses; "
            "leave it at 0."
        )
    if arguments.remove_unused_columns:
        raise ValueError("--remove_unused_columns drops `messages` and `images`; set it to false.")
    if arguments.train_sampling_strategy in ("group_by_length", "batch_rebalance"):
        raise ValueError(
            f"--train_sampling_strategy {arguments.train_sampling_strategy} needs the lengths of "
            "rows before they are collated, which conversations with images do not have; allowed: "
            "random, sequential."
        )
    if arguments.n_gpu > 1:
        raise ValueError(
            f"One process sees {arguments.n_gpu} GPUs and would cut batches by rows, which the "
            f"image inputs do not allow. Start one process per GPU: accelerate launch "
            f"--num_processes {arguments.n_gpu} -m vlmoe_cli.train ..."
        )


def require_evaluation(arguments: "TrainingArguments", has_evaluation: bool) -> None:
    """Refuse what asks for an evaluation where there are no rows to evaluate on.

    Raises:
        ValueError: names the argument and what to do.
    """
    for name in () if has_evaluation else _OF_EVALUATION:
        if getattr(arguments, name):
            raise ValueError(f"--{name} needs an evaluation: give --eval_split or --eval_dataset.")


def _require_loggers(names: list[str]) -> None:
    """Raise `ValueError` for a logger whose package is not installed."""
    from transformers.integrations import get_available_reporting_integrations

    available = get_available_reporting_integrations()
    for name in names:
        if name not in available:
            allowed = ", ".join(["none", *sorted(available)])
            raise ValueError(f"--report_to {name} cannot be used here; installed are: {allowed}.")

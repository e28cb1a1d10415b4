# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Callbacks that stop a run gone wrong and show its progress."""

import math

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

REMEDY = (
    "Try a smaller learning rate, gradient clipping (`max_grad_norm`), or bf16 in place of fp16"
)

Logs = dict[str, float]
"""What Trainer logs at one step, by name."""

ROUTER = "router/"
SHOWN = ("loss", "learning_rate")
NOT_SHOWN = ("epoch", "num_input_tokens_seen", "total_flos", "_runtime", "_per_second")
"""Ends of names that are left out of the lines above the bar; the loggers have them all."""


class TrainingProgress(ProgressCallback):
    """Trainer's bar, with loss, rate and the busiest expert's load over the mean at its end.

    `RouterTelemetry` gives the loggers four numbers for each sparse layer; on the terminal they
    would drown the bar. Put it in the place of Trainer's own:

        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(TrainingProgress())
    """

    def __init__(self) -> None:
        super().__init__()
        self._shown: dict[str, str] = {}

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Logs | None = None,
        **kwargs: object,
    ) -> None:
        """Show training logs at the end of the bar, others, such as evaluations, above it."""
        logs = logs or {}
        busiest = [
            value + 1
            for name, value in logs.items()
            if name.startswith(ROUTER) and name.endswith("/max_violation")
        ]
        self._shown |= {name: f"{float(logs[name]):.4g}" for name in SHOWN if name in logs}
        if busiest:
            self._shown["busiest expert"] = f"{max(busiest):.2f}x"
        elif not set(SHOWN) & logs.keys() and not any(name.startswith(ROUTER) for name in logs):
            self._write(state, logs)
        if state.is_world_process_zero and self.training_bar is not None:
            self.training_bar.set_postfix(self._shown)

    def _write(self, state: TrainerState, logs: Logs) -> None:
        """Write a line above the bar."""
        figures = [
            f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
            for name, value in logs.items()
            if not name.endswith(NOT_SHOWN)
        ]
        if state.is_world_process_zero and self.training_bar is not None and figures:
            self.training_bar.write(f"step {state.global_step}: {', '.join(figures)}")


class TrainingPrinter(PrinterCallback):
    """Prints the logs where there is no bar, but those of the single layers' routing."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Logs | None = None,
        **kwargs: object,
    ) -> None:
        """Print training losses and evaluations."""
        if not any(name.startswith(ROUTER) for name in logs or {}):
            super().on_log(args, state, control, logs=logs, **kwargs)


class StopOnBadLoss(TrainerCallback):
    """Ends the run with an error when a logged loss is NaN or infinite.

    `Trainer` by default replaces such losses by the average of earlier ones in its log
    (`logging_nan_inf_filter`); set that to False for this callback to see them.
    """

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Logs | None = None,
        **kwargs: object,
    ) -> None:
        """Raise `ValueError` naming step and value."""
        for key, value in (logs or {}).items():
            is_loss = key == "loss" or (key.startswith("eval_") and key.endswith("_loss"))
            if is_loss and isinstance(value, float) and not math.isfinite(value):
                raise ValueError(
                    f"{key} is {value} at step {state.global_step}: training cannot go on. "
                    f"{REMEDY}; the last checkpoint is from before this step."
                )

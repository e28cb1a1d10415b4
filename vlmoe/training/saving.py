# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Saving the final model so that a kill never leaves half of one, and stopping a run gone wrong."""

import math
import shutil
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers import Trainer, TrainerCallback

from ..data.rows import ConversationRows
from ..hub.atomic_files import publish_folder, staging_folder
from ..hub.input_errors import writing
from ..hub.whole_model import require_finite_files
from .answer_accuracy import IGNORED_OUTPUTS

REMEDY = (
    "Try a smaller learning rate, gradient clipping (--max_grad_norm), or bf16 in place of fp16"
)


def save_final_model(trainer: Trainer, output_dir: str | Path) -> Path:
    """Save model, processor and training arguments into `output_dir`, beside its checkpoints.

    Files are staged in a hidden folder and moved when all are written; until the last one,
    `config.json` or that of an adapter, is there, nothing loads. All ranks must call this.

    Raises:
        ValueError: the weights, or the loss that they give, are NaN or infinite; nothing is saved.
    """
    require_finite_loss(trainer)
    output_dir = Path(output_dir)
    is_first = trainer.is_world_process_zero()
    [staging] = broadcast_object_list([staging_folder(output_dir) if is_first else None])
    with writing(output_dir):
        trainer.save_model(str(staging), _internal_call=True)  # else Trainer pushes half of it
    trainer.accelerator.wait_for_everyone()
    try:
        require_finite_files(staging)  # on all ranks, so that all end
    except ValueError:
        trainer.accelerator.wait_for_everyone()
        if is_first:
            shutil.rmtree(staging)
        raise
    trainer.accelerator.wait_for_everyone()
    if is_first:
        is_adapter = (staging / "adapter_config.json").is_file()
        publish_folder(staging, output_dir, "adapter_config.json" if is_adapter else "config.json")
    return output_dir


def require_finite_loss(trainer: Trainer) -> None:
    """Raise if the model as it is after the last step gives a loss that is NaN or infinite.

    The training loss is that before each step. Where the last step was followed by an evaluation,
    `StopOnBadLoss` has seen its loss; else the first training row is evaluated. All ranks must call
    this.
    """
    state = trainer.state
    if any("eval_loss" in e and e.get("step") == state.global_step for e in state.log_history):
        return
    first = ConversationRows([trainer.train_dataset[0]])
    prediction = trainer.predict(first, ignore_keys=IGNORED_OUTPUTS, metric_key_prefix="final")
    loss = prediction.metrics["final_loss"]
    if not math.isfinite(loss):
        raise ValueError(
            f"The loss after the last step is {loss}: the model is not saved. {REMEDY}."
        )


class StopOnBadLoss(TrainerCallback):
    """Ends the run with an error when a logged loss is NaN or infinite.

    `Trainer` by default replaces such losses by the average of earlier ones in its log
    (`logging_nan_inf_filter`); set that to False for this callback to see them.
    """

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Raise `ValueError` naming step and value."""
        for key in ("loss", "eval_loss"):
            value = (logs or {}).get(key)
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(
                    f"{key} is {value} at step {state.global_step}: training cannot go on. "
                    f"{REMEDY}; the last checkpoint is from before this step."
                )

# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""A whole training run in a folder: train or resume, evaluate, save, describe, push.

train("tiny", TrainingData("easy_vqa", eval_split="test"), {"output_dir": "outputs/tiny"})
"""

import math
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict, Unpack

from accelerate.utils import broadcast_object_list
from transformers import (
    PreTrainedModel,
    ProcessorMixin,
    Trainer,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from ..data.images import limit_images
from ..data.rows import ConversationRows
from ..hub.active_parameters import parameter_counts
from ..hub.atomic_files import publish_folder, refuse_mixing, staging_folder, write_json
from ..hub.folder_lock import launch_lock
from ..hub.input_errors import writing
from ..hub.json_files import JsonObject
from ..hub.model_card import remove_evaluations
from ..hub.provenance import RESULTS_FILE, RunOrigin, versions
from ..hub.saved_model import read_processor
from ..hub.whole_model import require_finite_files
from ..tasks.long_texts import default_on_long_rows
from .arguments import prepared_arguments
from .build import (
    ModelAndProcessor,
    ModelOptions,
    build_model,
    is_preset,
    require_same_model,
    row_texts,
)
from .callbacks import REMEDY, Logs
from .checkpoints import STATE_FILE, find_checkpoint, read_state, set_aside_newer
from .data import TrainingData, TrainingRows
from .group_lasso import GroupLasso
from .trainer import VLMoETrainer, row_collator


class LoraOptions(TypedDict):
    """Options of `add_expert_lora` for `train`."""

    r: int
    attention: bool
    dropout: float


class TrainMetrics(TypedDict):
    """What train_results.json holds; see `results`."""

    train_loss: float | None
    eval_loss: float | None
    eval_exact_match: float | None
    eval_questions: int | None
    steps: int
    epochs: float
    resumed_at_step: int | None
    train_seconds: float
    tokens: int
    tokens_per_second: float
    parameters: dict[str, int]
    seed: int
    versions: dict[str, str]


@dataclass(frozen=True)
class TrainResult:
    """A finished training.

    Attributes:
        model: the trained model.
        processor: its processor.
        metrics: what train_results.json holds.
        log_history: what Trainer logged, of the whole run, also before a resume.
        output_dir: the folder with model, processor and checkpoints.
    """

    model: PreTrainedModel
    processor: ProcessorMixin
    metrics: TrainMetrics
    log_history: list[Logs]
    output_dir: Path


def train(
    model: str,
    data: TrainingData,
    args: TrainingArguments | Mapping[str, object] | None = None,
    *,
    lora: LoraOptions | None = None,
    group_lasso: float | None = None,
    max_length: int | None = None,
    on_long_rows: str | None = None,
    **model_options: Unpack[ModelOptions],
) -> TrainResult:
    """Train in a folder that nobody else writes into; evaluate, save, and return the result.

    Args:
        model: a preset, a folder or a Hub id.
        data: what to train and evaluate on.
        args: as for `VLMoETrainer`; `resume_from_checkpoint` may also be "last".
        lora: options of `add_expert_lora`, to train an adapter of a saved model in its place.
        group_lasso: the `share` of `GroupLasso`, which makes neurons of experts zero.
        max_length: as for `VLMoETrainer`.
        on_long_rows: as for `VLMoETrainer`.
        **model_options: see `ModelOptions`.

    Raises:
        ValueError: arguments, data or checkpoint cannot be used; the message names the culprit.
        FolderInUseError: another process writes into the output folder.
        FileNotFoundError: a file or folder does not exist.
        ImportError: an optional package is missing.
        OSError: the output folder cannot be written into; the Hub cannot be reached or refuses.
    """
    preset = model if is_preset(model) else None
    arguments = prepared_arguments(args, preset, data.has_evaluation)
    with training_folder(arguments, is_adapter=lora is not None) as checkpoint:
        set_seed(arguments.seed)
        with arguments.main_process_first(desc="loading data"):
            rows = data.load()
        if lora is not None:
            built = _with_adapter(model, lora, model_options)
        else:
            processor = None if checkpoint is None else read_processor(checkpoint)
            built = build_model(model, row_texts(rows.train), processor, **model_options)
            if checkpoint is not None:
                require_same_model(built.model.config, checkpoint)
        limits = limit_images(built.processor, data.max_image_pixels, data.max_image_side)
        urls = data.allow_image_urls
        on_long_rows = on_long_rows or default_on_long_rows(data.task)
        collator = row_collator(
            *built, max_length, on_long_rows, data.task, limits=limits, allow_image_urls=urls
        )
        trainer = VLMoETrainer(
            built.model,
            arguments,
            train_dataset=rows.train,
            eval_dataset=rows.evaluation,
            processing_class=built.processor,
            data_collator=collator,
            on_long_rows=on_long_rows,
            callbacks=[GroupLasso(share=group_lasso)] if group_lasso else [],
            origin=RunOrigin(preset=preset),
        )
        used = trainer.train_dataset, getattr(trainer.eval_dataset, "rows", None)
        trainer.origin = data.origin(TrainingRows(*used), preset)  # without dropped rows
        return run(trainer, checkpoint)


@contextmanager
def training_folder(
    arguments: TrainingArguments, *, is_adapter: bool = False
) -> Iterator[Path | None]:
    """Lock the output folder for a launch; give the checkpoint to resume from, if there is one.

    Raises:
        ValueError: another run's checkpoints, or a model of another kind, are in the folder.
        FolderInUseError: another process writes there.
        FileNotFoundError: there is no such checkpoint.
        OSError: the folder cannot be written into, or the Hub refuses.
    """
    refuse_mixing(arguments.output_dir, is_adapter=is_adapter)
    with launch_lock(arguments.output_dir, arguments.should_save):
        if arguments.push_to_hub and arguments.process_index == 0:
            _ensure_repo(arguments)
        yield find_checkpoint(arguments.resume_from_checkpoint, arguments.output_dir)


def run(trainer: VLMoETrainer, checkpoint: Path | None = None) -> TrainResult:
    """Train (from `checkpoint` on), evaluate, save the model and the results, push if asked to."""
    arguments = trainer.args
    if trainer.is_world_process_zero():
        set_aside_newer(arguments.output_dir, checkpoint)
    trainer.accelerator.wait_for_everyone()
    before = {} if checkpoint is None else read_state(checkpoint)
    start = time.perf_counter()
    if checkpoint is not None and before["global_step"] >= planned_steps(trainer):
        restore_finished(trainer, checkpoint)
    else:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    seconds = time.perf_counter() - start
    if trainer.eval_dataset is not None and _last(trainer.state, "eval_loss") is None:
        trainer.evaluate()
    if trainer.is_world_process_zero():
        remove_evaluations(arguments.output_dir)
    output_dir = save_final_model(trainer, arguments.output_dir)
    metrics = results(trainer, before, seconds)
    if trainer.is_world_process_zero():
        write_json(output_dir / RESULTS_FILE, metrics)
        trainer.write_card(output_dir)
        if arguments.push_to_hub:
            _push(trainer)
    model = trainer.accelerator.unwrap_model(trainer.model)
    return TrainResult(
        model, trainer.processing_class, metrics, trainer.state.log_history, output_dir
    )


def planned_steps(trainer: Trainer) -> int:
    """Return the number of optimizer steps of the whole run."""
    return trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())[-1]


def restore_finished(trainer: Trainer, checkpoint: Path) -> None:
    """Load a checkpoint after which nothing is left to train; Trainer would train a step more."""
    if hasattr(trainer.model, "peft_config"):
        trainer.model.load_adapter(str(checkpoint), "default", is_trainable=True)
    else:
        trained = type(trainer.model).from_pretrained(checkpoint, dtype=trainer.model.dtype)
        trainer.model.load_state_dict(trained.state_dict())
    trainer.state = TrainerState.load_from_json(str(checkpoint / STATE_FILE))


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
    loss = trainer.predict(first, metric_key_prefix="final").metrics["final_loss"]
    if not math.isfinite(loss):
        raise ValueError(
            f"The loss after the last step is {loss}: the model is not saved. {REMEDY}."
        )


def results(trainer: Trainer, before: JsonObject, seconds: float) -> TrainMetrics:
    """Return what train_results.json holds: losses, speed, sizes, and what the run was.

    Seconds and tokens per second are of this session (after a resume: since then), with the
    evaluations' time left out of the speed. Tokens are those of the training rows, images
    included, padding not.

    Args:
        trainer: after training.
        before: the trainer state of the checkpoint that was resumed from; else empty.
        seconds: of this session's training.
    """
    state = trainer.state
    new_log = state.log_history[len(before.get("log_history", [])) :]
    evaluating = sum(entry.get("eval_runtime", 0.0) for entry in new_log)
    tokens = state.num_input_tokens_seen - before.get("num_input_tokens_seen", 0)
    model = trainer.accelerator.unwrap_model(trainer.model)
    return {
        "train_loss": _last_of_log(state.log_history, "loss"),
        "eval_loss": _last(state, "eval_loss"),
        "eval_exact_match": _last(state, "eval_exact_match"),
        "eval_questions": None if trainer.eval_dataset is None else len(trainer.eval_dataset),
        "steps": state.global_step,
        "epochs": state.epoch,
        "resumed_at_step": before.get("global_step"),
        "train_seconds": seconds,
        "tokens": tokens,
        "tokens_per_second": tokens / max(seconds - evaluating, 1e-9),
        "parameters": parameter_counts(model),
        "seed": trainer.args.seed,
        "versions": versions(),
    }


def _with_adapter(name: str, lora: LoraOptions, model_options: ModelOptions) -> ModelAndProcessor:
    """Build a saved model with a new LoRA adapter of its experts, which alone is trained."""
    if is_preset(name):
        raise ValueError(
            f"`lora` adapts a saved model; the preset {name!r} would start from nothing. "
            "Give `model` a folder or Hub id."
        )
    from ..lora.add import add_expert_lora

    model, processor = build_model(name, **model_options)
    return ModelAndProcessor(add_expert_lora(model, **lora), processor)


def _ensure_repo(arguments: TrainingArguments) -> None:
    from ..hub.push_to_hub import ensure_repo

    repo_id = arguments.hub_model_id or Path(arguments.output_dir).absolute().name
    ensure_repo(repo_id, arguments.hub_token, arguments.hub_private_repo)


def _push(trainer: VLMoETrainer) -> None:
    """Push the saved run in one commit; Trainer has pushed checkpoints on the way."""
    from ..hub.push_to_hub import push

    arguments = trainer.args
    push(
        arguments.output_dir,
        trainer.hub_model_id,
        revision=arguments.hub_revision,
        token=arguments.hub_token,
        message="End of training",
    )


def _last(state: TrainerState, key: str) -> float | None:
    """Return the value of `key` that was logged at the current step, if any."""
    here = [entry for entry in state.log_history if entry.get("step") == state.global_step]
    return _last_of_log(here, key)


def _last_of_log(log: list[Logs], key: str) -> float | None:
    return next((entry[key] for entry in reversed(log) if key in entry), None)

# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Train a model with `vlmoe.VLMoETrainer`, in a folder of its own.

vlmoe train --model tiny --dataset easy_vqa --eval_split test --output_dir outputs/tiny
accelerate launch --num_processes 2 -m vlmoe_cli.train --model tiny --dataset easy_vqa
"""

import copy
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from .command_line import EXIT_ERROR
from .commands import as_options
from .commands import run as run_command
from .config_file import ConfigFile
from .json_options import json_object
from .options import DataOptions, ImageOptions, LoraOptions, ModelOptions
from .shared_options import (
    Attention,
    ExpertKernels,
    ImagePixels,
    ImageSide,
    ImageUrls,
    OutsideImages,
    dropout,
    place,
    refuse_unread,
)
from .training_checks import check_arguments, require_evaluation
from .training_data import checked_rows, load_data, row_collator, texts_of
from .training_options import given_arguments, print_all_help

if TYPE_CHECKING:
    from transformers import Trainer, TrainingArguments

    from vlmoe.hub.provenance import RunOrigin
    from vlmoe.training.card_trainer import CardTrainer

MODEL, DATA, LORA = "Model", "Data", "LoRA"


@dataclass
class TrainResult:
    """A finished training.

    Attributes:
        model: the trained model.
        processor: its processor.
        metrics: what train_results.json holds.
        log_history: what Trainer logged, of the whole run, also before a resume.
        output_dir: the folder with model, processor and checkpoints.
    """

    model: Any
    processor: Any
    metrics: dict[str, Any]
    log_history: list[dict[str, Any]]
    output_dir: Path


def main(
    ctx: typer.Context,
    dataset: Annotated[
        str | None,
        typer.Option(
            parser=place,
            help="Training data: a Hub id, a file (parquet, JSON, CSV), a folder, or easy_vqa.  "
            "[required]",
            rich_help_panel=DATA,
        ),
    ] = None,
    model: Annotated[
        str,
        typer.Option(
            parser=place,
            help="A preset (tiny, small, base) to train from scratch, or a saved model (folder or "
            "Hub id).",
            rich_help_panel=MODEL,
        ),
    ] = "tiny",
    tokenizer: Annotated[
        str | None,
        typer.Option(
            parser=place,
            help="Tokenizer for a preset, folder or Hub id (default: a byte-level BPE, trained on "
            "the text of the training data).",
            rich_help_panel=MODEL,
        ),
    ] = None,
    tiling: Annotated[
        bool,
        typer.Option(
            help="Cut large images into tiles plus a thumbnail (only for a preset; a saved model "
            "keeps its setting).",
            rich_help_panel=MODEL,
        ),
    ] = False,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Number type of the weights: float32, bfloat16, ... (default: float32 for a "
            "preset, the saved one for a saved model). For mixed precision use --bf16 instead.",
            rich_help_panel=MODEL,
        ),
    ] = None,
    attn_implementation: Attention = None,
    experts_implementation: ExpertKernels = None,
    model_overrides: Annotated[
        dict[str, Any] | None,
        typer.Option(
            parser=json_object,
            metavar="JSON",
            help="Config fields to replace; sizes only in a preset. Single fields: "
            "--model.text_config.num_experts 4.",
            rich_help_panel=MODEL,
        ),
    ] = None,
    train_split: Annotated[
        str, typer.Option(help="Split to train on.", rich_help_panel=DATA)
    ] = "train",
    eval_dataset: Annotated[
        str | None,
        typer.Option(
            parser=place,
            help="Data to evaluate on during training (default: --dataset).",
            rich_help_panel=DATA,
        ),
    ] = None,
    eval_split: Annotated[
        str | None,
        typer.Option(
            help="Split to evaluate on during training. Without --eval_split and --eval_dataset "
            "there is no evaluation; with --eval_dataset alone it is test.",
            rich_help_panel=DATA,
        ),
    ] = None,
    max_train_rows: Annotated[
        int | None,
        typer.Option(min=1, help="Train on only the first N rows.", rich_help_panel=DATA),
    ] = None,
    max_eval_rows: Annotated[
        int | None,
        typer.Option(min=1, help="Evaluate on only the first N rows.", rich_help_panel=DATA),
    ] = None,
    altered_copies: Annotated[
        int,
        typer.Option(
            min=0,
            help="Add N augmented copies of each row, with images shifted by a few pixels; every "
            "second copy is mirrored.",
            rich_help_panel=DATA,
        ),
    ] = 0,
    without_images: Annotated[
        bool,
        typer.Option(help="Leave the images out: a question-only baseline.", rich_help_panel=DATA),
    ] = False,
    max_length: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="The longest sequence, in tokens (default: the model's max_position_embeddings).",
            rich_help_panel=DATA,
        ),
    ] = None,
    on_long_rows: Annotated[
        Literal["error", "drop", "shorten-prompt"],
        typer.Option(
            help="Rows with more tokens are an error, are dropped, or lose text at the start of "
            "their oldest questions, never of images and answers.",
            rich_help_panel=DATA,
        ),
    ] = "error",
    allow_outside_images: OutsideImages = False,
    allow_image_urls: ImageUrls = False,
    max_image_pixels: ImagePixels = None,
    max_image_side: ImageSide = None,
    lora: Annotated[
        bool,
        typer.Option(
            help="Train a LoRA adapter of a saved model's experts, and save only the adapter.",
            rich_help_panel=LORA,
        ),
    ] = False,
    lora_r: Annotated[
        int | None, typer.Option(min=1, help="Rank (default: 8).", rich_help_panel=LORA)
    ] = None,
    lora_attention: Annotated[
        bool,
        typer.Option(help="Adapt the text model's attention too.", rich_help_panel=LORA),
    ] = False,
    lora_dropout: Annotated[
        float | None,
        typer.Option(
            parser=dropout,
            metavar="X",
            help="Dropout on the input of the experts' adapters (default: 0).",
            rich_help_panel=LORA,
        ),
    ] = None,
    help_all: Annotated[
        bool,
        typer.Option(
            help="List all options of transformers.TrainingArguments too, and exit.",
            callback=print_all_help,
            is_eager=True,
            expose_value=False,
        ),
    ] = False,
    config: ConfigFile = None,
) -> None:
    """Train a model from a preset, or train a saved model further.

    Rows that do not fit the model or have nothing to learn are found before the first step.
    Training stops before a step whose router logits are not finite. The output folder gets the
    model, its processor, its card, checkpoints, train_results.json and router_telemetry.json. The
    same options and seed give the same numbers on the same CPU, resumed or not.

    options of transformers.TrainingArguments are options too (--help-all lists them), such as:
      --output_dir, --num_train_epochs, --max_steps, --learning_rate, --seed, --bf16,
      --per_device_train_batch_size, --gradient_accumulation_steps, --push_to_hub,
      --resume_from_checkpoint last (the newest complete checkpoint, if there is one) or a PATH
    defaults that differ from transformers:
      output_dir outputs/train, eval_strategy epoch, save_strategy epoch, save_total_limit 2,
      logging_steps 10, lr_scheduler_type cosine, warmup_steps 0.03, logging_nan_inf_filter False,
      remove_unused_columns False, include_num_input_tokens_seen non_padding,
      ddp_find_unused_parameters False
    and for a preset, a length and a learning rate, each unless given:
      max_steps 1000, eval_strategy steps, eval_steps 0.2, save_strategy steps, save_steps 0.2,
      learning_rate 0.001

    examples:
      vlmoe train --model tiny --dataset easy_vqa --eval_split test --output_dir outputs/tiny \\
        --num_train_epochs 4 --learning_rate 1e-3 --per_device_train_batch_size 16
      vlmoe train --model outputs/tiny --dataset my_data.parquet --output_dir outputs/tuned \\
        --model.text_config.router_aux_loss_coef 0
      vlmoe train --model outputs/tiny --lora --dataset my_data.parquet --output_dir outputs/adapter
      vlmoe train --config train.yaml --resume_from_checkpoint last
      accelerate launch --num_processes 2 -m vlmoe_cli.train --model tiny --dataset easy_vqa
    """
    if not lora:
        refuse_unread(
            "give --lora",
            lora_r=lora_r is not None,
            lora_attention=lora_attention,
            lora_dropout=lora_dropout is not None,
        )
    if not (eval_dataset or eval_split):
        remedy = "give --eval_split or --eval_dataset"
        refuse_unread(remedy, max_eval_rows=max_eval_rows is not None)
    if without_images:
        refuse_unread("leave out --without_images", altered_copies=altered_copies > 0)
    arguments = given_arguments(ctx)  # which names an option that is a misspelled --dataset
    if dataset is None:
        raise ValueError("Missing option '--dataset'. See `vlmoe train --help`.")

    from vlmoe.hub.folder_lock import FolderInUseError
    from vlmoe.training.run_length import advice

    from .loading import is_preset
    from .training_arguments import from_scratch_defaults, training_arguments

    if is_preset(model):
        has_evaluation = bool(eval_dataset or eval_split)
        arguments = from_scratch_defaults(model, arguments, has_evaluation) | arguments
    training = training_arguments(**arguments)
    data = DataOptions(
        dataset=dataset,
        train_split=train_split,
        eval_dataset=eval_dataset,
        eval_split=eval_split,
        max_train_rows=max_train_rows,
        max_eval_rows=max_eval_rows,
        altered_copies=altered_copies,
        without_images=without_images,
        max_length=max_length,
        on_long_rows=on_long_rows,
    )
    source = ModelOptions(
        model=model,
        tokenizer=tokenizer,
        tiling=tiling,
        dtype=dtype,
        attn_implementation=attn_implementation,
        experts_implementation=experts_implementation,
        model_overrides=None if model_overrides is None else json.dumps(model_overrides),
    )
    adapter = LoraOptions(lora, lora_r or 8, lora_attention, lora_dropout or 0.0)
    images = ImageOptions(allow_outside_images, allow_image_urls, max_image_pixels, max_image_side)
    try:
        result = train(source, data, training, adapter, images)
    except FolderInUseError:
        if training.process_index == 0:
            raise
        time.sleep(5)  # the first rank reports it for the launch, which its launcher then ends
        sys.exit(EXIT_ERROR)
    if training.process_index == 0:
        print(f"\n{results_table(result.metrics)}\n\nSaved to {result.output_dir}.")
        told = advice(result.log_history, result.metrics["steps"], is_preset(model))
        if told:
            print(f"\n{as_options(told, ctx)}")


def train(
    model_options: ModelOptions,
    data_options: DataOptions,
    arguments: "TrainingArguments",
    lora_options: LoraOptions | None = None,
    image_options: ImageOptions | None = None,
) -> TrainResult:
    """Train, evaluate, save, and return the result.

    Args:
        model_options: which model.
        data_options: which data.
        arguments: see `training_arguments.training_arguments` for ones with our defaults;
            `resume_from_checkpoint` is honoured.
        lora_options: whether to train an adapter.
        image_options: which images of the data are opened.

    Raises:
        ValueError: options, data or checkpoint are not usable; the message names the culprit.
        FolderInUseError: another process writes into the output folder.
        FileNotFoundError: a file or folder does not exist.
        ImportError: an optional package is missing.
        OSError: the output folder cannot be written into; with --push_to_hub, the Hub cannot be
            reached or refuses.
    """
    from vlmoe.hub.atomic_files import refuse_mixing
    from vlmoe.hub.folder_lock import launch_lock

    check_arguments(arguments)
    require_evaluation(arguments, bool(data_options.eval_dataset or data_options.eval_split))
    is_adapter = lora_options is not None and lora_options.lora
    refuse_mixing(arguments.output_dir, is_adapter=is_adapter)
    with launch_lock(arguments.output_dir, arguments.should_save):
        return _train(
            model_options, data_options, arguments, lora_options, image_options or ImageOptions()
        )


def _train(
    model_options: ModelOptions,
    data_options: DataOptions,
    arguments: "TrainingArguments",
    lora_options: LoraOptions | None,
    image_options: ImageOptions,
) -> TrainResult:
    """`train`, in a folder that nobody else writes into."""
    from transformers import set_seed

    from vlmoe.hub.push_to_hub import ensure_repo
    from vlmoe.training.checkpoints import find_checkpoint, set_aside_newer

    from .loading import adapter_for_training, model_for_training, set_image_limits

    if arguments.push_to_hub and arguments.process_index == 0:
        ensure_repo(
            arguments.hub_model_id or Path(arguments.output_dir).absolute().name,
            arguments.hub_token,
            arguments.hub_private_repo,
        )
    checkpoint = find_checkpoint(arguments.resume_from_checkpoint, arguments.output_dir)
    set_seed(arguments.seed)
    train_rows, eval_rows = load_data(data_options, arguments, image_options)
    if lora_options is not None and lora_options.lora:
        model, processor = adapter_for_training(model_options, lora_options)
    else:
        model, processor = model_for_training(
            model_options, lambda: texts_of(train_rows), checkpoint
        )
    set_image_limits(processor, image_options)
    collator = row_collator(
        model, processor, data_options, allow_image_urls=image_options.allow_image_urls
    )
    train_rows = checked_rows(train_rows, collator, data_options, arguments, "training")
    if eval_rows is not None:
        eval_rows = checked_rows(eval_rows, collator, data_options, arguments, "evaluation")
    trainer = build_trainer(
        model,
        processor,
        train_rows,
        eval_rows,
        arguments,
        collator,
        origin=run_origin(model_options, data_options, train_rows, eval_rows),
    )
    if trainer.is_world_process_zero():
        set_aside_newer(arguments.output_dir, checkpoint)
    trainer.accelerator.wait_for_everyone()
    return run(trainer, checkpoint)


def run_origin(
    model_options: ModelOptions, data_options: DataOptions, train_rows: Any, eval_rows: Any | None
) -> "RunOrigin":
    """What the model card tells of the model and the data that `Trainer` does not know."""
    from vlmoe.hub.provenance import RunOrigin, dataset_name

    from .loading import is_preset

    evaluation = None
    if eval_rows is not None:
        name, _ = dataset_name(data_options.eval_dataset or data_options.dataset)
        evaluation = f"{name}, {data_options.eval_split or 'test'}, {len(eval_rows):,} rows"
    return RunOrigin(
        preset=model_options.model if is_preset(model_options.model) else None,
        dataset=data_options.dataset,
        split=data_options.train_split,
        rows=len(train_rows),
        altered_copies=data_options.altered_copies,
        with_images=not data_options.without_images,
        evaluation=evaluation,
    )


def build_trainer(
    model: Any,
    processor: Any,
    train_rows: Any,
    eval_rows: Any | None,
    arguments: "TrainingArguments",
    collator: Any | None = None,
    origin: "RunOrigin | None" = None,
) -> "CardTrainer":
    """A `Trainer` for conversational rows that writes the model card with every save.

    `collator` is by default one that allows as many tokens as the model has positions.
    """
    from transformers import IntervalStrategy
    from transformers.trainer_callback import ProgressCallback

    from vlmoe.data.rows import ConversationRows
    from vlmoe.routing.balancing import RouterBiasCallback
    from vlmoe.routing.expert_load import has_experts
    from vlmoe.routing.finite_checks import StopOnNonFiniteRouting
    from vlmoe.training.answer_accuracy import answer_accuracy, most_likely_tokens
    from vlmoe.training.card_trainer import CardTrainer
    from vlmoe.training.progress import TrainingProgress
    from vlmoe.training.saving import StopOnBadLoss
    from vlmoe.training.telemetry import RouterTelemetry

    if eval_rows is None:
        arguments = copy.copy(arguments)
        arguments.eval_strategy = IntervalStrategy.NO
    callbacks: list[Any] = [StopOnBadLoss(), StopOnNonFiniteRouting()]
    is_adapter = hasattr(model, "peft_config")  # what it adapts stays as it is, biases too
    if model.config.text_config.router_bias_update_rate and not is_adapter:
        callbacks.append(RouterBiasCallback())
    trainer = CardTrainer(
        model=model,
        args=arguments,
        data_collator=collator or row_collator(model, processor, DataOptions()),
        train_dataset=train_rows,
        eval_dataset=None if eval_rows is None else ConversationRows(eval_rows),
        processing_class=processor,
        compute_metrics=answer_accuracy,
        preprocess_logits_for_metrics=most_likely_tokens,
        callbacks=callbacks,
        origin=origin,
    )
    if not arguments.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(TrainingProgress())
    if has_experts(model):
        trainer.add_callback(RouterTelemetry(trainer))
    return trainer


def run(trainer: "CardTrainer", checkpoint: Path | None = None) -> TrainResult:
    """Train (from `checkpoint` on), evaluate, save the model and the results."""
    from vlmoe.hub.atomic_files import write_json
    from vlmoe.hub.model_card import remove_evaluations
    from vlmoe.hub.provenance import RESULTS_FILE
    from vlmoe.training.answer_accuracy import IGNORED_OUTPUTS
    from vlmoe.training.checkpoints import read_state
    from vlmoe.training.saving import save_final_model

    before = {} if checkpoint is None else read_state(checkpoint)
    start = time.perf_counter()
    if checkpoint is not None and before["global_step"] >= planned_steps(trainer):
        restore_finished(trainer, checkpoint)
    else:
        trainer.train(
            resume_from_checkpoint=None if checkpoint is None else str(checkpoint),
            ignore_keys_for_eval=IGNORED_OUTPUTS,
        )
    seconds = time.perf_counter() - start
    if trainer.eval_dataset is not None and _last(trainer.state, "eval_loss") is None:
        trainer.evaluate(ignore_keys=IGNORED_OUTPUTS)
    if trainer.is_world_process_zero():
        remove_evaluations(trainer.args.output_dir)
    output_dir = save_final_model(trainer, trainer.args.output_dir)
    metrics = results(trainer, before, seconds)
    if trainer.is_world_process_zero():
        write_json(output_dir / RESULTS_FILE, metrics)
        trainer.write_card(output_dir)
        if trainer.args.push_to_hub:
            push_run(trainer)
    model = trainer.accelerator.unwrap_model(trainer.model)
    return TrainResult(
        model, trainer.processing_class, metrics, trainer.state.log_history, output_dir
    )


def push_run(trainer: "CardTrainer") -> None:
    """Push the saved run as `vlmoe push` does; Trainer has pushed checkpoints on the way."""
    from vlmoe.hub.push_to_hub import push

    arguments = trainer.args
    push(
        arguments.output_dir,
        trainer.hub_model_id,
        revision=arguments.hub_revision,
        token=arguments.hub_token,
        message="End of training",
    )


def planned_steps(trainer: "Trainer") -> int:
    """Optimizer steps of the whole run."""
    return trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())[-1]


def restore_finished(trainer: "Trainer", checkpoint: Path) -> None:
    """Load a checkpoint after which nothing is left to train; Trainer would train a step more."""
    from transformers import TrainerState

    from vlmoe.training.checkpoints import STATE_FILE

    if hasattr(trainer.model, "peft_config"):
        trainer.model.load_adapter(str(checkpoint), "default", is_trainable=True)
        trainer.state = TrainerState.load_from_json(str(checkpoint / STATE_FILE))
        return
    trained = type(trainer.model).from_pretrained(checkpoint, dtype=trainer.model.dtype)
    trainer.model.load_state_dict(trained.state_dict())
    trainer.state = TrainerState.load_from_json(str(checkpoint / STATE_FILE))


def results(trainer: "Trainer", before: dict[str, Any], seconds: float) -> dict[str, Any]:
    """What train_results.json holds: losses, speed, sizes, and what the run was.

    Seconds and tokens per second are of this session (after a resume: since then), with the
    evaluations' time left out of the speed. Tokens are those of the training rows, images
    included, padding not.
    """
    from vlmoe.hub.provenance import versions

    state, arguments = trainer.state, trainer.args
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
        "parameters": model.active_parameters(),
        "seed": arguments.seed,
        "versions": versions(),
    }


def results_table(metrics: dict[str, Any]) -> str:
    """The results as text, one line each."""
    parameters = metrics["parameters"]
    rows = {
        "optimizer steps": f"{metrics['steps']:,} ({metrics['epochs']:.3g} epochs)",
        "training loss (last logged)": _number(metrics["train_loss"]),
        "evaluation loss": _number(metrics["eval_loss"]),
        "evaluation exact match": _number(metrics["eval_exact_match"], ".2%"),
        "seconds": f"{metrics['train_seconds']:,.1f}",
        "training tokens per second": f"{metrics['tokens_per_second']:,.0f}",
        "parameters": f"{parameters['total']:,}",
        "active per image token": f"{parameters['image_token']:,}",
        "active per text token": f"{parameters['text_token']:,}",
    }
    return "\n".join(f"{name:<28} {value:>18}" for name, value in rows.items())


def _number(value: float | None, form: str = ".4f") -> str:
    return "-" if value is None else format(value, form)


def _last(state: Any, key: str) -> float | None:
    """The value of `key` that was logged at the current step, if any."""
    here = [entry for entry in state.log_history if entry.get("step") == state.global_step]
    return _last_of_log(here, key)


def _last_of_log(log: list[dict[str, Any]], key: str) -> float | None:
    return next((entry[key] for entry in reversed(log) if key in entry), None)


if __name__ == "__main__":
    sys.exit(run_command("train", main))

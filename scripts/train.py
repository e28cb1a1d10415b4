# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Train a model with `vlmoe.VLMoETrainer`, in a folder of its own.

vlmoe train --model tiny --dataset easy_vqa --eval_split test --output_dir outputs/tiny
accelerate launch --num_processes 2 -m vlmoe_cli.train --model tiny --dataset easy_vqa
"""

import sys
import time
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from .command_line import EXIT_ERROR
from .commands import as_options, run
from .config_file import SOURCES, ConfigFile
from .json_options import Fields, json_object, sources
from .shared_options import (
    Attention,
    ExpertKernels,
    ImagePixels,
    ImageSide,
    ImageUrls,
    OutsideImages,
    Prompt,
    TaskName,
    dropout,
    finite,
    place,
    refuse_unread,
)
from .training_options import given_arguments, print_all_help

if TYPE_CHECKING:
    from vlmoe.training.run import TrainMetrics

MODEL, DATA, LORA = "Model", "Data", "LoRA"


def main(
    ctx: typer.Context,
    dataset: Annotated[
        str | None,
        typer.Option(
            parser=sources,
            metavar=SOURCES,
            help="Training data: a Hub id, a file (parquet, JSON, CSV), a folder, or easy_vqa; or "
            "a list of {source, split, task, prompt, weight}, in JSON or in --config.  [required]",
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
        Fields | None,
        typer.Option(
            parser=json_object,
            metavar="JSON",
            help="Config fields to replace; sizes only in a preset. Single fields: "
            "--model.text_config.num_experts 4.",
            rich_help_panel=MODEL,
        ),
    ] = None,
    group_lasso: Annotated[
        float | None,
        typer.Option(
            parser=finite,
            metavar="X",
            help="Shrink the neurons of experts, by X of their median norm over the run, so that "
            "those that the task does not need become zero (about 1 or more; default: off). "
            "`vlmoe prune` then cuts them off.",
            rich_help_panel=MODEL,
        ),
    ] = None,
    task: TaskName = None,
    prompt: Prompt = None,
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
        Literal["error", "drop", "shorten-prompt"] | None,
        typer.Option(
            help="Rows with more tokens are an error, are dropped, or lose text at the start of "
            "their oldest questions (of documents and texts to translate: at the end), never of "
            "images and answers (default: error; for those two tasks shorten-prompt).",
            rich_help_panel=DATA,
        ),
    ] = None,
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
    with max_steps, unless one of them is given:
      eval_strategy steps, eval_steps 0.2, save_strategy steps, save_steps 0.2
    and for a preset, a length and a learning rate, each unless given:
      max_steps 1000, learning_rate 0.001

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
    else:
        refuse_unread("leave out --lora", group_lasso=bool(group_lasso))
    if not (eval_dataset or eval_split):
        remedy = "give --eval_split or --eval_dataset"
        refuse_unread(remedy, max_eval_rows=max_eval_rows is not None)
    if without_images:
        refuse_unread("leave out --without_images", altered_copies=altered_copies > 0)
    arguments = given_arguments(ctx)  # which names an option that is a misspelled --dataset
    if dataset is None:
        raise ValueError("Missing option '--dataset'. See `vlmoe train --help`.")

    from vlmoe.hub.folder_lock import FolderInUseError
    from vlmoe.training.arguments import prepared_arguments
    from vlmoe.training.build import is_preset
    from vlmoe.training.data import TrainingData
    from vlmoe.training.run import LoraOptions, train
    from vlmoe.training.run_length import advice

    preset = model if is_preset(model) else None
    training = prepared_arguments(arguments, preset, bool(eval_dataset or eval_split))
    data = TrainingData(
        dataset=dataset,
        train_split=train_split,
        eval_dataset=eval_dataset,
        eval_split=eval_split,
        max_train_rows=max_train_rows,
        max_eval_rows=max_eval_rows,
        altered_copies=altered_copies,
        without_images=without_images,
        task=task,
        prompt=prompt,
        allow_outside_images=allow_outside_images,
        allow_image_urls=allow_image_urls,
        max_image_pixels=max_image_pixels,
        max_image_side=max_image_side,
    )
    adapter: LoraOptions = {
        "r": lora_r or 8,
        "attention": lora_attention,
        "dropout": lora_dropout or 0.0,
    }
    try:
        result = train(
            model,
            data,
            training,
            lora=adapter if lora else None,
            group_lasso=group_lasso,
            max_length=max_length,
            on_long_rows=on_long_rows,
            tokenizer=tokenizer,
            tiling=tiling,
            dtype=dtype,
            attn_implementation=attn_implementation,
            experts_implementation=experts_implementation,
            model_overrides=model_overrides,
        )
    except FolderInUseError:
        if training.process_index == 0:
            raise
        time.sleep(5)  # the first rank reports it for the launch, which its launcher then ends
        sys.exit(EXIT_ERROR)
    if training.process_index == 0:
        print(f"\n{results_table(result.metrics)}\n\nSaved to {result.output_dir}.")
        short = advice(result.log_history, result.metrics["steps"], preset is not None)
        if short:
            print(f"\n{as_options(short, ctx)}")


def results_table(metrics: "TrainMetrics") -> str:
    """Format the results as text, one line each."""
    parameters = metrics["parameters"]
    rows = {
        "optimizer steps": f"{metrics['steps']:,} ({metrics['epochs']:.3g} epochs)",
        "training loss (last logged)": _number(metrics["train_loss"]),
        "evaluation loss": _number(metrics["eval_loss"]),
        "evaluation exact match": _number(metrics["eval_exact_match"], ".2%"),
        "seconds": f"{metrics['train_seconds']:,.1f}",
        "training tokens per second": f"{metrics['tokens_per_second']:,.0f}",
        "parameters": f"{parameters['total']:,}",
    }
    for kind, count in parameters.items():
        if kind != "total":
            rows[f"active per {kind.replace('_', ' ')}"] = f"{count:,}"
    return "\n".join(f"{name:<28} {value:>18}" for name, value in rows.items())


def _number(value: float | None, form: str = ".4f") -> str:
    return "-" if value is None else format(value, form)


if __name__ == "__main__":
    sys.exit(run("train", main))

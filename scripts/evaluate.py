# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Let a saved model answer the questions of a dataset, and count the right answers.

    vlmoe evaluate --model outputs/tiny --dataset easy_vqa --split test --batch_size 256

Answers are generated greedily in batches; a table shows the exact match of each question type, and
a JSON file keeps it, with the load of the experts. In a model's own folder its card tells both.
"""

import dataclasses
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from .commands import run
from .config_file import ConfigFile
from .options import EvaluateOptions, ImageOptions, RuntimeOptions
from .shared_options import (
    AnswerTokens,
    Attention,
    Dataset,
    Device,
    Dtype,
    ExpertKernels,
    ImagePixels,
    ImageSide,
    ImageUrls,
    OutsideImages,
    Rows,
    SavedModel,
    place,
)


def main(
    model: SavedModel,
    dataset: Dataset,
    split: Annotated[str, typer.Option(help="Split to evaluate on.")] = "test",
    max_rows: Rows = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions per batch.")] = 64,
    max_new_tokens: AnswerTokens = 32,
    max_length: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="The longest prompt, in tokens; a longer one is an error (default: the model's "
            "max_position_embeddings less the answer).",
        ),
    ] = None,
    without_images: Annotated[
        bool, typer.Option(help="Leave the images out: a question-only baseline.")
    ] = False,
    output: Annotated[
        str | None,
        typer.Option(
            parser=place,
            metavar="FILE",
            help="JSON file for the results (default: evaluate_results.json in the model folder, "
            "or in the current folder for a model of the Hub).",
        ),
    ] = None,
    save_predictions: Annotated[
        str | None,
        typer.Option(
            parser=place, metavar="FILE", help="JSON file for every question, answer and truth."
        ),
    ] = None,
    allow_outside_images: OutsideImages = False,
    allow_image_urls: ImageUrls = False,
    max_image_pixels: ImagePixels = None,
    max_image_side: ImageSide = None,
    device: Device = None,
    dtype: Dtype = None,
    attn_implementation: Attention = None,
    experts_implementation: ExpertKernels = None,
    config: ConfigFile = None,
) -> None:
    """Measure how many questions of a dataset a model answers correctly.

    Answers are generated greedily, in batches. The command prints the exact match per question type
    and writes it, with the load of the experts, to a JSON file. In a local model folder the model
    card is updated too.

    examples:
      vlmoe evaluate --model outputs/tiny --dataset easy_vqa --split test --batch_size 256
      vlmoe evaluate --model outputs/tiny --dataset my_data.parquet --split train \\
        --output results.json --save_predictions predictions.json
    """
    options = EvaluateOptions(
        model=model,
        dataset=dataset,
        split=split,
        batch_size=batch_size,
        max_rows=max_rows,
        max_new_tokens=max_new_tokens,
        max_length=max_length,
        without_images=without_images,
        output=output,
        save_predictions=save_predictions,
    )
    images = ImageOptions(allow_outside_images, allow_image_urls, max_image_pixels, max_image_side)
    runtime = RuntimeOptions(device, dtype, attn_implementation, experts_implementation)
    results = evaluate(options, runtime, images)
    from vlmoe.training.evaluation import results_table

    print(f"\n{results_table(results)}\n\nWritten to {results_path(options)}.")


def evaluate(
    options: EvaluateOptions, runtime: RuntimeOptions, images: ImageOptions | None = None
) -> dict[str, Any]:
    """Load, evaluate, and write the results; see `evaluate_model` for what they hold.

    Raises:
        ValueError: an option, the model or the data are not usable, or another process writes into
            the model's folder, where the results are to go.
        FileNotFoundError: a file or folder does not exist.
        OSError: the results could not be written.
    """
    with _place_for_results(options):
        return _evaluate(
            str(options.model), str(options.dataset), options, runtime, images or ImageOptions()
        )


def _evaluate(
    source: str,
    dataset: str,
    options: EvaluateOptions,
    runtime: RuntimeOptions,
    images: ImageOptions,
) -> dict[str, Any]:
    from vlmoe.data.loading import load_rows
    from vlmoe.hub.atomic_files import write_json
    from vlmoe.hub.provenance import dataset_name
    from vlmoe.routing.expert_load import has_experts, record_expert_load
    from vlmoe.training.evaluation import evaluate_model

    from .loading import model_for_answers, set_image_limits

    rows = load_rows(
        dataset,
        options.split,
        limit=options.max_rows,
        with_images=not options.without_images,
        allow_outside_images=images.allow_outside_images,
        allow_image_urls=images.allow_image_urls,
    )
    model, processor = model_for_answers(source, runtime)
    set_image_limits(processor, images)
    with record_expert_load(model) if has_experts(model) else nullcontext() as load:
        results = evaluate_model(
            model,
            processor,
            rows,
            options.batch_size,
            max_new_tokens=options.max_new_tokens,
            max_length=options.max_length,
            allow_image_urls=images.allow_image_urls,
        )
    predictions = results.pop("predictions")
    results["dataset"] = dataset_name(dataset)[0]
    results["expert_load"] = load.as_dict() if load is not None else None
    settings = dataclasses.asdict(options) | dataclasses.asdict(runtime)
    for path in ("model", "dataset", "output", "save_predictions"):
        del settings[path]  # the file may be published with the model
    write_json(results_path(options), results | {"options": settings})
    if options.save_predictions:
        write_json(Path(options.save_predictions).expanduser(), predictions)
    if folder := _own_folder(options):
        complete_card(folder, results["expert_load"])
    return results | {"predictions": predictions}


@contextmanager
def _place_for_results(options: EvaluateOptions) -> Iterator[None]:
    """Find out before the work whether its results can be written; a model's own folder is locked.

    A file elsewhere is written whole, by whomever: it needs no lock.
    """
    from vlmoe.hub.folder_lock import folder_lock, require_writable

    for path in (results_path(options), options.save_predictions):
        if path:
            require_writable(path)
    folder = _own_folder(options)
    with folder_lock(folder) if folder else nullcontext():
        yield


def _own_folder(options: EvaluateOptions) -> Path | None:
    """The model's folder, if the results go there, into the file that its card tells of."""
    from vlmoe.hub.card_results import EVALUATION_FILE

    folder = Path(options.model or "").expanduser()
    is_own = results_path(options).resolve() == (folder / EVALUATION_FILE).resolve()
    return folder if folder.is_dir() and is_own else None


def complete_card(folder: Path, expert_load: dict[str, Any] | None) -> None:
    """Draw the experts' load and write the model card anew, in the model's folder."""
    from vlmoe.figures.plots import plot_expert_load
    from vlmoe.hub.model_card import PICTURE_FILE, write_model_card

    if expert_load is not None and expert_load["layers"]:
        shares = expert_load["image_share"], expert_load["text_share"]
        plot_expert_load(*shares, folder / PICTURE_FILE)
    write_model_card(folder)


def results_path(options: EvaluateOptions) -> Path:
    """Where the results are written."""
    from vlmoe.hub.card_results import EVALUATION_FILE

    if options.output:
        return Path(options.output).expanduser()
    folder = Path(options.model or "").expanduser()
    return (folder if folder.is_dir() else Path()) / EVALUATION_FILE


if __name__ == "__main__":
    sys.exit(run("evaluate", main))

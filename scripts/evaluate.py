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
from typing import Any

from .command_line import run_command
from .option_parser import command_options, require
from .options import EvaluateOptions, ImageOptions, RuntimeOptions

EPILOG = """\
examples:
  vlmoe evaluate --model outputs/tiny --dataset easy_vqa --split test --batch_size 256
  vlmoe evaluate --model outputs/tiny --dataset my_data.parquet --split train \\
    --output results.json --save_predictions predictions.json"""


def main(argv: list[str]) -> None:
    """Run `vlmoe evaluate`."""
    parsed = command_options(
        argv,
        [EvaluateOptions, ImageOptions, RuntimeOptions],
        usage="vlmoe evaluate --model MODEL --dataset DATASET [options]",
        description="Count the right answers of a model to the questions of a dataset.",
        epilog=EPILOG,
    )
    if parsed is None:
        return
    options, images, runtime, _ = parsed
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
    source = require(options.model, "model", "evaluate")
    dataset = require(options.dataset, "dataset", "evaluate")
    with _place_for_results(options):
        return _evaluate(source, dataset, options, runtime, images or ImageOptions())


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
    from vlmoe.hub.model_card import EVALUATION_FILE

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
    from vlmoe.hub.model_card import EVALUATION_FILE

    if options.output:
        return Path(options.output).expanduser()
    folder = Path(options.model or "").expanduser()
    return (folder if folder.is_dir() else Path()) / EVALUATION_FILE


if __name__ == "__main__":
    sys.exit(run_command("vlmoe evaluate", main))

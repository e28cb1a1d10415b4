# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""The subcommand `vlmoe evaluate`: exact match of a saved model on a dataset."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from .commands import run
from .config_file import ConfigFile
from .shared_options import (
    Attention,
    Dataset,
    Device,
    Dtype,
    ExpertKernels,
    ImagePixels,
    ImageSide,
    ImageUrls,
    OutsideImages,
    Prompt,
    Rows,
    SavedModel,
    TaskName,
    comma_list,
    place,
)

if TYPE_CHECKING:
    from vlmoe.hub.json_files import JsonObject
    from vlmoe.training.evaluation import AskingOptions


def main(
    model: SavedModel,
    dataset: Dataset,
    split: Annotated[str, typer.Option(help="Split to evaluate on.")] = "test",
    task: TaskName = None,
    prompt: Prompt = None,
    max_rows: Rows = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions per batch.")] = 64,
    labels: Annotated[
        list[str] | None,
        typer.Option(
            parser=comma_list,
            metavar="A,B",
            help="All answers that are possible, with commas between them or one an option; their "
            "likelihood is compared, too.",
        ),
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="The longest answer, in tokens (default: the task's, or 32)."),
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="The longest prompt, in tokens (default: the model's max_position_embeddings less "
            "the answer).",
        ),
    ] = None,
    on_long_rows: Annotated[
        Literal["error", "shorten-prompt"] | None,
        typer.Option(
            help="Longer prompts are an error or are shortened, as in training (default: error; "
            "for documents and texts to translate shorten-prompt)."
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
    and the metrics of the task, and writes them, with the load of the experts, to a JSON file. In a
    local model folder the model card is updated too.

    With --task image-text-retrieval nothing is asked: images and captions are embedded, and the
    command measures how well each finds the other.

    examples:
      vlmoe evaluate --model outputs/tiny --dataset easy_vqa --split test --batch_size 256
      vlmoe evaluate --model outputs/tiny --dataset pets --task image-classification \\
        --labels cat,dog
      vlmoe evaluate --model outputs/tiny --dataset pairs.parquet --task image-text-retrieval
      vlmoe evaluate --model outputs/tiny --dataset my_data.parquet --split train \\
        --output results.json --save_predictions predictions.json
    """
    from vlmoe.hub.card_results import EVALUATION_FILE

    own = Path(model).expanduser()
    results = Path(output) if output else (own if own.is_dir() else Path()) / EVALUATION_FILE
    is_own = own.is_dir() and results.resolve() == (own / EVALUATION_FILE).resolve()
    with _place_for_results([results, save_predictions], own if is_own else None):
        from vlmoe import evaluate, load_rows
        from vlmoe.data.images import limit_images
        from vlmoe.hub.atomic_files import write_json
        from vlmoe.hub.provenance import dataset_name
        from vlmoe.training.build import Runtime, model_for_answers
        from vlmoe.training.evaluation import Evaluation
        from vlmoe.training.retrieval import (
            RETRIEVAL_TASK,
            RetrievalEvaluation,
            evaluate_retrieval_rows,
        )

        rows = load_rows(
            dataset,
            split,
            task=task,
            prompt=prompt,
            limit=max_rows,
            with_images=not without_images,
            allow_outside_images=allow_outside_images,
            allow_image_urls=allow_image_urls,
        )
        runtime = Runtime(device, dtype, attn_implementation, experts_implementation)
        asking: AskingOptions = {
            "task": task,
            "labels": [name for names in labels for name in names] if labels else None,
            "batch_size": batch_size,
            "max_new_tokens": max_new_tokens,
            "max_length": max_length,
            "on_long_rows": on_long_rows,
        }
        evaluation: Evaluation | RetrievalEvaluation
        if task == RETRIEVAL_TASK:
            of_answers = {"save_predictions": save_predictions, "prompt": prompt, **asking}
            refuse_options_of_answers(of_answers | asdict(runtime), without_images)
            from vlmoe import embedding_model  # needs the extra

            embedder = embedding_model(model, device=device)
            limits = limit_images(embedder[0].processor, max_image_pixels, max_image_side)
            evaluation = evaluate_retrieval_rows(
                embedder,
                rows,
                batch_size=batch_size,
                image_limits=limits,
                allow_image_urls=allow_image_urls,
            )
        else:
            network, processor = model_for_answers(model, runtime)
            limits = limit_images(processor, max_image_pixels, max_image_side)
            evaluation = evaluate(
                network,
                processor,
                rows,
                **asking,
                image_limits=limits,
                allow_image_urls=allow_image_urls,
                progress=True,
            )
        settings = asking | {"split": split, "max_rows": max_rows, "without_images": without_images}
        settings |= {"prompt": prompt}
        settings |= asdict(runtime)  # no paths: the file may be published
        about = {"dataset": dataset_name(dataset)[0], "options": settings}
        write_json(results, evaluation.as_dict() | about)
        if save_predictions and isinstance(evaluation, Evaluation):
            write_json(Path(save_predictions), evaluation.predictions)
        if is_own:
            complete_card(own, evaluation.as_dict()["expert_load"])
    print(f"\n{evaluation.table()}\n\nWritten to {results}.")


@contextmanager
def _place_for_results(paths: list[Path | str | None], folder: Path | None) -> Iterator[None]:
    """Find out before the work whether its results can be written, and lock the model's folder.

    A file elsewhere needs no lock: it is written atomically.
    """
    from vlmoe.hub.folder_lock import folder_lock, require_writable

    for path in paths:
        if path:
            require_writable(path)
    with folder_lock(folder) if folder else nullcontext():
        yield


def refuse_options_of_answers(given: "JsonObject", without_images: bool) -> None:
    """Refuse options that retrieval, which asks nothing, would ignore.

    Raises:
        ValueError: there are some; the message names them.
    """
    kept = ("task", "batch_size", "device")
    wrong = [name for name, value in given.items() if value is not None and name not in kept]
    wrong += ["without_images"] if without_images else []
    if wrong:
        raise ValueError(
            f"--task image-text-retrieval embeds and does not answer: leave out "
            f"{', '.join(f'--{name}' for name in wrong)}."
        )


def complete_card(folder: Path, expert_load: "JsonObject | None") -> None:
    """Draw the expert load, and update the model card in the model's folder."""
    from vlmoe.figures.plots import plot_expert_load
    from vlmoe.hub.model_card import PICTURE_FILE, write_model_card

    if expert_load is not None and expert_load["layers"]:
        shares = expert_load["image_share"], expert_load["text_share"]
        plot_expert_load(*shares, folder / PICTURE_FILE)
    write_model_card(folder)


if __name__ == "__main__":
    sys.exit(run("evaluate", main))

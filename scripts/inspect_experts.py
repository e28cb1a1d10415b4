# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Show where a saved model sends its tokens, as one HTML page with pictures.

    vlmoe inspect --model outputs/tiny --dataset easy_vqa --output_dir outputs/inspect

The page holds the experts' load, questions token by token, images under their experts' colours,
experts by type of question, and with --before what training changed. `inspection.json` keeps the
numbers.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .commands import run
from .config_file import ConfigFile
from .options import ImageOptions, InspectOptions, RuntimeOptions
from .shared_options import (
    AnswerTokens,
    Attention,
    Device,
    Dtype,
    ExpertKernels,
    ImagePixels,
    ImageSide,
    ImageUrls,
    OutsideImages,
    Pictures,
    SavedModel,
    limit_images,
    place,
    text,
)

if TYPE_CHECKING:
    from vlmoe.routing.inspection.report import Inspection
    from vlmoe.routing.inspection.tokens import TracedPrompt

PAGE_FILE, NUMBERS_FILE = "inspection.html", "inspection.json"
PROMPTS_SHOWN = 3


def main(
    model: SavedModel,
    question: Annotated[
        str | None,
        typer.Argument(
            parser=text, help="What to ask. Without it, questions of the dataset are shown."
        ),
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(
            parser=place,
            help="Data: a Hub id, a file (parquet, JSON, CSV), a folder, or easy_vqa.",
        ),
    ] = None,
    split: Annotated[str, typer.Option(help="Split of the dataset.")] = "test",
    max_rows: Annotated[int, typer.Option(min=1, help="Run only the first N rows.")] = 200,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions per batch.")] = 32,
    image: Pictures = None,
    max_new_tokens: AnswerTokens = 32,
    before: Annotated[
        str | None,
        typer.Option(
            parser=place,
            metavar="MODEL",
            help="An earlier state of the model to compare with, such as before training.",
        ),
    ] = None,
    output_dir: Annotated[
        str,
        typer.Option(
            parser=place, metavar="FOLDER", help="Folder for the page, its figures and the numbers."
        ),
    ] = "outputs/inspect",
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
    """Show on one page to which experts a model routes the tokens of data or of a question.

    The page holds the expert load, prompts token by token, images colored by expert, experts by
    question type, and with --before the changes since an earlier state. `inspection.json` holds the
    numbers.

    examples:
      vlmoe inspect --model outputs/tiny --dataset easy_vqa --split test --max_rows 200
      vlmoe inspect --model outputs/tiny --image picture.png "what shape is in the image?"
      vlmoe inspect --model outputs/tiny --dataset easy_vqa --before outputs/untrained
    """
    options = InspectOptions(
        model=model,
        dataset=dataset,
        split=split,
        max_rows=max_rows,
        batch_size=batch_size,
        image=image,
        max_new_tokens=max_new_tokens,
        before=before,
        output_dir=output_dir,
    )
    images = ImageOptions(allow_outside_images, allow_image_urls, max_image_pixels, max_image_side)
    runtime = RuntimeOptions(device, dtype, attn_implementation, experts_implementation)
    inspection = inspect_experts(question, options, runtime, images)
    from vlmoe.routing.inspection.analysis import inspection_table

    if inspection.routing is not None:
        print(f"\n{inspection_table(inspection.routing, inspection.types)}")
    print(f"\nWritten to {Path(output_dir) / PAGE_FILE}: open it in a browser.")


def inspect_experts(
    question: str | None,
    options: InspectOptions,
    runtime: RuntimeOptions,
    images: ImageOptions | None = None,
) -> "Inspection":
    """Load, run, draw, and write the page, its pictures and the numbers.

    Raises:
        ValueError: an option, the model, an image or the data are not usable, or another process
            writes into the output folder.
        FileNotFoundError: a file or folder does not exist.
        OSError: the output folder cannot be written into.
    """
    _check(question, options)
    from vlmoe.hub.folder_lock import folder_lock

    with folder_lock(options.output_dir):
        return _inspect(str(options.model), question, options, runtime, images or ImageOptions())


def _inspect(
    source: str,
    question: str | None,
    options: InspectOptions,
    runtime: RuntimeOptions,
    images: ImageOptions,
) -> "Inspection":
    from vlmoe.hub.provenance import dataset_name
    from vlmoe.routing.inspection.analysis import dataset_routing, specialisation
    from vlmoe.routing.inspection.report import Inspection
    from vlmoe.training.build import check_model_source, model_for_answers

    if options.before:
        check_model_source(options.before)
    rows = _rows(options, images)
    model, processor = model_for_answers(source, **vars(runtime))
    limit_images(processor, images.max_image_pixels, images.max_image_side)
    if question:
        prompts = [_asked(model, processor, question, options)]
    else:
        prompts = _from_rows(model, processor, rows, options, images)
    routing = prompts[0].routing
    inspection = Inspection(
        model=_short(source),
        layers=routing.layers,
        num_experts=routing.num_experts,
        top_k=routing.experts.shape[-1],
        prompts=prompts,
    )
    if rows is not None:
        name = dataset_name(options.dataset)[0]
        inspection.dataset = f"{name}, {options.split}, {len(rows):,} rows"
        inspection.routing = dataset_routing(
            model,
            processor,
            rows,
            options.batch_size,
            allow_image_urls=images.allow_image_urls,
        )
        inspection.types = specialisation(
            inspection.routing.counts, inspection.routing.question_types
        )
    del model
    if options.before:
        inspection.before = _before(inspection, rows, options, runtime, images)
    write(inspection, Path(options.output_dir))
    return inspection


def write(inspection: "Inspection", folder: Path) -> None:
    """Draw the pictures, and write the page and the numbers."""
    from vlmoe.hub.atomic_files import write_json
    from vlmoe.routing.inspection.figures import plot_image_experts
    from vlmoe.routing.inspection.page import write_page
    from vlmoe.routing.inspection.report import draw_figures, numbers

    for number, prompt in enumerate(inspection.prompts, start=1):
        prompt.image_figures = [
            plot_image_experts(
                image,
                inspection.layers,
                inspection.num_experts,
                folder / f"question_{number}_image_{position}.png",
            )
            for position, image in enumerate(prompt.images, start=1)
        ]
    draw_figures(inspection, folder)
    write_json(folder / NUMBERS_FILE, numbers(inspection))
    write_page(inspection, folder / PAGE_FILE)


def _check(question: str | None, options: InspectOptions) -> None:
    """Refuse options that do not go together, before anything is loaded."""
    if not question and not options.dataset:
        raise ValueError("Nothing to inspect: give --dataset, or a question (with --image).")
    if options.image and not question:
        raise ValueError("--image goes with a question: what to ask about the image is missing.")
    if options.before and not options.dataset:
        raise ValueError("--before compares the models on data: give --dataset.")
    for path in options.image or []:
        if not Path(path).expanduser().is_file():
            raise FileNotFoundError(f"There is no image file {path}.")


def _rows(options: InspectOptions, images: ImageOptions) -> Any:
    """Return the dataset's rows, or None without one."""
    if not options.dataset:
        return None
    from vlmoe.data.loading import load_rows

    return load_rows(
        options.dataset,
        options.split,
        limit=options.max_rows,
        allow_outside_images=images.allow_outside_images,
        allow_image_urls=images.allow_image_urls,
    )


def _asked(model: Any, processor: Any, question: str, options: InspectOptions) -> "TracedPrompt":
    """Trace the user's question about the user's images."""
    from vlmoe.data.answers import open_images, prompt_inputs
    from vlmoe.data.long_rows import require_room
    from vlmoe.routing.inspection.tokens import trace_prompt

    images = open_images(options.image, processor)
    inputs = prompt_inputs(processor, question, images)
    require_room(model, inputs["input_ids"].shape[1], options.max_new_tokens)
    return trace_prompt(model, processor, inputs, images, question, options.max_new_tokens)


def _from_rows(
    model: Any,
    processor: Any,
    rows: Sequence[Mapping[str, Any]],
    options: InspectOptions,
    images: ImageOptions,
) -> list["TracedPrompt"]:
    """Trace some questions of a dataset; see `_chosen_questions`."""
    from vlmoe.data.collator import VLMoEPromptCollator
    from vlmoe.data.conversations import parse_row
    from vlmoe.data.images import open_image
    from vlmoe.data.long_rows import prompt_limit
    from vlmoe.routing.inspection.tokens import trace_prompt

    limit = prompt_limit(model, options.max_new_tokens)
    allow_urls, limits = images.allow_image_urls, processor.image_limits
    collator = VLMoEPromptCollator(
        processor, limit, share_images=False, allow_image_urls=allow_urls
    )
    prompts = []
    for row in _chosen_questions(rows):
        parsed, batch = parse_row(row, 0), collator([row])
        asked = [turn.text() for turn in parsed.conversations[0] if turn.role == "user"][-1]
        prompt = trace_prompt(
            model,
            processor,
            batch.inputs,
            [
                open_image(image, parsed.name, limits=limits, allow_urls=allow_urls)
                for image in parsed.images
            ],
            asked,
            options.max_new_tokens,
            question_type=batch.question_types[0],
            reference=batch.references[0],
        )
        prompts.append(prompt)
    return prompts


def _chosen_questions(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Choose the first questions of different rows and, where there are types, different types."""
    from vlmoe.data.conversations import parse_row
    from vlmoe.data.rows import ConversationRows

    chosen: list[dict[str, Any]] = []
    types: set[str] = set()
    for position, row in enumerate(rows):
        for number, kind in enumerate(parse_row(row, position).question_types):
            if not kind or kind not in types:
                types.add(kind)
                chosen.append(ConversationRows([row])[number])
                break
        if len(chosen) == PROMPTS_SHOWN:
            break
    return chosen


def _before(
    inspection: "Inspection",
    rows: Any,
    options: InspectOptions,
    runtime: RuntimeOptions,
    images: ImageOptions,
) -> Any:
    """Run the older model on the same rows."""
    from vlmoe.routing.inspection.analysis import change, dataset_routing
    from vlmoe.routing.inspection.report import BeforeTraining
    from vlmoe.training.build import model_for_answers

    model, processor = model_for_answers(options.before or "", **vars(runtime))
    limit_images(processor, images.max_image_pixels, images.max_image_side)
    allow_urls = images.allow_image_urls
    old = dataset_routing(model, processor, rows, options.batch_size, allow_image_urls=allow_urls)
    assert inspection.routing is not None
    return BeforeTraining(_short(options.before or ""), old, change(old, inspection.routing))


def _short(source: str) -> str:
    """Return a model's name for a page that may be shared: the last two parts of a path."""
    path = Path(source).expanduser()
    return "/".join(path.parts[-2:]) if path.is_absolute() else source


if __name__ == "__main__":
    sys.exit(run("inspect", main))

# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Show where a saved model sends its tokens, as one HTML page with pictures.

    vlmoe inspect --model outputs/tiny --dataset easy_vqa --output_dir outputs/inspect

The page holds the experts' load, questions token by token, images under their experts' colours,
experts by type of question, and with --before what training changed. `inspection.json` keeps the
numbers.
"""

import sys
from typing import Annotated, Any

import typer

from .commands import run
from .config_file import ConfigFile
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
    Prompt,
    SavedModel,
    TaskName,
    place,
    require_files,
    text,
)


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
    task: TaskName = None,
    prompt: Prompt = None,
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
    from vlmoe.hub.folder_lock import folder_lock
    from vlmoe.routing.inspection.inspect import check_request, short_name

    check_request(dataset is not None, question, bool(image), before is not None)
    require_files(image)
    with folder_lock(output_dir):
        from vlmoe import inspect_routing, load_rows
        from vlmoe.data.images import limit_images
        from vlmoe.hub.provenance import dataset_name
        from vlmoe.routing.inspection.analysis import dataset_routing
        from vlmoe.training.build import Runtime, check_model_source, model_for_answers

        for source in filter(None, (model, before)):
            check_model_source(source)
        about: dict[str, Any] = {}
        if dataset:
            about["rows"] = load_rows(
                dataset,
                split,
                task=task,
                prompt=prompt,
                limit=max_rows,
                allow_outside_images=allow_outside_images,
                allow_image_urls=allow_image_urls,
            )
            about["dataset_name"] = f"{dataset_name(dataset)[0]}, {split}"
        runtime = Runtime(device, dtype, attn_implementation, experts_implementation)
        if before:  # is freed before the model is loaded
            network, processor = model_for_answers(before, runtime)
            limits = limit_images(processor, max_image_pixels, max_image_side)
            about["before"] = dataset_routing(
                network,
                processor,
                about["rows"],
                batch_size,
                image_limits=limits,
                allow_image_urls=allow_image_urls,
            )
            about["before_name"] = short_name(before)
            del network
        network, processor = model_for_answers(model, runtime)
        limits = limit_images(processor, max_image_pixels, max_image_side)
        inspection = inspect_routing(
            network,
            processor,
            question=question,
            images=image or None,
            max_rows=max_rows,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            name=short_name(model),
            image_limits=limits,
            allow_image_urls=allow_image_urls,
            progress=True,
            **about,
        )
        page = inspection.save(output_dir)
    if inspection.routing is not None:
        print(f"\n{inspection.table()}")
    print(f"\nWritten to {page}: open it in a browser.")


if __name__ == "__main__":
    sys.exit(run("inspect", main))

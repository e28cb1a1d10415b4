# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Check a dataset without training: what it holds, and every fault by row.

    vlmoe data my_data
    vlmoe data my_data --model outputs/tiny --split train

Says how many rows, conversations and images the splits hold, how long they are in tokens and how
much of them is learned, and shows the first rows as a model sees them; a picture shows how it is
distributed. Ends with exit code 2 if any row has a fault.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from .commands import run
from .config_file import ConfigFile
from .options import DataCheckOptions, ImageOptions
from .shared_options import ImagePixels, ImageSide, ImageUrls, OutsideImages, Rows, place


def main(
    dataset: Annotated[
        str,
        typer.Argument(parser=place, help="A file, a folder, a Hub id, or easy_vqa."),
    ],
    split: Annotated[str | None, typer.Option(help="Split to check (default: all).")] = None,
    max_rows: Rows = None,
    model: Annotated[
        str,
        typer.Option(
            parser=place,
            help="Count the tokens of this model: a folder, a Hub id, or a preset.",
        ),
    ] = "tiny",
    tokenizer: Annotated[
        str | None,
        typer.Option(
            parser=place,
            help="Tokenizer for a preset: a folder or a Hub id (default: one trained on the data).",
        ),
    ] = None,
    tiling: Annotated[bool, typer.Option(help="Count the tokens of a preset with tiling.")] = False,
    max_length: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="The longest conversation, in tokens (default: the model's "
            "max_position_embeddings).",
        ),
    ] = None,
    output: Annotated[
        str, typer.Option(parser=place, metavar="FILE", help="PNG file for the figure.")
    ] = "outputs/data.png",
    allow_outside_images: OutsideImages = False,
    allow_image_urls: ImageUrls = False,
    max_image_pixels: ImagePixels = None,
    max_image_side: ImageSide = None,
    config: ConfigFile = None,
) -> None:
    """Check a dataset without training: its content, and every fault by row.

    The command counts rows, conversations and images per split, their lengths in tokens and the
    tokens with a loss. It shows the first rows as a model sees them, and a figure of the
    distributions. The exit code is 2 if a row has a fault.

    forms of rows (each as one line of a .jsonl file):
      {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]},
                    {"role": "assistant", "content": "a cat"}], "images": ["cat.png"]}
      {"image": "cat.png", "question": "what?", "answer": "a cat"}
      {"image": "cat.png", "conversations": [{"from": "human", "value": "<image>what?"}, ...]}
      images inside the content, prompt and completion, captions in cat.txt beside cat.png

    examples:
      vlmoe data my_data
      vlmoe data my_data.json --model outputs/tiny --output data.png
      vlmoe data user/dataset --split train --max_rows 1000
    """
    options = DataCheckOptions(
        split=split,
        model=model,
        tokenizer=tokenizer,
        tiling=tiling,
        max_rows=max_rows,
        max_length=max_length,
        output=output,
    )
    images = ImageOptions(allow_outside_images, allow_image_urls, max_image_pixels, max_image_side)
    reports, limit = check_data(dataset, options, images)
    from vlmoe.data.check import report_text

    print(f"\n{report_text(reports, limit)}\n\nThe figure is {output}.")
    faults = sum(len(report.faults) for report in reports)
    if faults:
        raise ValueError(f"{dataset} has {faults:,} fault{'s' * (faults > 1)}; see above.")


def check_data(
    dataset: str, options: DataCheckOptions, image_options: ImageOptions
) -> tuple[list[Any], int | None]:
    """Check the splits of a dataset and draw the picture; returns reports and the length limit.

    Raises:
        ValueError: an option, the model or a whole file cannot be used.
        FileNotFoundError: a file or folder does not exist.
        OSError: the picture could not be written.
    """
    from vlmoe.data.check import check_rows, plot_data
    from vlmoe.data.collator import VLMoECollator
    from vlmoe.data.loading import load_rows, split_names
    from vlmoe.data.long_rows import length_limit
    from vlmoe.hub.folder_lock import require_writable

    from .loading import set_image_limits

    require_writable(options.output)
    loaded = {}
    for name in [options.split] if options.split else split_names(dataset):
        faults: list[str] = []
        rows = load_rows(
            dataset,
            name,
            limit=options.max_rows,
            allow_outside_images=image_options.allow_outside_images,
            allow_image_urls=image_options.allow_image_urls,
            faults=faults,
        )
        loaded[name] = rows, faults
    config, processor = _processor(options, [rows for rows, _ in loaded.values()])
    set_image_limits(processor, image_options)
    limit = length_limit(config, options.max_length)
    collator = VLMoECollator(processor, allow_image_urls=image_options.allow_image_urls)
    reports = [
        check_rows(rows, collator, name, faults=faults, limit=limit)
        for name, (rows, faults) in loaded.items()
    ]
    plot_data(reports, Path(options.output), limit)
    return reports, limit


def _processor(options: DataCheckOptions, splits: list[Any]) -> tuple[Any, Any]:
    """The config and processor that count tokens; a preset's tokenizer is trained on the rows."""
    from vlmoe.training.build import config_and_processor

    return config_and_processor(
        options.model, _texts(splits), tokenizer=options.tokenizer, tiling=options.tiling
    )


def _texts(splits: list[Any]) -> Iterator[str]:
    """The texts of all rows that can be read, and one more, for data without any."""
    from vlmoe.data.conversations import parse_row

    yield "no text"
    for rows in splits:
        for position, row in enumerate(rows):
            try:
                conversations = parse_row(row, position).conversations
            except ValueError:
                continue  # named by the check
            yield from (turn.text() for conversation in conversations for turn in conversation)


if __name__ == "__main__":
    sys.exit(run("data", main))

# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Check a dataset without training: its content, and every fault by row.

vlmoe data my_data --split train
"""

import sys
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .commands import run
from .config_file import ConfigFile
from .shared_options import (
    ImagePixels,
    ImageSide,
    ImageUrls,
    OutsideImages,
    Prompt,
    Rows,
    TaskName,
    place,
)

if TYPE_CHECKING:
    from vlmoe.data.row_fields import Rows as DataRows


def main(
    dataset: Annotated[
        str,
        typer.Argument(parser=place, help="A file, a folder, a Hub id, or easy_vqa."),
    ],
    split: Annotated[str | None, typer.Option(help="Split to check (default: all).")] = None,
    task: TaskName = None,
    prompt: Prompt = None,
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
    from vlmoe import load_rows
    from vlmoe.data.check import check_rows, plot_data, report_text
    from vlmoe.data.collator import VLMoECollator
    from vlmoe.data.images import limit_images
    from vlmoe.data.loading import split_names
    from vlmoe.data.long_rows import length_limit
    from vlmoe.data.native_check import check_native_rows
    from vlmoe.data.native_collator import NativeCollator
    from vlmoe.hub.folder_lock import require_writable
    from vlmoe.hub.model_classes import is_native
    from vlmoe.training.build import config_and_processor

    require_writable(output)
    splits: dict[str, DataRows] = {}
    unreadable: dict[str, list[str]] = {}
    for name in [split] if split else split_names(dataset):
        splits[name] = load_rows(
            dataset,
            name,
            task=task,
            prompt=prompt,
            limit=max_rows,
            allow_outside_images=allow_outside_images,
            allow_image_urls=allow_image_urls,
            faults=unreadable.setdefault(name, []),
        )
    model_config, processor = config_and_processor(
        model, _texts(splits.values()), tokenizer=tokenizer, tiling=tiling
    )
    limits = limit_images(processor, max_image_pixels, max_image_side)
    limit = length_limit(model_config, max_length)
    if is_native(model_config):
        native = NativeCollator(processor, limits=limits, allow_image_urls=allow_image_urls)
        check = partial(check_native_rows, collator=native)
    else:
        own = VLMoECollator(processor, allow_image_urls=allow_image_urls)
        check = partial(check_rows, collator=own)
    reports = [
        check(rows, name=name, faults=unreadable[name], limit=limit)
        for name, rows in splits.items()
    ]
    plot_data(reports, Path(output), limit)
    print(f"\n{report_text(reports, limit)}\n\nThe figure is {output}.")
    faults = sum(len(report.faults) for report in reports)
    if faults:
        raise ValueError(f"{dataset} has {faults:,} fault{'s' * (faults > 1)}; see above.")


def _texts(splits: Iterable["DataRows"]) -> Iterator[str]:
    """Yield the texts of all rows that can be read, and one more, for data without any."""
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

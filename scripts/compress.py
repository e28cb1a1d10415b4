# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Make the experts of a saved model narrower, or fewer, and measure what that changes.

    vlmoe compress outputs/tiny --dataset easy_vqa --keep 0.25 --output_dir outputs/small

The result is a model of the same class with other numbers in its configuration.
"""

import sys
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from .commands import run
from .config_file import ConfigFile
from .shared_options import (
    AnswerTokens,
    Dataset,
    ImageUrls,
    OutsideImages,
    Seed,
    place,
    refuse_unread,
    share,
)

if TYPE_CHECKING:
    import datasets

    from vlmoe.data.row_fields import Rows


def main(
    model: Annotated[
        str, typer.Argument(parser=place, help="The sparse model: a folder or a Hub id.")
    ],
    dataset: Dataset,
    output_dir: Annotated[
        str,
        typer.Option(
            parser=place,
            metavar="FOLDER",
            help="Folder for the smaller model, its processor and the report.",
        ),
    ],
    intermediate_size: Annotated[
        int | None, typer.Option(min=1, help="Narrower experts: their new width.")
    ] = None,
    keep: Annotated[
        float | None,
        typer.Option(
            parser=share,
            metavar="SHARE",
            help="Narrower experts: the share of their width to keep.",
        ),
    ] = None,
    experts: Annotated[
        int | None, typer.Option(min=1, help="Fewer experts: their new number in each layer.")
    ] = None,
    criterion: Annotated[
        Literal["fisher", "frequency", "reap", "reap-answers", "random"],
        typer.Option(help="How experts are chosen; all but fisher are for comparison."),
    ] = "fisher",
    heal_steps: Annotated[
        int,
        typer.Option(
            min=0, help="Steps of distillation from the model as it was, on the calibration rows."
        ),
    ] = 0,
    split: Annotated[str, typer.Option(help="Split to calibrate on.")] = "train",
    max_rows: Annotated[
        int | None, typer.Option(min=1, help="Calibrate on the first N rows.")
    ] = 1024,
    evaluate: Annotated[
        str | None,
        typer.Option(metavar="SPLIT", help="Measure the accuracy on this split, before and after."),
    ] = None,
    max_eval_rows: Annotated[
        int | None, typer.Option(min=1, help="Evaluate on the first N rows of that split.")
    ] = None,
    text_only: Annotated[
        bool, typer.Option(help="Calibrate a model that takes images on rows without images.")
    ] = False,
    round_up: Annotated[
        bool, typer.Option(help="Raise a width that grouped_mm does not take to one that it takes.")
    ] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows per batch.")] = 32,
    max_new_tokens: AnswerTokens = 32,
    seed: Seed = 0,
    allow_outside_images: OutsideImages = False,
    allow_image_urls: ImageUrls = False,
    config: ConfigFile = None,
) -> None:
    """Make the experts of a model narrower or fewer, chosen on calibration rows.

    The smaller model loads wherever the model does. A report, compression_report.json, holds sizes,
    speed, the error of each layer for image and text tokens, and with --evaluate the accuracy.

    examples:
      vlmoe compress outputs/tiny --dataset easy_vqa --keep 0.25 --output_dir outputs/narrow
      vlmoe compress outputs/tiny --dataset easy_vqa --experts 4 --heal_steps 50 \\
        --evaluate test --output_dir outputs/fewer
    """
    if evaluate is None:
        refuse_unread("give --evaluate SPLIT", max_eval_rows=max_eval_rows is not None)
    elif evaluate == split:
        raise ValueError(
            f"--evaluate {evaluate} is the split that the model is calibrated on (--split): the "
            "accuracy would be that of rows that it was fitted to. Choose another one."
        )
    import vlmoe

    def rows(name: str, limit: int | None) -> "Rows | datasets.Dataset":
        return vlmoe.load_rows(
            dataset,
            name,
            limit=limit,
            allow_outside_images=allow_outside_images,
            allow_image_urls=allow_image_urls,
        )

    result = vlmoe.compress(
        model,
        rows(split, max_rows),
        output_dir=output_dir,
        intermediate_size=intermediate_size,
        keep=keep,
        experts=experts,
        criterion=criterion,
        heal_steps=heal_steps,
        evaluation_rows=rows(evaluate, max_eval_rows) if evaluate else None,
        text_only=text_only,
        round_up=round_up,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        seed=seed,
        allow_image_urls=allow_image_urls,
    )
    print(f"\n{result.report.table()}\n\nSaved to {result.folder}.")


if __name__ == "__main__":
    sys.exit(run("compress", main))

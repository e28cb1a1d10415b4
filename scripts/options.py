# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""The options of every command, as dataclasses; option_parser.py makes parsers from them."""

import dataclasses
import os
from typing import Any

from .option_ranges import LEAST_TEMPERATURE, require_in_range


def option(help: str, default: Any = None, **argparse_arguments: Any) -> Any:
    """A dataclass field with a default and a help text; the rest goes to argparse's
    `add_argument`."""
    return dataclasses.field(default=default, metadata={"help": help, **argparse_arguments})


PATHS = (
    *("model", "before", "vision", "tokenizer", "chat_template", "dataset", "eval_dataset"),
    *("image", "output", "output_dir", "save_predictions"),
)
"""Options that may be paths."""


class Options:
    """A group of options; each number lies in its range, and in paths `~` is the home folder,
    however the group was made."""

    def __post_init__(self) -> None:
        """Raise `ValueError` for a number out of its range."""
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            require_in_range(field.name, value)
            if field.name in PATHS:
                setattr(self, field.name, with_home(value))


def with_home(value: Any) -> Any:
    """A path, or a list of them, with the home folder in place of a leading `~`."""
    if isinstance(value, list):
        return [with_home(each) for each in value]
    return os.path.expanduser(value) if isinstance(value, str) else value


def refuse_unread(options: Options, names: tuple[str, ...], way_on: str) -> None:
    """Refuse options that have another value than their default where nothing reads them.

    Raises:
        ValueError: names the first of them, and what to do.
    """
    for field in dataclasses.fields(options):  # type: ignore[arg-type]
        if field.name in names and getattr(options, field.name) != field.default:
            raise ValueError(f"--{field.name} changes nothing here: {way_on}, or leave it out.")


@dataclasses.dataclass
class ImageOptions(Options):
    """Which images of a dataset are opened."""

    _argument_group_name = "images of the data"

    allow_outside_images: bool = option(
        "Open image files that the data name outside their own folder. Only for data you trust.",
        False,
    )
    allow_image_urls: bool = option(
        "Download images that the data name by http(s) URL. Only for data you trust.", False
    )
    max_image_pixels: int | None = option(
        "Refuse larger images, in pixels (default: the processor's, 64 million)."
    )
    max_image_side: int | None = option(
        "Refuse images with a longer side, in pixels (default: the processor's, 32768)."
    )


@dataclasses.dataclass
class DataCheckOptions(Options):
    """What to check of a dataset, and with which tokens."""

    _argument_group_name = "data"

    split: str | None = option("Split to check (default: all).")
    model: str = option(
        "Whose tokens to count: a saved model (folder or Hub id), or a preset.", "tiny"
    )
    tokenizer: str | None = option(
        "Tokenizer for a preset (folder or Hub id; default: one trained on the data)."
    )
    tiling: bool = option("Count the tokens of a preset with tiling.", False)
    max_rows: int | None = option("Check the first so many rows of each split only.")
    max_length: int | None = option(
        "The longest conversation in tokens (default: the model's max_position_embeddings)."
    )
    output: str = option("PNG file for the picture.", "outputs/data.png")


@dataclasses.dataclass
class RuntimeOptions(Options):
    """How to run a saved model."""

    _argument_group_name = "running the model"

    device: str | None = option("cpu, cuda, cuda:1, mps, ...; by default the best there is.")
    dtype: str | None = option("Number type of the weights (default: as saved).")
    attn_implementation: str | None = option("Attention: eager, sdpa, flash_attention_2, ...")
    experts_implementation: str | None = option("Experts: eager, batched_mm, grouped_mm, auto, ...")


@dataclasses.dataclass
class EvaluateOptions(Options):
    """What to evaluate, and on what."""

    _argument_group_name = "evaluation"

    model: str | None = option("The model: a folder or a Hub id.")
    dataset: str | None = option("Data as for `vlmoe train`: a Hub id, file, folder, or easy_vqa.")
    split: str = option("Split to evaluate on.", "test")
    batch_size: int = option("Questions that are answered at the same time.", 64)
    max_rows: int | None = option("Evaluate on the first so many rows only.")
    max_new_tokens: int = option("The longest answer in tokens.", 32)
    max_length: int | None = option(
        "The longest prompt in tokens; a longer one is an error (default: what the model's "
        "max_position_embeddings leave beside the answer)."
    )
    without_images: bool = option("Leave the images out: what do the questions alone tell?", False)
    output: str | None = option(
        "JSON file for the results; by default evaluate_results.json in the model folder, or in "
        "the current folder for a model of the Hub."
    )
    save_predictions: str | None = option("JSON file for every question, answer and truth.")


@dataclasses.dataclass
class GenerateOptions(Options):
    """What to ask, and how to answer."""

    _argument_group_name = "question and answer"

    model: str | None = option("The model: a folder or a Hub id.")
    image: list[str] | None = dataclasses.field(
        default=None,
        metadata={
            "help": "An image file; repeat the option for several images.",
            "action": "append",
        },
    )
    system: str | None = option("A system message.")
    max_new_tokens: int = option("The longest answer in tokens.", 64)
    temperature: float = option("0: the most likely token at every step; above 0: sample.", 0.0)
    top_p: float = option("When sampling, of the likeliest tokens those that hold this share.", 1.0)
    seed: int = option("Seed for sampling.", 0)

    def __post_init__(self) -> None:
        """Raise `ValueError` also for an option that nothing would read."""
        super().__post_init__()
        if self.temperature == 0:
            refuse_unread(self, ("top_p",), "give --temperature above 0")
        elif self.temperature < LEAST_TEMPERATURE:
            raise ValueError(
                f"--temperature must be 0 or at least {LEAST_TEMPERATURE:g}, got "
                f"{self.temperature}: for the most likely token give 0."
            )


@dataclasses.dataclass
class InspectOptions(Options):
    """Whose routing to show, and on what."""

    _argument_group_name = "inspection"

    model: str | None = option("The model: a folder or a Hub id.")
    dataset: str | None = option("Data as for `vlmoe train`: a Hub id, file, folder, or easy_vqa.")
    split: str = option("Split of the dataset.", "test")
    max_rows: int = option("Run the first so many rows.", 200)
    batch_size: int = option("Questions that are run at the same time.", 32)
    image: list[str] | None = dataclasses.field(
        default=None,
        metadata={
            "help": "An image file for the question; repeat the option for several images.",
            "action": "append",
        },
    )
    max_new_tokens: int = option("The longest answer in tokens.", 32)
    before: str | None = option(
        "An older state of the model, such as before training, to compare with."
    )
    output_dir: str = option(
        "Folder for the page, its pictures and the numbers.", "outputs/inspect"
    )


@dataclasses.dataclass
class DemoOptions(Options):
    """How to run the demo."""

    _argument_group_name = "demo"

    output_dir: str = option("Folder for the model, metrics.json and figures.", "outputs/demo")
    seed: int = option("Seed of all stages.", 0)
    max_train_rows: int | None = option("Train on the first so many images only, to try it out.")
    max_test_rows: int | None = option("Test on the first so many images only, to try it out.")

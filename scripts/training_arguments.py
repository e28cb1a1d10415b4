# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""`transformers.TrainingArguments` with the defaults of `vlmoe train`, and its parser.

Importing this module imports torch and transformers.
"""

import argparse
import importlib.util
import logging
from collections.abc import Collection
from typing import Any, NoReturn

import torch
from transformers import HfArgumentParser, TrainingArguments

from vlmoe.hub.input_errors import reading

from .loading import is_preset
from .option_parser import OptionParser, parse_options, split_config
from .options import (
    FROM_SCRATCH_LENGTH,
    FROM_SCRATCH_RATE,
    TRAINING_DEFAULTS,
    DataOptions,
    ImageOptions,
    LoraOptions,
    ModelOptions,
)

logger = logging.getLogger(__name__)

OPTION_CLASSES: tuple[type, ...] = (
    ModelOptions,
    DataOptions,
    ImageOptions,
    LoraOptions,
    TrainingArguments,
)


def training_arguments(**values: Any) -> TrainingArguments:
    """`TrainingArguments` with our defaults where `values` say nothing."""
    return TrainingArguments(**(training_defaults() | values))


def training_defaults() -> dict[str, Any]:
    """What `vlmoe train` sets differently from `TrainingArguments`, on this machine."""
    has_tensorboard = importlib.util.find_spec("tensorboard") is not None
    return TRAINING_DEFAULTS | {
        "report_to": "tensorboard" if has_tensorboard else "none",
        "dataloader_pin_memory": torch.cuda.is_available(),
    }


def parse_training(
    argv: list[str],
) -> tuple[ModelOptions, DataOptions, TrainingArguments, LoraOptions, ImageOptions]:
    """Options from the command line, over those of `--config FILE`, over the defaults.

    Raises:
        ValueError: an option does not exist or has a wrong value.
        FileNotFoundError: there is no such config file.
    """
    parser, option_classes = training_parser(), list(OPTION_CLASSES)
    parser.set_defaults(**_from_scratch(argv))
    with reading("The options of TrainingArguments", keep=(ValueError, OSError, ImportError)):
        model, data, images, lora, arguments, _ = parse_options(parser, argv, option_classes)
    return model, data, arguments, lora, images


def _from_scratch(argv: list[str]) -> dict[str, Any]:
    """Return length and rate for a preset, each where `argv` and its config file give none."""
    config, rest = split_config(argv, list(OPTION_CLASSES))
    finder = OptionParser(prog="vlmoe train")
    finder.add_argument("--model", default=config.get("model", ModelOptions.model))
    found, _ = finder.parse_known_args(rest)
    given = {flag.partition("=")[0].removeprefix("--") for flag in rest} | config.keys()
    if not is_preset(str(found.model)):
        return {}
    return from_scratch_defaults(found.model, given, bool(given & {"eval_split", "eval_dataset"}))


def from_scratch_defaults(
    preset: str, given: Collection[str], has_evaluation: bool
) -> dict[str, Any]:
    """Return length and rate for a preset, each where none of `given` decides it; log them.

    Args:
        preset: its name, for the log.
        given: names of the training arguments that have a value.
        has_evaluation: whether there is data to evaluate on.
    """
    length = {} if {"num_train_epochs", "max_steps"} & set(given) else FROM_SCRATCH_LENGTH
    if not has_evaluation:
        length = {name: value for name, value in length.items() if not name.startswith("eval_")}
    rate = {} if "learning_rate" in given else FROM_SCRATCH_RATE
    defaults = {name: value for name, value in (length | rate).items() if name not in given}
    if defaults:
        chosen = ", ".join(f"{name} {value}" for name, value in defaults.items())
        logger.warning("The preset %s starts from scratch: %s.", preset, chosen)
    return defaults


def training_parser() -> HfArgumentParser:
    """The parser of all options of `vlmoe train`, those of TrainingArguments included."""
    parser = _TrainingParser(
        OPTION_CLASSES,
        prog="vlmoe train",
        usage="vlmoe train [--config FILE] [options]",
        allow_abbrev=False,
        add_help=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.set_defaults(**training_defaults())
    return parser


class _TrainingParser(HfArgumentParser):
    def add_argument(self, *names: Any, **arguments: Any) -> argparse.Action:
        if "--include_num_input_tokens_seen" in names:  # takes words too, but is declared a bool
            arguments["type"] = _bool_or_word
        return super().add_argument(*names, **arguments)

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message.rstrip('.')}. See `{self.prog} --help`.")


def _bool_or_word(text: str) -> bool | str:
    return {"true": True, "false": False}.get(text.lower(), text)

# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""`transformers.TrainingArguments` with the defaults of `vlmoe train`, and its parser.

Importing this module imports torch and transformers.
"""

import argparse
import importlib.util
from typing import Any, NoReturn

import torch
from transformers import HfArgumentParser, TrainingArguments

from vlmoe.training.input_errors import reading

from .option_parser import parse_options
from .options import TRAINING_DEFAULTS, DataOptions, ImageOptions, LoraOptions, ModelOptions

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
    with reading("The options of TrainingArguments", keep=(ValueError, OSError, ImportError)):
        model, data, images, lora, arguments, _ = parse_options(parser, argv, option_classes)
    return model, data, arguments, lora, images


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

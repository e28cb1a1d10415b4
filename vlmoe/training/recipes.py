# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""The recipes of the demo's stages: data and training arguments in one YAML file each."""

import dataclasses
from pathlib import Path

import yaml

from ..configuration.configuration_vlmoe import PRESETS, VLMoEConfig
from ..data.loading import load_rows
from ..data.tokenizer import train_tokenizer
from .arguments import Values
from .build import row_texts
from .data import TrainingData
from .run import TrainResult, train

RECIPES = PRESETS.parent / "recipes"
CAPTIONS, QUESTIONS, QUESTION_ONLY = "easy_vqa_captions", "easy_vqa", "easy_vqa_question_only"


def read_recipe(name: str, **values: object) -> tuple[TrainingData, Values]:
    """Return the data and the training arguments of a recipe, with some values replaced."""
    given = yaml.safe_load((RECIPES / f"{name}.yaml").read_text(encoding="utf-8")) | values
    of_data = {field.name for field in dataclasses.fields(TrainingData)} & given.keys()
    return TrainingData(**{each: given.pop(each) for each in of_data}), given


def train_recipe(
    name: str, model: str, *, tokenizer: str | None = None, **values: object
) -> TrainResult:
    """Train with a recipe.

    Args:
        name: of the recipe.
        model: as for `train`.
        tokenizer: as for `train`.
        **values: fields of `TrainingData` and `TrainingArguments`, over those of the recipe.
    """
    data, arguments = read_recipe(name, **values)
    return train(model, data, arguments, tokenizer=tokenizer)


def save_tokenizer(folder: Path) -> str:
    """Train a tokenizer on the text of all stages, so that they share it; return its folder."""
    sources = [load_rows(name, with_images=False) for name in (QUESTIONS, CAPTIONS)]
    texts = (text for rows in sources for text in row_texts(rows))
    vocab_size = VLMoEConfig.from_preset("tiny").text_config.vocab_size
    train_tokenizer(texts, vocab_size).save_pretrained(folder)
    return str(folder)

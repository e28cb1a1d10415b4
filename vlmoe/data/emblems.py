# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Emblems: a drawn task whose answers only the parameters can hold.

- An emblem is a picture of 2 x 2 cells with a symbol in each: one of four colors and four shapes.
- Each emblem belongs to an entity, which has 8 attributes. Every value is drawn at random from 256
  words, so a fact holds 8 bits, and nothing but memory answers it.
- A fact can be asked in five phrasings. Three are trained, one is for validation, one for the test.
  Which ones is drawn for every fact, so that a split knows each phrasing from other facts.
- Training, validation and test draw their pictures from banks of symbols of their own, with fresh
  noise in every picture.
- Beside the facts a row is asked what a cell shows: perception, which needs no memory.

The task follows the knowledge tasks of "Physics of Language Models: Part 3.3"
(https://arxiv.org/abs/2404.05405), with a picture in the place of the name.
"""

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import numpy as np
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ..configuration.configuration_vlmoe import VLMoEConfig
from .row_fields import AnyRow
from .tokenizer import END, IMAGE, PAD

COLORS = {"red": (0.9, -0.4, -0.4), "green": (-0.4, 0.8, -0.4), "blue": (-0.4, -0.2, 0.9)}
COLORS["yellow"] = (0.9, 0.7, -0.5)  # channels in -1..1
BACKGROUND = -0.8
SHAPES = ("circle", "square", "triangle", "cross")
SYMBOLS = tuple(product(COLORS, SHAPES))
CELLS = ("upperleft", "upperright", "lowerleft", "lowerright")
ATTRIBUTES = ("capital", "ruler", "river", "food", "tool", "song", "feast", "founder")
PHRASINGS = ("name", "tell", "give", "state", "write")
TRAINED_PHRASINGS = 3
SPLITS = ("train", "validation", "test")
SEE = "see"
VALUES = tuple("".join(parts) for parts in product("bdkl", "aeio", "mnrs", "aeio"))
CELL = 12
"""Width of a cell, in pixels."""
BANK = 48
"""Drawings of each symbol in a split's bank."""
COLOR_NOISE, BACKGROUND_NOISE, PIXEL_NOISE, GAIN_NOISE = 0.05, 0.05, 0.1, 0.1

VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": 48,
    "image_size": 2 * CELL,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_hidden_layers": 1,
    "patch_size": CELL,
    "vision_use_head": False,
}

CHAT_TEMPLATE = """\
{%- for message in messages -%}
    {%- for part in message.content -%}
        {%- if part.type == 'image' -%}
            {{- '<image>' -}}
        {%- else -%}
            {{- ' ' -}}
            {%- if message.role == 'assistant' -%}
                {%- generation -%}{{- part.text -}}{%- endgeneration -%}
            {%- else -%}
                {{- part.text -}}
            {%- endif -%}
        {%- endif -%}
    {%- endfor -%}
{%- endfor -%}
"""
"""Words alone, without tokens for roles and ends: a fact costs three tokens."""


class Emblems:
    """The entities of a seed, their facts, and the rows of each split.

    Args:
        entities: number of emblems, at most 256 ** 2 // 2.
        seed: of emblems, facts, phrasings and drawings.

    Attributes:
        symbols: (entities, 4), the symbol in each cell.
        values: (entities, 8), the number of the word that each attribute has.
        phrasings: (entities, 8, 5), the phrasings of each fact: three to train, one to validate,
            one to test.
        names: (entities, 2), two words that name the entity where no picture is shown.
    """

    def __init__(self, entities: int = 512, seed: int = 0):
        most = len(VALUES) ** 2 // 2
        if not 1 <= entities <= most:
            raise ValueError(f"`entities` is {entities}; allowed: 1 to {most}.")
        rng = np.random.default_rng([seed, 0])
        self.entities, self.seed = entities, seed
        emblems = rng.choice(len(SYMBOLS) ** len(CELLS), size=entities, replace=False)
        self.symbols = np.stack(np.unravel_index(emblems, [len(SYMBOLS)] * len(CELLS)), axis=1)
        facts = (entities, len(ATTRIBUTES))
        self.values = rng.integers(len(VALUES), size=facts)
        every = np.broadcast_to(np.arange(len(PHRASINGS)), (*facts, len(PHRASINGS)))
        self.phrasings = rng.permuted(every, axis=-1)
        names = rng.choice(len(VALUES) ** 2, size=entities, replace=False)
        self.names = np.stack(np.unravel_index(names, [len(VALUES)] * 2), axis=1)
        self._banks = {split: symbol_bank(seed, split) for split in SPLITS}

    def training_rows(self, epochs: int, shown: str = "image") -> Iterator[AnyRow]:
        """Yield every entity once an epoch, in random order, as a conversation of all its facts.

        The facts come in random order, each in one of its trained phrasings, and among them one
        cell. Every picture is a new drawing; `symbols` says what is in it, so that others can be
        drawn in its place.

        Args:
            epochs: how often each entity comes.
            shown: "image", "name" for its two words without a picture, or "nothing".
        """
        rng = np.random.default_rng([self.seed, 4])
        for epoch, entity in _shuffled(rng, self.entities, epochs):
            turns = []
            for attribute in rng.permutation(len(ATTRIBUTES)):
                choice = self.phrasings[entity, attribute, rng.integers(TRAINED_PHRASINGS)]
                turns.append(self._fact(entity, attribute, choice))
            if shown == "image":
                cell = self._cell(entity, int(rng.integers(len(CELLS))))
                turns.insert(rng.integers(len(turns) + 1), cell)
            row = self._row(f"train/{epoch}/{entity}", entity, turns, "train", shown, rng)
            yield row | {"symbols": self.symbols[entity]}

    def fact_rows(self, split: str, shown: str = "image") -> Iterator[AnyRow]:
        """Yield a row for every fact: its question in a phrasing of the split, on a new drawing.

        Args:
            split: "validation" and "test" ask in a phrasing that is never trained; "train" asks in
                a trained one, on drawings of the test's bank.
            shown: as for `training_rows`.
        """
        number = SPLITS.index(split)
        rng = np.random.default_rng([self.seed, 5, number])
        column = 0 if split == "train" else TRAINED_PHRASINGS + number - 1
        bank = "test" if split == "train" else split
        for entity, attribute in np.ndindex(self.values.shape):
            turn = self._fact(entity, attribute, self.phrasings[entity, attribute, column])
            name = f"{split}/{entity}/{ATTRIBUTES[attribute]}"
            yield self._row(name, entity, [turn], bank, shown, rng)

    def cell_rows(self, split: str) -> Iterator[AnyRow]:
        """Yield a row for every cell of every emblem: its question, on a new drawing."""
        rng = np.random.default_rng([self.seed, 6, SPLITS.index(split)])
        for entity, cell in np.ndindex(self.symbols.shape):
            name = f"{split}/{entity}/{CELLS[cell]}"
            yield self._row(name, entity, [self._cell(entity, cell)], split, "image", rng)

    def drawing(self, entity: int, split: str, rng: np.random.Generator) -> Image.Image:
        """Draw an emblem from the symbols of a split's bank, with fresh noise: 24 x 24 pixels."""
        return _drawing(self._banks[split], self.symbols[entity], rng)

    def _fact(self, entity: int, attribute: int, phrasing: int) -> tuple[str, str]:
        question = f"{PHRASINGS[phrasing]} {ATTRIBUTES[attribute]}"
        return question, VALUES[self.values[entity, attribute]]

    def _cell(self, entity: int, cell: int) -> tuple[str, str]:
        return f"{SEE} {CELLS[cell]}", " ".join(SYMBOLS[self.symbols[entity, cell]])

    def _row(
        self,
        name: str,
        entity: int,
        turns: Sequence[tuple[str, str]],
        bank: str,
        shown: str,
        rng: np.random.Generator,
    ) -> dict[str, Any]:
        drawing = self.drawing(entity, bank, rng)  # also where it is not shown: the same draws
        named = " ".join(VALUES[word] for word in self.names[entity]) if shown == "name" else None
        images = [drawing] if shown == "image" else []
        messages = _conversation(turns, named, bool(images))
        return {"id": name, "messages": messages, "images": images}


def perception_rows(rows: int, seed: int = 0) -> Iterator[AnyRow]:
    """Yield random emblems, without facts, each asked what its four cells show in random order."""
    rng = np.random.default_rng([seed, 7])
    bank = symbol_bank(seed, "train")
    for number in range(rows):
        symbols = rng.integers(len(SYMBOLS), size=len(CELLS))
        turns = [
            (f"{SEE} {CELLS[cell]}", " ".join(SYMBOLS[symbols[cell]]))
            for cell in rng.permutation(len(CELLS))
        ]
        images, messages = [_drawing(bank, symbols, rng)], _conversation(turns, None, True)
        name = f"perception/{number}"
        yield {"id": name, "messages": messages, "images": images, "symbols": symbols}


def emblem_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with a token for each word of the task, and its chat template."""
    special = (PAD, END, IMAGE)
    words = (*PHRASINGS, SEE, *ATTRIBUTES, *CELLS, *COLORS, *SHAPES, *VALUES)
    vocabulary = {word: number for number, word in enumerate((*special, *words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        extra_special_tokens=[IMAGE],
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def emblem_config(**decoder: Any) -> VLMoEConfig:
    """Return the config of a small model of the task: tower and decoder have one layer each.

    Args:
        **decoder: fields of the decoder's config beyond its width of 64, such as its experts.
    """
    tokenizer = emblem_tokenizer()
    pad, end, image = tokenizer.convert_tokens_to_ids([PAD, END, IMAGE])
    text: dict[str, Any] = {
        "hidden_size": 64,
        "initializer_range": 0.08,
        "max_position_embeddings": 64,
        "num_attention_heads": 4,
        "num_hidden_layers": 1,
        "num_key_value_heads": 2,
        "pad_token_id": pad,
        "eos_token_id": end,
        "qk_norm": True,
        "vocab_size": len(tokenizer),
    }
    return VLMoEConfig(
        image_token_id=image,
        pixel_shuffle_factor=2,
        projector_layer_norm=True,
        projector_num_layers=1,
        tie_word_embeddings=False,
        vision_config=VISION,
        text_config=text | decoder,
    )


def _shuffled(rng: np.random.Generator, count: int, epochs: int) -> Iterator[tuple[int, int]]:
    for epoch in range(epochs):
        for each in rng.permutation(count):
            yield epoch, int(each)


def _conversation(
    turns: Sequence[tuple[str, str]], named: str | None, with_image: bool
) -> list[dict[str, Any]]:
    """Write questions and answers as messages; the first one shows the image or the name."""
    messages: list[dict[str, Any]] = []
    for question, answer in turns:
        first = not messages
        content: list[dict[str, str]] = [{"type": "image"}] if first and with_image else []
        text = f"{named} {question}" if first and named else question
        content.append({"type": "text", "text": text})
        messages.append({"role": "user", "content": content})
        reply = [{"type": "text", "text": answer}]
        messages.append({"role": "assistant", "content": reply})
    return messages


def symbol_bank(seed: int, split: str) -> np.ndarray:
    """Draw each symbol `BANK` times: (symbols, drawings, cell, cell, 3), channels in -1..1.

    Size (half of it 4 to 5.4 pixels), place, color and background vary.
    """
    rng = np.random.default_rng([seed, SPLITS.index(split) + 1])
    places = np.arange(CELL) - (CELL - 1) / 2
    bank = np.empty((len(SYMBOLS), BANK, CELL, CELL, 3))
    for index in np.ndindex(bank.shape[:2]):
        color, shape = SYMBOLS[index[0]]
        half = rng.uniform(4.0, 5.4)
        across, down = (places - rng.uniform(-0.9, 0.9) for _ in range(2))
        inside = _mask(shape, half, across[None, :], down[:, None])
        foreground = np.array(COLORS[color]) + rng.normal(0, COLOR_NOISE, 3)
        background = rng.normal(BACKGROUND, BACKGROUND_NOISE, 3)
        bank[index] = np.where(inside[..., None], foreground, background)
    return bank


def _mask(shape: str, half: float, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return which pixels of a cell a shape covers, `x` to the right and `y` down."""
    x, y = np.broadcast_arrays(x, y)
    inside = np.maximum(abs(x), abs(y)) <= half
    if shape == "circle":
        return x**2 + y**2 <= half**2
    if shape == "triangle":
        return inside & (abs(x) <= (y + half) / 2)
    if shape == "cross":
        return inside & (np.minimum(abs(x), abs(y)) <= half / 3)
    return inside


def draw_emblems(bank: np.ndarray, symbols: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Put a drawing of each symbol into its cell, and add noise.

    Args:
        bank: as `symbol_bank` returns it.
        symbols: (n, 4), the symbol in each cell.
        rng: of the choice of drawings and of the noise.

    Returns:
        (n, 2 * cell, 2 * cell, 3), bytes.
    """
    count, width = len(symbols), 2 * CELL
    cells = bank[symbols, rng.integers(BANK, size=symbols.shape)]  # (n, 4, cell, cell, 3)
    pictures = cells.reshape(count, 2, 2, CELL, CELL, 3).transpose(0, 1, 3, 2, 4, 5)
    pictures = pictures.reshape(count, width, width, 3)
    gain = 1 + GAIN_NOISE * rng.standard_normal((count, 1, 1, 1))
    pictures = gain * pictures + PIXEL_NOISE * rng.standard_normal(pictures.shape)
    return ((pictures.clip(-1, 1) + 1) * 127.5).round().astype(np.uint8)


def _drawing(bank: np.ndarray, symbols: np.ndarray, rng: np.random.Generator) -> Image.Image:
    return Image.fromarray(draw_emblems(bank, symbols[None], rng)[0])

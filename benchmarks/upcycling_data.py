# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""The data of the upcycling benchmark: two tasks with the same splits, prepared once."""

import shutil
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from composition import composition_rows
from datasets import DatasetDict

from vlmoe import VLMoEConfig
from vlmoe.data.loading import load_rows
from vlmoe.data.rows import ConversationRows
from vlmoe.data.tokenizer import train_tokenizer
from vlmoe.hub.atomic_files import write_json
from vlmoe.training.build import row_texts

TASKS = ("composition", "easy_vqa")
IMAGES = {"train": 12000, "validation": 300, "test": 1200}
"""Of the compositional task."""
HELD_OUT = 300
"""Of easy-VQA's training images, the last ones, to tell a plateau."""


def prepare(task: str, folder: Path, max_images: int | None) -> Path:
    """Prepare a folder with the splits `descriptions`, `train`, `validation` and `test`.

    It also holds a tokenizer and the figures of `majority`.
    """
    if not folder.exists():
        staging = folder.with_name(f".{folder.name}")
        shutil.rmtree(staging, ignore_errors=True)
        splits = composition(max_images) if task == "composition" else easy_vqa(max_images)
        DatasetDict(splits).save_to_disk(staging / "data")
        texts = (text for name in ("descriptions", "train") for text in row_texts(splits[name]))
        vocabulary = VLMoEConfig.from_preset("tiny").text_config.vocab_size
        train_tokenizer(texts, vocabulary).save_pretrained(staging / "tokenizer")
        write_json(staging / "majority.json", majority(splits["train"], splits["test"]))
        staging.rename(folder)
    return folder


def composition(max_images: int | None) -> dict[str, Any]:
    return composition_rows({name: min(n, max_images or n) for name, n in IMAGES.items()})


def easy_vqa(max_images: int | None) -> dict[str, Any]:
    train, test = (load_rows("easy_vqa", split) for split in ("train", "test"))
    kept = len(train) - HELD_OUT
    splits = {
        "descriptions": load_rows("easy_vqa_captions", "train"),
        "train": train.select(range(kept)),
        "validation": train.select(range(kept, len(train))),
        "test": test,
    }
    held_out = {row.rpartition("/")[2] for row in splits["validation"]["id"]}
    captions = splits["descriptions"]
    seen = [i for i, row in enumerate(captions["id"]) if row.rpartition("/")[2] not in held_out]
    splits["descriptions"] = captions.select(seen)
    return {
        name: rows.select(range(min(len(rows), max_images or len(rows))))
        for name, rows in splits.items()
    }


def majority(train_rows: Any, test_rows: Any) -> dict[str, float]:
    """How often the most frequent training answer is right on the test questions.

    That of the question's very words (`by words`), where they were asked in training and else of
    its type, and that of its type (`by type`).
    """
    by_words: dict[str, Counter[str]] = defaultdict(Counter)
    by_type: dict[str, Counter[str]] = defaultdict(Counter)
    for question, answer, kind in _asked(train_rows):
        by_words[question][answer] += 1
        by_type[kind][answer] += 1
    asked = _asked(test_rows)
    hits = Counter[str]()
    for question, answer, kind in asked:
        hits["by words"] += (by_words.get(question) or by_type[kind]).most_common(1)[0][0] == answer
        hits["by type"] += by_type[kind].most_common(1)[0][0] == answer
    return {name: count / len(asked) for name, count in hits.items()}


def _asked(rows: Any) -> list[tuple[str, str, str]]:
    """(question, answer, type) of every conversation."""
    found = []
    for row in ConversationRows(rows):
        user, assistant = row["messages"]
        texts = [part["text"] for part in user["content"] if part["type"] == "text"]
        found.append(("".join(texts), assistant["content"][0]["text"], row["question_type"]))
    return found

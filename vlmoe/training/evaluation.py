# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Answers of a model to the questions of a dataset, by batched greedy `generate`, and their
score."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers.utils import logging

from ..data.answers import greedy_answers
from ..data.collator import PromptBatch, VLMoEPromptCollator
from ..data.conversations import parse_row
from ..data.long_rows import prompt_limit
from ..data.rows import ConversationRows


def evaluate_model(
    model: Any,
    processor: Any,
    rows: Sequence[Mapping[str, Any]],
    batch_size: int = 64,
    *,
    max_new_tokens: int = 32,
    max_length: int | None = None,
    allow_image_urls: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Ask `model` every question of `rows` and compare its answers with the references.

    The last assistant turn of each conversation is the reference; equality is up to case and
    surrounding blanks. Decoding is greedy; an answer ends at the tokenizer's end token.

    Args:
        model: a generating model, on any device.
        processor: its processor.
        rows: as `load_rows` gives them; a row may hold several conversations.
        batch_size: conversations answered at the same time; images they share are encoded once.
        max_new_tokens: the longest answer, in tokens.
        max_length: the longest prompt, in tokens; a longer one is an error. By default what the
            model's positions leave beside the answer.
        allow_image_urls: download images that rows name by http(s) URL.
        progress: show a progress bar.

    Returns:
        `exact_match` (0..1), `exact_match_by_type`, `count_by_type`, `questions`, `seconds`,
        `questions_per_second`, and `predictions`: one dict per conversation, in order, with `id`,
        `question`, `question_type`, `prediction`, `reference` and `correct`.

    Raises:
        ValueError: `batch_size` is below 1, there are no rows, a row is malformed, or the model's
            outputs are NaN or infinite.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    questions = ConversationRows(rows)
    if len(questions) == 0:
        raise ValueError("empty dataset: there are no rows to evaluate.")
    limit = prompt_limit(model, max_new_tokens, max_length)
    collator = VLMoEPromptCollator(processor, limit, allow_image_urls=allow_image_urls)
    start = time.perf_counter()
    predictions: list[dict[str, Any]] = []
    with _in_eval_mode(model):
        for batch in _batches(questions, batch_size, progress):
            prompts = collator(batch)
            answers = generate_answers(model, processor, prompts, max_new_tokens)
            predictions += _records(batch, prompts, answers)
    seconds = time.perf_counter() - start
    return {
        **score(predictions),
        "questions": len(predictions),
        "seconds": seconds,
        "questions_per_second": len(predictions) / seconds,
        "predictions": predictions,
    }


@contextmanager
def _in_eval_mode(model: Any) -> Iterator[None]:
    """Evaluation mode for the block."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@torch.inference_mode()
def generate_answers(
    model: Any, processor: Any, prompts: PromptBatch, max_new_tokens: int
) -> list[str]:
    """Greedy answers to the prompts, in order, without special tokens."""
    inputs = {name: tensor.to(model.device) for name, tensor in prompts.inputs.items()}
    answers = greedy_answers(model, processor.tokenizer, inputs, max_new_tokens)
    return processor.tokenizer.batch_decode(answers, skip_special_tokens=True)


def score(predictions: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """`exact_match`, `exact_match_by_type` and `count_by_type` of the records of `evaluate_model`.

    Each record's `correct` is set.
    """
    from .metrics import ExactMatch, ExactMatchByType, normalize_answer

    given = [record["prediction"] for record in predictions]
    right = [record["reference"] for record in predictions]
    types = [record["question_type"] for record in predictions]
    for record in predictions:
        same = normalize_answer(record["prediction"]) == normalize_answer(record["reference"])
        record["correct"] = same  # type: ignore[index]
    overall = ExactMatch(keep_in_memory=True).compute(predictions=given, references=right)
    by_type = ExactMatchByType(keep_in_memory=True).compute(
        predictions=given, references=right, question_types=types
    )
    return {**overall, **by_type}


def results_table(results: Mapping[str, Any]) -> str:
    """The scores as text: one line per question type, then all questions."""
    rows = [
        (kind, results["count_by_type"][kind], share)
        for kind, share in results["exact_match_by_type"].items()
    ]
    rows.append(("all", results["questions"], results["exact_match"]))
    width = max(len("question type"), *(len(kind) for kind, _, _ in rows))
    lines = [f"{'question type':<{width}}  {'questions':>9}  {'exact match':>11}"]
    lines += [f"{kind:<{width}}  {count:>9,}  {share:>11.2%}" for kind, count, share in rows]
    return "\n".join(lines)


def _batches(
    questions: ConversationRows, batch_size: int, progress: bool
) -> Iterator[list[dict[str, Any]]]:
    """Lists of `batch_size` conversations, the last one shorter, with a progress bar."""
    bar = logging.tqdm(
        total=len(questions), desc="answering", unit="question", disable=not progress
    )
    with bar:
        for start in range(0, len(questions), batch_size):
            stop = min(start + batch_size, len(questions))
            yield [questions[i] for i in range(start, stop)]
            bar.update(stop - start)


def _records(
    batch: list[dict[str, Any]], prompts: PromptBatch, answers: list[str]
) -> list[dict[str, Any]]:
    """What was asked, answered and right, for each conversation of a batch."""
    records = []
    for position, (row, answer) in enumerate(zip(batch, answers, strict=True)):
        [conversation] = parse_row(row, position).conversations
        question = [turn.text() for turn in conversation if turn.role == "user"][-1]
        records.append(
            {
                "id": str(row.get("id", "")),
                "question": question,
                "question_type": prompts.question_types[position],
                "prediction": answer.strip(),
                "reference": prompts.references[position],
            }
        )
    return records

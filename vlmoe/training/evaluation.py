# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Evaluation on a dataset: every question is answered by batched greedy `generate` and scored."""

import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, TypedDict

import torch
from transformers.utils import logging

from ..data.answers import evaluation_mode, greedy_answers
from ..data.collator import PromptBatch, VLMoEPromptCollator
from ..data.conversations import parse_row
from ..data.long_rows import prompt_limit
from ..data.native_chat import tokenizer_of
from ..data.native_collator import NativePromptCollator, prompt_collator
from ..data.row_fields import AnyRow, Rows
from ..data.rows import ConversationRows
from ..hub.json_files import JsonObject
from ..hub.saved_model import Processor
from ..processing.image_sources import DEFAULT_LIMITS, ImageLimits
from ..routing.load import record_expert_load
from ..routing.record import has_experts
from .metrics import ExactMatch, exact_match

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedModel

PromptCollator = VLMoEPromptCollator | NativePromptCollator


class Prediction(TypedDict):
    """One answered question."""

    id: str
    question: str
    question_type: str
    prediction: str
    reference: str
    correct: bool


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` measured.

    Attributes:
        exact_match: share of answers equal to their reference, in 0..1, up to case and surrounding
            white space.
        exact_match_by_type, count_by_type: the same and the number of questions, by question type.
        questions: their number.
        seconds, questions_per_second: wall-clock time of all batches.
        predictions: one record per conversation, in the order of the rows.
        expert_load: as `ExpertLoad.as_dict` gives it; None for a model without experts.
    """

    exact_match: float
    exact_match_by_type: dict[str, float]
    count_by_type: dict[str, int]
    questions: int
    seconds: float
    questions_per_second: float
    predictions: list[Prediction]
    expert_load: JsonObject | None

    def as_dict(self) -> JsonObject:
        """Return every attribute but the predictions, for a JSON file."""
        names = [each.name for each in fields(self) if each.name != "predictions"]
        return {name: getattr(self, name) for name in names}

    def table(self) -> str:
        """Return the scores as text: one line per question type, then all questions."""
        rows = [
            (kind, self.count_by_type[kind], share)
            for kind, share in self.exact_match_by_type.items()
        ]
        rows.append(("all", self.questions, self.exact_match))
        width = max(len("question type"), *(len(kind) for kind, _, _ in rows))
        lines = [f"{'question type':<{width}}  {'questions':>9}  {'exact match':>11}"]
        lines += [f"{kind:<{width}}  {count:>9,}  {share:>11.2%}" for kind, count, share in rows]
        return "\n".join(lines)


class AskingOptions(TypedDict, total=False):
    """The options of `evaluate` that change its figures; see there."""

    batch_size: int
    max_new_tokens: int
    max_length: int | None


def evaluate(
    model: "PreTrainedModel",
    processor: Processor,
    rows: "Rows | datasets.Dataset",
    *,
    batch_size: int = 64,
    max_new_tokens: int = 32,
    max_length: int | None = None,
    image_limits: ImageLimits = DEFAULT_LIMITS,
    allow_image_urls: bool = False,
    progress: bool = False,
) -> Evaluation:
    """Ask a model every question of the rows, and compare its answers with the references.

    The last assistant turn of each conversation is the reference. Decoding is greedy; an answer
    ends at the tokenizer's end token.

    Args:
        model: a generating model, on any device; it keeps its mode.
        processor: the model's; of a language model its tokenizer.
        rows: as `load_rows` gives them, or a list of rows such as
            `{"image": ..., "question": ..., "answer": ...}`; a row may hold several conversations.
        batch_size: conversations answered at the same time; images they share are encoded once.
        max_new_tokens: the longest answer, in tokens.
        max_length: the longest prompt, in tokens; a longer one is an error. By default the model's
            positions less the answer.
        image_limits: on the size of images, for a processor of transformers; a `VLMoEProcessor`
            has limits of its own.
        allow_image_urls: download images that rows name by http(s) URL.
        progress: show a progress bar.

    Raises:
        ValueError: `batch_size` is below 1, there are no rows, a row is malformed, or the model's
            outputs are NaN or infinite.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    questions = ConversationRows(rows)
    if len(questions) == 0:
        raise ValueError("empty dataset: there are no rows to evaluate.")
    limit, urls = prompt_limit(model, max_new_tokens, max_length), allow_image_urls
    collator = prompt_collator(processor, limit, limits=image_limits, allow_image_urls=urls)
    recording = record_expert_load(model) if has_experts(model) else nullcontext()
    batches = _batches(questions, batch_size, progress)
    start = time.perf_counter()
    with recording as load:
        predictions = _predictions(model, processor, batches, collator, max_new_tokens)
    seconds = time.perf_counter() - start
    scores = _scored(predictions)
    return Evaluation(
        scores.exact_match,
        scores.exact_match_by_type,
        scores.count_by_type,
        questions=len(predictions),
        seconds=seconds,
        questions_per_second=len(predictions) / seconds,
        predictions=predictions,
        expert_load=None if load is None else load.as_dict(),
    )


def _predictions(
    model: "PreTrainedModel",
    processor: Processor,
    batches: Iterator[list[AnyRow]],
    collator: PromptCollator,
    max_new_tokens: int,
) -> list[Prediction]:
    """Answer every conversation."""
    predictions: list[Prediction] = []
    tokenizer = tokenizer_of(processor)
    with evaluation_mode(model), torch.inference_mode():
        for batch in batches:
            prompts = collator(batch)
            inputs = {name: tensor.to(model.device) for name, tensor in prompts.inputs.items()}
            tokens = greedy_answers(model, tokenizer, inputs, max_new_tokens)
            answers = tokenizer.batch_decode(tokens, skip_special_tokens=True)
            predictions += _records(batch, prompts, answers)
    return predictions


def _scored(predictions: list[Prediction]) -> ExactMatch:
    """Compare answers and references, and mark each record as correct or not."""
    scores = exact_match(
        [each["prediction"] for each in predictions],
        [each["reference"] for each in predictions],
        [each["question_type"] for each in predictions],
    )
    for record, hit in zip(predictions, scores.hits, strict=True):
        record["correct"] = hit
    return scores


def _batches(
    questions: ConversationRows, batch_size: int, progress: bool
) -> Iterator[list[AnyRow]]:
    """Yield lists of `batch_size` conversations, the last one shorter, with a progress bar."""
    bar = logging.tqdm(
        total=len(questions), desc="answering", unit="question", disable=not progress
    )
    with bar:
        for start in range(0, len(questions), batch_size):
            stop = min(start + batch_size, len(questions))
            yield [questions[i] for i in range(start, stop)]
            bar.update(stop - start)


def _records(batch: list[AnyRow], prompts: PromptBatch, answers: list[str]) -> list[Prediction]:
    """Gather question, answer and reference of each conversation of a batch."""
    records: list[Prediction] = []
    for position, (row, answer) in enumerate(zip(batch, answers, strict=True)):
        [conversation] = parse_row(row, position).conversations
        records.append(
            {
                "id": str(row.get("id", "")),
                "question": [turn.text() for turn in conversation if turn.role == "user"][-1],
                "question_type": prompts.question_types[position],
                "prediction": answer.strip(),
                "reference": prompts.references[position],
                "correct": False,  # until all answers are scored
            }
        )
    return records

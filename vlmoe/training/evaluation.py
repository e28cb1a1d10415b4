# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Evaluation on a dataset: every question is answered by batched greedy `generate` and scored."""

import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, NotRequired, TypedDict

import torch

from ..data.answers import TokenCertainty, evaluation_mode, greedy_answers
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
from ..tasks.class_metrics import accuracy_and_f1
from ..tasks.long_texts import default_on_long_rows, shortening
from ..tasks.table import get_task, task_reader
from ..tasks.task import CertainMetric, Metric, Task
from .label_scores import ImageOptions, require_labels, score_labels
from .metrics import ExactMatch, exact_match
from .questions import Questions

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedModel

LONGEST_ANSWER = 32  # tokens, without a task
PromptCollator = VLMoEPromptCollator | NativePromptCollator


class Prediction(TypedDict):
    """One answered question.

    `label` is the most likely of the labels, if any were given; `scores` are those of the parts of
    the answer, for a task with a `CertainMetric`.
    """

    id: str
    question: str
    question_type: str
    prediction: str
    reference: str
    references: list[str]
    correct: bool
    label: NotRequired[str]
    scores: NotRequired[list[float]]


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
        task: its name, None for none.
        metrics: the figures of the task's metrics by name, and those by likelihood if labels were
            given.
    """

    exact_match: float
    exact_match_by_type: dict[str, float]
    count_by_type: dict[str, int]
    questions: int
    seconds: float
    questions_per_second: float
    predictions: list[Prediction]
    expert_load: JsonObject | None
    task: str | None = None
    metrics: dict[str, float] = field(default_factory=dict)

    def as_dict(self) -> JsonObject:
        """Return every attribute but the predictions, for a JSON file."""
        names = [each.name for each in fields(self) if each.name != "predictions"]
        return {name: getattr(self, name) for name in names}

    def table(self) -> str:
        """Return the scores as text: by question type, of all questions, and other metrics."""
        rows = [
            (kind, self.count_by_type[kind], share)
            for kind, share in self.exact_match_by_type.items()
        ]
        rows.append(("all", self.questions, self.exact_match))
        width = max(len("question type"), *(len(kind) for kind, _, _ in rows))
        lines = [f"{'question type':<{width}}  {'questions':>9}  {'exact match':>11}"]
        lines += [f"{kind:<{width}}  {count:>9,}  {share:>11.2%}" for kind, count, share in rows]
        if self.metrics:
            width = max(map(len, self.metrics))
            lines += [
                "",
                *(f"{name:<{width}}  {value:.4f}" for name, value in self.metrics.items()),
            ]
        return "\n".join(lines)


class AskingOptions(TypedDict, total=False):
    """The options of `evaluate` that change its figures; see there."""

    task: str | None
    labels: list[str] | None
    batch_size: int
    max_new_tokens: int | None
    max_length: int | None
    on_long_rows: str | None


def evaluate(
    model: "PreTrainedModel",
    processor: Processor,
    rows: "Rows | datasets.Dataset",
    *,
    task: str | Task | None = None,
    prompt: str | None = None,
    labels: Sequence[str] | None = None,
    batch_size: int = 64,
    max_new_tokens: int | None = None,
    max_length: int | None = None,
    on_long_rows: str | None = None,
    image_limits: ImageLimits = DEFAULT_LIMITS,
    allow_image_urls: bool = False,
    progress: bool = False,
) -> Evaluation:
    """Ask a model every question of the rows, and compare its answers with the references.

    The last assistant turn of each conversation is the reference. With a task, conversations of a
    row that ask the same are one question with several references: the captions of an image.
    Decoding is greedy; an answer ends at the tokenizer's end token.

    Args:
        model: a generating model, on any device; it keeps its mode.
        processor: the model's; of a language model its tokenizer.
        rows: as `load_rows` gives them, or a list of rows such as
            `{"image": ..., "question": ..., "answer": ...}`; a row may hold several conversations.
        task: whose columns the rows have and whose metrics are measured, see `TASKS`.
        prompt: the task's instruction, by default its own.
        labels: the answers that are possible; their likelihood is compared, too: `score_labels`.
        batch_size: conversations answered at the same time; images they share are encoded once.
        max_new_tokens: the longest answer, in tokens; by default the task's (for boxes twice the
            longest reference), without one 32.
        max_length: the longest prompt, in tokens. By default the model's positions less the answer.
        on_long_rows: a longer prompt is an "error" or is shortened ("shorten-prompt"). By default
            the task's choice, without one "error".
        image_limits: on the size of images, for a processor of transformers; a `VLMoEProcessor`
            has limits of its own.
        allow_image_urls: download images that rows name by http(s) URL.
        progress: show a progress bar.

    Raises:
        ValueError: `batch_size` is below 1, there are no rows, a row is malformed or its answer is
            none of the labels, or the model's outputs are NaN or infinite.
        ImportError: the library of a metric is missing.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    asked = None if task is None else get_task(task)
    on_long_rows = on_long_rows or default_on_long_rows(asked)
    if on_long_rows not in ("error", "shorten-prompt"):
        raise ValueError(f"on_long_rows is {on_long_rows!r}; allowed: error, shorten-prompt.")
    metrics = required_metrics(asked, labels)
    questions = _questions(rows, asked, prompt, labels)
    new_tokens = max_new_tokens or longest_answer(asked, questions.references, model, processor)
    images: ImageOptions = {"image_limits": image_limits, "allow_image_urls": allow_image_urls}
    collator = prompt_collator(
        processor,
        prompt_limit(model, new_tokens, max_length),
        limits=image_limits,
        allow_image_urls=allow_image_urls,
        shorten_prompts=shortening(on_long_rows, asked),
    )
    recording = record_expert_load(model) if has_experts(model) else nullcontext()
    start = time.perf_counter()
    with recording as load:
        batches = questions.batches(batch_size, progress)
        certain = None if asked is None else asked.certain_metric
        predictions = _predictions(model, processor, batches, collator, new_tokens, certain)
    seconds = time.perf_counter() - start
    scores = _scored(predictions, questions.references)
    answers = [each["prediction"] for each in predictions]
    figures = measured(metrics, answers, questions.references)
    if certain is not None:
        of_answers = [each["scores"] for each in predictions]
        figures |= certain.measure(answers, questions.references, of_answers)
    if labels is not None:
        likely = score_labels(
            model, processor, questions, labels, batch_size=batch_size, progress=progress, **images
        ).best()
        figures |= _by_likelihood(predictions, likely)
    return Evaluation(
        scores.exact_match,
        scores.exact_match_by_type,
        scores.count_by_type,
        questions=len(predictions),
        seconds=seconds,
        questions_per_second=len(predictions) / seconds,
        predictions=predictions,
        expert_load=None if load is None else load.as_dict(),
        task=None if asked is None else asked.name,
        metrics=figures,
    )


def _questions(
    rows: "Rows | datasets.Dataset",
    task: Task | None,
    prompt: str | None,
    labels: Sequence[str] | None,
) -> Questions:
    """Read the questions of the rows; raise as `evaluate` does."""
    conversations = ConversationRows(rows, reader=task_reader(task, prompt))
    if len(conversations) == 0:
        raise ValueError("empty dataset: there are no rows to evaluate.")
    questions = Questions(conversations, joined=task is not None)
    if labels is not None:
        questions.require_among(require_labels(labels))
    return questions


def longest_answer(
    task: Task | None,
    references: Sequence[Sequence[str]],
    model: "PreTrainedModel",
    processor: Processor,
) -> int:
    """Return how many tokens an answer may have: the task's, or twice the longest reference.

    The latter leaves half of the model's positions to the prompt, if the reference allows it.
    """
    if task is None:
        return LONGEST_ANSWER
    if task.max_new_tokens is not None:
        return task.max_new_tokens
    tokenizer = tokenizer_of(processor)
    texts = [text for several in references for text in several]
    encoded = tokenizer(texts, add_special_tokens=False).input_ids
    longest = max(map(len, encoded)) + 1  # and the token that ends it
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return 2 * longest if positions is None else max(longest, min(2 * longest, positions // 2))


def _by_likelihood(predictions: list[Prediction], likely: list[str]) -> dict[str, float]:
    """Add the most likely label to each record, and measure the labels."""
    for record, label in zip(predictions, likely, strict=True):
        record["label"] = label
    figures = accuracy_and_f1(likely, [each["references"] for each in predictions])
    return {f"likelihood_{name}": value for name, value in figures.items()}


def required_metrics(task: Task | None, labels: Sequence[str] | None) -> tuple[Metric, ...]:
    """Return the metrics of a task, and with labels those of classes.

    Raises:
        ImportError: the library of a metric is missing.
    """
    metrics = () if task is None else task.metrics
    if labels is not None and accuracy_and_f1 not in metrics:
        metrics = (*metrics, accuracy_and_f1)
    measured(metrics, ["a"], [["a"]])  # before the work
    if task is not None and task.certain_metric is not None:
        task.certain_metric.require()
    return metrics


def measured(
    metrics: Sequence[Metric], answers: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[str, float]:
    """Return the figures of all metrics by name."""
    return {
        name: value for metric in metrics for name, value in metric(answers, references).items()
    }


def _predictions(
    model: "PreTrainedModel",
    processor: Processor,
    batches: Iterator[list[AnyRow]],
    collator: PromptCollator,
    max_new_tokens: int,
    certain: CertainMetric | None,
) -> list[Prediction]:
    """Answer every conversation; score the parts of the answers if asked for."""
    predictions: list[Prediction] = []
    tokenizer = tokenizer_of(processor)
    with evaluation_mode(model), torch.inference_mode():
        for batch in batches:
            prompts = collator(batch)
            inputs = {name: tensor.to(model.device) for name, tensor in prompts.inputs.items()}
            certainty = None if certain is None else TokenCertainty()
            tokens = greedy_answers(model, tokenizer, inputs, max_new_tokens, certainty)
            answers = tokenizer.batch_decode(tokens, skip_special_tokens=True)
            records = _records(batch, prompts, answers)
            if certain is not None and certainty is not None:
                pairs = zip(tokens.tolist(), certainty.log_probabilities().tolist(), strict=True)
                for record, (answer, values) in zip(records, pairs, strict=True):
                    record["scores"] = certain.scores(answer, values, tokenizer)
            predictions += records
    return predictions


def _scored(predictions: list[Prediction], references: list[list[str]]) -> ExactMatch:
    """Compare answers and references, and mark each record as correct or not."""
    scores = exact_match(
        [each["prediction"] for each in predictions],
        references,
        [each["question_type"] for each in predictions],
    )
    for record, hit, several in zip(predictions, scores.hits, references, strict=True):
        record["correct"], record["references"] = hit, several
    return scores


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
                "references": [],
                "correct": False,  # with the references, until all answers are scored
            }
        )
    return records

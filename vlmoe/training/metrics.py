# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Exact match of answers and references, by question type, and the majority-class baseline.

Answers are equal if they are after `normalize_answer`: case and surrounding white space do not
count.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..data.conversations import AnyRow, parse_row, split_reference
from ..tasks.class_metrics import normalize_answer


@dataclass(frozen=True)
class ExactMatch:
    """Shares of answers that equal their reference, in 0..1.

    Attributes:
        exact_match: of all answers.
        exact_match_by_type, count_by_type: of each question type, in alphabetical order; answers
            whose type is "" are left out.
        hits: whether each answer equals its reference.
    """

    exact_match: float
    exact_match_by_type: dict[str, float]
    count_by_type: dict[str, int]
    hits: list[bool]


@dataclass(frozen=True)
class MajorityBaseline:
    """Always giving the most frequent training answer: its exact match on the test rows."""

    answer: str
    exact_match: float
    exact_match_by_type: dict[str, float]


def exact_match(
    predictions: Sequence[str],
    references: Sequence[str | Sequence[str]],
    question_types: Sequence[str],
) -> ExactMatch:
    """Compare answers with their references, one by one.

    Args:
        predictions: the answers.
        references: of each answer one, or several of which any will do.
        question_types: of each answer, "" for none.

    Raises:
        ValueError: there are no answers, or the three lists differ in length.
    """
    if not predictions:
        raise ValueError("There are no answers to compare.")
    triples = list(zip(predictions, references, question_types, strict=True))
    hits = [
        normalize_answer(given)
        in {normalize_answer(each) for each in ([right] if isinstance(right, str) else right)}
        for given, right, _ in triples
    ]
    counts, correct = Counter[str](), Counter[str]()
    for hit, (_, _, kind) in zip(hits, triples, strict=True):
        counts[kind] += 1
        correct[kind] += hit
    types = sorted(kind for kind in counts if kind)
    return ExactMatch(
        sum(hits) / len(hits),
        {kind: correct[kind] / counts[kind] for kind in types},
        {kind: counts[kind] for kind in types},
        hits,
    )


def majority_baseline(
    train_rows: Iterable[AnyRow], test_rows: Iterable[AnyRow]
) -> MajorityBaseline:
    """Score the most frequent answer of the training rows on the test rows.

    Rows are as `load_rows` gives them; an answer is the last assistant turn of a conversation.
    Ties go to the first answer in alphabetical order.

    Raises:
        ValueError: there are no training or no test rows.
    """
    train_answers, _ = _answers(train_rows, "training")
    references, types = _answers(test_rows, "test")
    counts = Counter(normalize_answer(answer) for answer in train_answers)
    answer = min(counts, key=lambda each: (-counts[each], each))
    scores = exact_match([answer] * len(references), references, types)
    return MajorityBaseline(answer, scores.exact_match, scores.exact_match_by_type)


def _answers(rows: Iterable[AnyRow], name: str) -> tuple[list[str], list[str]]:
    """Collect the reference answers of all conversations, and their question types."""
    answers: list[str] = []
    types: list[str] = []
    for position, row in enumerate(rows):
        parsed = parse_row(row, position)
        answers += [split_reference(each, parsed.name)[1] for each in parsed.conversations]
        types += parsed.question_types
    if not answers:
        raise ValueError(f"empty dataset: there are no {name} rows.")
    return answers, types

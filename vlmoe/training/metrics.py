# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Answers against references: exact match, by question type, and the majority-class baseline.

`ExactMatch` and `ExactMatchByType` are `evaluate.Metric`s that need no download when instantiated
directly, and combine:

    metrics = evaluate.combine([ExactMatch(), ExactMatchByType()])
    metrics.add_batch(predictions=[...], references=[...], question_types=[...])
    metrics.compute()

Answers count as equal after `normalize_answer`: spaces around them and upper case do not matter.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..data.conversations import parse_row, split_reference

try:
    import datasets
    import evaluate
except ImportError as error:
    raise ImportError('metrics need the evaluate library: pip install "vlmoe[train]".') from error

INPUTS_DESCRIPTION = """
Args:
    predictions: answers, as strings.
    references: the right answers, as strings.
"""


@dataclass(frozen=True)
class MajorityBaseline:
    """Always giving the most frequent training answer: its exact match on the test rows."""

    answer: str
    exact_match: float
    exact_match_by_type: dict[str, float]


class ExactMatch(evaluate.Metric):
    """`{"exact_match": share of predictions equal to their reference}`, between 0 and 1."""

    def _info(self) -> evaluate.MetricInfo:
        return _metric_info("Share of answers equal to the reference, in 0..1.", {})

    def _compute(self, predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
        hits = _hits(predictions, references)
        return {"exact_match": sum(hits) / len(hits)}


class ExactMatchByType(evaluate.Metric):
    """Exact match per question type, which is a further input, `question_types` (strings).

    Gives `{"exact_match_by_type": {type: share}, "count_by_type": {type: count}}`, types in
    alphabetical order; answers whose type is "" are left out.
    """

    def _info(self) -> evaluate.MetricInfo:
        features = {"question_types": datasets.Value("string")}
        return _metric_info("Share of answers equal to the reference, by question type.", features)

    def _compute(
        self,
        predictions: Sequence[str],
        references: Sequence[str],
        question_types: Sequence[str],
    ) -> dict[str, dict[str, Any]]:
        hits = _hits_by_type(_hits(predictions, references), question_types)
        return {
            "exact_match_by_type": {kind: sum(each) / len(each) for kind, each in hits.items()},
            "count_by_type": {kind: len(each) for kind, each in hits.items()},
        }


def normalize_answer(text: str) -> str:
    """The answer without surrounding white space, case folded."""
    return text.strip().casefold()


def majority_baseline(
    train_rows: Iterable[Mapping[str, Any]], test_rows: Iterable[Mapping[str, Any]]
) -> MajorityBaseline:
    """The most frequent answer of the training rows, scored on the test rows.

    Rows are as `load_rows` gives them; an answer is the last assistant turn of a conversation. Of
    equally frequent answers the first in the alphabet counts. Raises `ValueError` if either has no
    rows.
    """
    train_answers, _ = _answers(train_rows, "training")
    references, types = _answers(test_rows, "test")
    counts = Counter(normalize_answer(answer) for answer in train_answers)
    answer = min(counts, key=lambda each: (-counts[each], each))
    hits = _hits([answer] * len(references), references)
    by_type = {kind: sum(each) / len(each) for kind, each in _hits_by_type(hits, types).items()}
    return MajorityBaseline(answer, sum(hits) / len(hits), by_type)


def _metric_info(description: str, features: dict[str, Any]) -> evaluate.MetricInfo:
    """What evaluate wants to know of a metric of string answers."""
    strings = {name: datasets.Value("string") for name in ("predictions", "references")}
    return evaluate.MetricInfo(
        description=description,
        citation="",
        inputs_description=INPUTS_DESCRIPTION,
        features=datasets.Features({**strings, **features}),
    )


def _hits(predictions: Sequence[str], references: Sequence[str]) -> list[bool]:
    """Whether each prediction equals its reference."""
    pairs = zip(predictions, references, strict=True)
    return [normalize_answer(given) == normalize_answer(right) for given, right in pairs]


def _hits_by_type(hits: Sequence[bool], types: Sequence[str]) -> dict[str, list[bool]]:
    """The hits of each question type, types in alphabetical order."""
    groups: dict[str, list[bool]] = defaultdict(list)
    for hit, kind in zip(hits, types, strict=True):
        if kind:
            groups[kind].append(hit)
    return dict(sorted(groups.items()))


def _answers(rows: Iterable[Mapping[str, Any]], name: str) -> tuple[list[str], list[str]]:
    """The reference answers of all conversations, and their question types."""
    answers: list[str] = []
    types: list[str] = []
    for position, row in enumerate(rows):
        parsed = parse_row(row, position)
        answers += [split_reference(each, parsed.name)[1] for each in parsed.conversations]
        types += parsed.question_types
    if not answers:
        raise ValueError(f"empty dataset: there are no {name} rows.")
    return answers, types

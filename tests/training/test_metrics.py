"""Metrics against counts by hand."""

from typing import Any

import datasets
import evaluate
import pytest

from vlmoe.training.metrics import (
    ExactMatch,
    MajorityBaseline,
    exact_match,
    majority_baseline,
    normalize_answer,
)

PREDICTIONS = ["Yes", " no\n", "blue", "circle", "red"]
REFERENCES = ["yes", "no", "red", "circle", "red"]
TYPES = ["yes/no", "yes/no", "color", "", "color"]
BY_TYPE = {
    "exact_match_by_type": {"color": 0.5, "yes/no": 1.0},
    "count_by_type": {"color": 2, "yes/no": 2},
}


def row(answers: list[str], kinds: list[str] | None = None) -> dict[str, Any]:
    conversations = [
        [{"role": "user", "content": "q"}, {"role": "assistant", "content": answer}]
        for answer in answers
    ]
    return {"messages": conversations, "question_type": kinds}


def test_exact_match_ignores_case_and_outer_space_and_is_counted_by_type() -> None:
    scores = exact_match(PREDICTIONS, REFERENCES, TYPES)
    assert scores == ExactMatch(0.8, **BY_TYPE, hits=[True, True, False, True, True])
    assert list(scores.exact_match_by_type) == ["color", "yes/no"]  # no type is left out


class SharesOfEqual(evaluate.Metric):
    """A metric of a user's own."""

    def _info(self) -> evaluate.MetricInfo:
        strings = {name: datasets.Value("string") for name in ("predictions", "references")}
        features = datasets.Features(strings)
        return evaluate.MetricInfo(description="", citation="", features=features)

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        pairs = list(zip(predictions, references, strict=True))
        return {"share": sum(given == right for given, right in pairs) / len(pairs)}


def test_metrics_of_the_evaluate_library_take_the_same_lists() -> None:
    given = [normalize_answer(each) for each in PREDICTIONS]
    result = SharesOfEqual(keep_in_memory=True).compute(predictions=given, references=REFERENCES)
    assert result == {"share": exact_match(PREDICTIONS, REFERENCES, TYPES).exact_match}


def test_answers_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(ValueError, match="no answers"):
        exact_match([], [], [])
    with pytest.raises(ValueError, match="zip"):
        exact_match(["a"], ["a", "b"], ["", ""])


def test_normalized_answers_keep_inner_space() -> None:
    assert normalize_answer("  Big  STRASSE\n") == "big  strasse"
    assert normalize_answer("straße") == "strasse"


def test_majority_is_the_most_frequent_training_answer() -> None:
    train = [row(["yes", "Yes", "no"]), row(["red", "yes"])]
    test = [row(["yes", "no"], ["yes/no", "yes/no"]), row(["red", "YES "], ["color", "yes/no"])]
    expected = MajorityBaseline("yes", 0.5, {"color": 0.0, "yes/no": 2 / 3})
    assert majority_baseline(train, test) == expected


def test_majority_of_a_tie_does_not_depend_on_order() -> None:
    test = [row(["a", "b"])]
    assert majority_baseline([row(["b", "a"])], test) == majority_baseline([row(["a", "b"])], test)


def test_majority_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="there are no training rows"):
        majority_baseline([], [row(["a"])])
    with pytest.raises(ValueError, match="there are no test rows"):
        majority_baseline([row(["a"])], [])


def test_majority_of_easy_vqa_is_the_published_one() -> None:
    pytest.importorskip("easy_vqa")
    from vlmoe.data.easy_vqa import question_rows

    result = majority_baseline(question_rows("train"), question_rows("test"))
    assert result.answer == "yes"
    assert result.exact_match == pytest.approx(3611 / 9673)
    assert set(result.exact_match_by_type) == {"shape", "color", "yes/no"}

"""Metrics against counts by hand."""

from pathlib import Path
from typing import Any

import evaluate
import pytest

from vlmoe.training.metrics import (
    ExactMatch,
    ExactMatchByType,
    MajorityBaseline,
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


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No network, and nothing written outside the test's folder."""
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", tmp_path)
    monkeypatch.setattr(evaluate, "load", None)


def row(answers: list[str], kinds: list[str] | None = None) -> dict[str, Any]:
    conversations = [
        [{"role": "user", "content": "q"}, {"role": "assistant", "content": answer}]
        for answer in answers
    ]
    return {"messages": conversations, "question_type": kinds}


def test_exact_match_ignores_case_and_outer_space() -> None:
    result = ExactMatch().compute(predictions=PREDICTIONS, references=REFERENCES)
    assert result == {"exact_match": 0.8}


def test_normalised_answers_keep_inner_space() -> None:
    assert normalize_answer("  Big  STRASSE\n") == "big  strasse"
    assert normalize_answer("straße") == "strasse"


def test_types_are_counted_apart_and_no_type_left_out() -> None:
    metric = ExactMatchByType()
    result = metric.compute(predictions=PREDICTIONS, references=REFERENCES, question_types=TYPES)
    assert result == BY_TYPE
    assert list(result["exact_match_by_type"]) == ["color", "yes/no"]


def test_combined_metrics_take_batches() -> None:
    metrics = evaluate.combine([ExactMatch(), ExactMatchByType()])
    for start in (0, 3):
        stop = start + 3
        metrics.add_batch(
            predictions=PREDICTIONS[start:stop],
            references=REFERENCES[start:stop],
            question_types=TYPES[start:stop],
        )
    assert metrics.compute() == {"exact_match": 0.8, **BY_TYPE}


def test_two_metrics_at_once_do_not_mix() -> None:
    first, second = ExactMatch(), ExactMatch()
    first.add_batch(predictions=["a"], references=["a"])
    second.add(prediction="a", reference="b")
    assert first.compute() == {"exact_match": 1.0}
    assert second.compute() == {"exact_match": 0.0}


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

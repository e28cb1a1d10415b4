"""Accuracy and macro-F1 equal scikit-learn's, and hand-counted values."""

import random

import pytest

from vlmoe.tasks.class_metrics import accuracy_and_f1


def test_accuracy_and_f1_are_those_counted_by_hand() -> None:
    answers = ["Cat ", "cat", "dog", "a cat?"]
    truth = [["cat"], ["dog"], ["dog"], ["cat"]]
    # cat: precision 1/2, recall 1/2; dog: precision 1, recall 1/2
    expected = {"accuracy": 0.5, "macro_f1": (1 / 2 + 2 / 3) / 2}
    assert accuracy_and_f1(answers, truth) == pytest.approx(expected)


def test_accuracy_and_f1_are_scikit_learns() -> None:
    scikit = pytest.importorskip("sklearn.metrics")
    draw = random.Random(1)
    truth = draw.choices("abcd", weights=(9, 3, 1, 1), k=200)
    answers = [each if draw.random() < 0.7 else draw.choice("abcde") for each in truth]
    f1 = scikit.f1_score(truth, answers, average="macro", labels=sorted(set(truth)))
    expected = {"accuracy": scikit.accuracy_score(truth, answers), "macro_f1": f1}
    assert accuracy_and_f1(answers, [[each] for each in truth]) == pytest.approx(expected)


def test_a_class_has_one_name() -> None:
    with pytest.raises(ValueError, match="one name, got 'a', 'b'"):
        accuracy_and_f1(["a"], [["a", "b"]])

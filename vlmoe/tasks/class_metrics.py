# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Accuracy and macro-F1 of answers that name a class."""

from collections import Counter
from collections.abc import Sequence


def normalize_answer(text: str) -> str:
    """Strip surrounding white space and fold case."""
    return text.strip().casefold()


def accuracy_and_f1(
    answers: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[str, float]:
    """Return the accuracy and the macro-F1, in 0..1.

    F1 is averaged over the classes that occur in the references. An answer that names no class
    counts as missing its own.

    Raises:
        ValueError: an answer has not one reference but several.
    """
    pairs = []
    for answer, several in zip(answers, references, strict=True):
        if len(several) != 1:
            raise ValueError(f"a class has one name, got {', '.join(map(repr, several))}.")
        pairs.append((normalize_answer(answer), normalize_answer(several[0])))
    right = Counter(true for given, true in pairs if given == true)
    given, true = (Counter(side) for side in zip(*pairs, strict=True))
    f1 = [2 * right[name] / (given[name] + count) for name, count in true.items()]
    return {"accuracy": right.total() / len(pairs), "macro_f1": sum(f1) / len(f1)}

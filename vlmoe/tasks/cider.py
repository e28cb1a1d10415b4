# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""CIDEr-D of captions (Vedantam et al., https://arxiv.org/abs/1411.5726, section 5).

A caption's n-grams, n = 1 to 4, are weighted by how rarely they occur in the references of other
images. Counts are clipped to those of the reference, and a difference in length is punished by a
Gaussian. The figures equal those of `pycocoevalcap` on the same tokens. The rarity comes from the
references that are scored, so that scores of different sets cannot be compared.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence

LONGEST = 4
SIGMA = 6.0
WORD = re.compile(r"\w+(?:['\u2019-]\w+)*")

Ngram = tuple[str, ...]


def words(text: str) -> list[str]:
    """Cut a text into words in lower case; punctuation is left out."""
    return WORD.findall(text.casefold())


def cider_d(answers: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """Score each answer against its references; 10 is the most.

    With fewer than two answers every n-gram is common, and the scores are 0.

    Args:
        answers: one for each image.
        references: of each image, one or more.
    """
    counted = [[_counts(words(each)) for each in several] for several in references]
    documents = Counter(ngram for several in counted for ngram in set().union(*several))
    weights = {
        ngram: math.log(len(references)) - math.log(count) for ngram, count in documents.items()
    }
    unseen = math.log(max(len(references), 1))
    scores = []
    for answer, several in zip(answers, counted, strict=True):
        given = _Vector(_counts(words(answer)), weights, unseen)
        each = [given.similarity(_Vector(counts, weights, unseen)) for counts in several]
        scores.append(10 * sum(each) / len(each))
    return scores


def _counts(tokens: Sequence[str]) -> Counter[Ngram]:
    """Count the n-grams of all lengths."""
    return Counter(
        tuple(tokens[start : start + size])
        for size in range(1, LONGEST + 1)
        for start in range(len(tokens) - size + 1)
    )


class _Vector:
    """The weighted n-grams of a caption, one vector for each n."""

    def __init__(self, counts: Counter[Ngram], weights: dict[Ngram, float], unseen: float) -> None:
        self.values: list[dict[Ngram, float]] = [{} for _ in range(LONGEST)]
        for ngram, count in counts.items():
            self.values[len(ngram) - 1][ngram] = count * weights.get(ngram, unseen)
        self.norms = [math.hypot(*values.values()) for values in self.values]
        # The reference implementation measures length in bigrams.
        self.length = sum(count for ngram, count in counts.items() if len(ngram) == 2)

    def similarity(self, reference: "_Vector") -> float:
        """Return the clipped cosine with a reference, the mean over n, in 0..1."""
        total = 0.0
        for values, norm, theirs, their_norm in zip(
            self.values, self.norms, reference.values, reference.norms, strict=True
        ):
            if norm and their_norm:
                shared = sum(
                    min(value, theirs[ngram]) * theirs[ngram]
                    for ngram, value in values.items()
                    if ngram in theirs
                )
                total += shared / (norm * their_norm)
        gap = self.length - reference.length
        return total / LONGEST * math.exp(-(gap**2) / (2 * SIGMA**2))

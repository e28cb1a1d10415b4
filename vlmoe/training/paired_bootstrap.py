# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""How sure a difference of two accuracies is: the paired bootstrap.

Both models answered the same questions, so the differences are taken question by question, and the
variance that the questions have in common falls out (Efron and Tibshirani, An Introduction to the
Bootstrap, 1993, chapter 13).
"""

import numpy as np

RESAMPLES = 10_000
LEVEL = 0.95


def paired_bootstrap(
    ours: np.ndarray,
    peer: np.ndarray,
    groups: np.ndarray | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> dict[str, float]:
    """Mean of `ours - peer` and its 95% percentile interval.

    Seeds and groups of questions are drawn with replacement, each by itself: what holds of these
    seeds and these pictures should hold of others.

    Args:
        ours, peer: (seeds, questions), 1 where the answer is right and 0 where it is wrong.
        groups: (questions,), the picture that a question is about: questions about one picture are
            drawn together, as they are right or wrong together. By default each for itself.
        seed, resamples: of the draws, and how many.

    Returns:
        `mean`, `low` and `high`, in -1..1.

    Raises:
        ValueError: the shapes differ, or are not (seeds, questions).
    """
    ours, peer = np.asarray(ours, float), np.asarray(peer, float)
    if ours.shape != peer.shape or ours.ndim != 2 or 0 in ours.shape:
        raise ValueError(
            f"`ours` has shape {ours.shape}, `peer` {peer.shape}; allowed: the same (seeds, "
            "questions), none of them 0."
        )
    difference = ours - peer
    seeds, questions = difference.shape
    labels = np.arange(questions) if groups is None else np.unique(groups, return_inverse=True)[1]
    if len(labels) != questions:
        raise ValueError(f"`groups` has {len(labels)} entries for {questions} questions.")
    size = np.bincount(labels)  # (groups,)
    sums = np.stack([np.bincount(labels, weights=row) for row in difference])  # (seeds, groups)
    rng = np.random.default_rng(seed)
    means = np.empty(resamples)
    for i in range(resamples):
        drawn_seeds = np.bincount(rng.integers(seeds, size=seeds), minlength=seeds)
        drawn = np.bincount(rng.integers(len(size), size=len(size)), minlength=len(size))
        means[i] = drawn_seeds @ sums @ drawn / (seeds * (size @ drawn))
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return {"mean": float(difference.mean()), "low": float(low), "high": float(high)}

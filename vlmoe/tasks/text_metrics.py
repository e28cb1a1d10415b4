# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Metrics of generated text: BLEU, chrF, ROUGE-L and CIDEr-D.

Each takes the answers and, for each answer, its references, and returns figures by name. BLEU and
chrF are sacrebleu's, 0..100; ROUGE-L is rouge-score's F-measure, the best of the references, 0..1;
CIDEr-D is 0..10.
"""

import importlib
from collections.abc import Sequence
from types import ModuleType

from .cider import cider_d


def bleu(answers: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return the corpus BLEU, up to 4-grams."""
    scorer = _library("sacrebleu").BLEU()
    return {"bleu": scorer.corpus_score(list(answers), _streams(references)).score}


def chrf(answers: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return the corpus chrF, up to 6 characters."""
    scorer = _library("sacrebleu").CHRF()
    return {"chrf": scorer.corpus_score(list(answers), _streams(references)).score}


def rouge_l(answers: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return the mean ROUGE-L of all answers."""
    scorer = _library("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
    scores = [
        scorer.score_multi(list(several), answer)["rougeL"].fmeasure
        for answer, several in zip(answers, references, strict=True)
    ]
    return {"rouge_l": sum(scores) / len(scores)}


def cider(answers: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return the mean CIDEr-D of all answers."""
    scores = cider_d(answers, references)
    return {"cider_d": sum(scores) / len(scores)}


def _streams(references: Sequence[Sequence[str]]) -> list[list[str | None]]:
    """Turn references by answer into sacrebleu's streams; None where an answer has no more."""
    return [
        [several[i] if i < len(several) else None for several in references]
        for i in range(max(map(len, references)))
    ]


def _library(module: str) -> ModuleType:
    """Import a library of the extra `metrics`."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f'this metric needs {module.partition(".")[0]}: pip install "vlmoe[metrics]".'
        ) from error

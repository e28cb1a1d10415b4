"""CIDEr-D equals the reference implementation; BLEU, chrF and ROUGE-L are the libraries'."""

import random
from typing import Any

import pytest
import sacrebleu
from rouge_score import rouge_scorer

from vlmoe import get_task
from vlmoe.tasks.cider import cider_d, words
from vlmoe.tasks.text_metrics import bleu, chrf, cider, rouge_l

WORDS = "a the red blue circle square above below beside small large is".split()


def made_pairs(count: int) -> tuple[list[str], list[list[str]]]:
    """Answers, and two references of each, of which the second is near the answer."""
    draw = random.Random(0)

    def caption() -> list[str]:
        return draw.choices(WORDS, k=draw.randint(1, 11))

    answers = [caption() for _ in range(count)]
    near = [[word for word in answer if draw.random() < 0.8] or ["a"] for answer in answers]
    return (
        [" ".join(answer) for answer in answers],
        [[" ".join(caption()), " ".join(each)] for each in near],
    )


# pycocoevalcap 1.2's scores of these pairs
CATS = (
    ["a red cat sits on the mat", "two dogs", "a bird bird bird", "snow"],
    [
        ["a red cat on a mat", "the cat sits on the mat"],
        ["two dogs run in the park"],
        ["a bird in a tree", "one bird"],
        ["rain on a window"],
    ],
)
CATS_SCORES = [5.29794595, 2.22981397, 0.83977738, 0.0]


def test_cider_d_equals_known_scores_of_the_reference_implementation() -> None:
    assert cider_d(*CATS) == pytest.approx(CATS_SCORES, abs=1e-8)
    assert cider(*CATS) == {"cider_d": pytest.approx(sum(CATS_SCORES) / 4, abs=1e-8)}


def test_cider_d_equals_pycocoevalcap() -> None:
    Cider = pytest.importorskip("pycocoevalcap.cider.cider").Cider
    for answers, references in (made_pairs(200), CATS):
        numbers = range(len(answers))
        _, expected = Cider().compute_score(
            {i: references[i] for i in numbers}, {i: [answers[i]] for i in numbers}
        )
        assert cider_d(answers, references) == pytest.approx(expected.tolist(), abs=1e-9)


def test_the_references_themselves_score_ten() -> None:
    _, references = made_pairs(20)
    same = [[several[1]] for several in references if len(several[1].split()) > 4]
    assert cider_d([several[0] for several in same], same) == pytest.approx([10.0] * len(same))


def test_words_are_in_lower_case_and_without_punctuation() -> None:
    assert words("The cat's  well-fed, isn't it? Ärger!") == [
        *("the", "cat's", "well-fed", "isn't", "it", "ärger"),
    ]


def test_bleu_and_chrf_are_sacrebleus_with_any_number_of_references() -> None:
    answers, references = made_pairs(30)
    streams = [list(each) for each in zip(*references, strict=True)]
    assert bleu(answers, references)["bleu"] == sacrebleu.corpus_bleu(answers, streams).score
    assert chrf(answers, references)["chrf"] == sacrebleu.corpus_chrf(answers, streams).score
    references[3] = references[3][1:]
    streams[0][3], streams[1][3] = references[3][0], None  # type: ignore[call-overload]
    assert bleu(answers, references)["bleu"] == sacrebleu.corpus_bleu(answers, streams).score


def test_rouge_l_is_that_of_the_best_reference() -> None:
    scorer = rouge_scorer.RougeScorer(["rougeL"])
    answers, references = made_pairs(30)
    expected = [
        max(scorer.score(each, answer)["rougeL"].fmeasure for each in several)
        for answer, several in zip(answers, references, strict=True)
    ]
    assert rouge_l(answers, references)["rouge_l"] == pytest.approx(sum(expected) / 30)
    # "a b d" of "a b c d e": precision 1, recall 3/5
    assert rouge_l(["a b d"], [["a b c d e"]])["rouge_l"] == pytest.approx(2 * 0.6 / 1.6)


def test_a_missing_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(name: str, *args: Any) -> Any:
        raise ImportError(name)

    monkeypatch.setattr("importlib.import_module", fails)
    for metric in get_task("translation").metrics:
        with pytest.raises(ImportError, match=r"needs sacrebleu: pip install .vlmoe\[metrics\]"):
            metric(["a"], [["a"]])

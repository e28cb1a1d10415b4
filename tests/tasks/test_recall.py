"""Recall@k and median ranks equal those of a plain sort, in both directions."""

import pytest
import torch

from vlmoe.tasks.recall import retrieval_scores


def sorted_ranks(scores: torch.Tensor, right: list[set[int]]) -> list[int]:
    """The place of the first right item of each query."""
    orders = [sorted(range(scores.shape[1]), key=lambda item: -row[item]) for row in scores]
    return [
        1 + min(order.index(item) for item in items)
        for order, items in zip(orders, right, strict=True)
    ]


def test_recall_equals_that_of_a_sort() -> None:
    similarity = torch.randn(45, 30, generator=torch.Generator().manual_seed(0))
    owners = [*range(30), *range(15)]  # the first 15 images have two texts
    similarity[torch.arange(45), torch.tensor(owners)] += 1.5
    scores = retrieval_scores(similarity, owners)
    texts_of = [{text for text, owner in enumerate(owners) if owner == i} for i in range(30)]
    for recall, ranks in (
        (scores.text_to_image, sorted_ranks(similarity, [{owner} for owner in owners])),
        (scores.image_to_text, sorted_ranks(similarity.T, texts_of)),
    ):
        for k in (1, 5, 10):
            assert recall.at[k] == pytest.approx(sum(rank <= k for rank in ranks) / len(ranks))
        middle = sorted(ranks)
        median = (middle[(len(ranks) - 1) // 2] + middle[len(ranks) // 2]) / 2
        assert recall.median_rank == median
    assert scores.figures()["image_to_text_r5"] == scores.image_to_text.at[5]


def test_ties_score_nothing() -> None:
    scores = retrieval_scores(torch.zeros(20, 20))
    assert set(scores.text_to_image.at.values()) == {0.0} and scores.text_to_image.median_rank == 20
    assert retrieval_scores(torch.eye(3)).image_to_text.at[1] == 1.0


@pytest.mark.parametrize(
    ("similarity", "owners", "message"),
    [
        (torch.zeros(3), None, "must be"),
        (torch.full((2, 2), torch.nan), None, "not finite"),
        (torch.zeros(3, 2), None, "3 texts and 2 images"),
        (torch.zeros(3, 2), [0, 0, 0], "got 3 entries of 1 images"),
    ],
)
def test_what_does_not_fit_is_refused(
    similarity: torch.Tensor, owners: list[int] | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        retrieval_scores(similarity, owners)

"""Recall at k and median rank, against a plain loop and by hand."""

import statistics

import pytest
import torch

from vlmoe.tasks.retrieval import require_unique, retrieval


def rank(scores: list[float], matches: set[int]) -> int:
    """Of the nearest match: all others are passed that are as near or nearer."""
    best = max(scores[match] for match in matches)
    return 1 + sum(score >= best for i, score in enumerate(scores) if i not in matches)


@pytest.mark.parametrize("several", [True, False])
def test_recall_and_median_rank_are_those_of_a_loop(several: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    image_of = [0, 1, 2, 2, 3, 4, 4, 4, 5, 6, 7, 8, 9, 10, 11] if several else None
    owner = image_of or list(range(12))
    similarity = torch.rand(12, len(owner), generator=generator).round(decimals=1)
    found = retrieval(similarity, image_of)
    own = [{c for c, image in enumerate(owner) if image == i} for i in range(12)]
    of_images = [rank(row, own[i]) for i, row in enumerate(similarity.tolist())]
    of_captions = [rank(row, {owner[c]}) for c, row in enumerate(similarity.T.tolist())]
    for ranking, ranks in ((found.image_to_text, of_images), (found.text_to_image, of_captions)):
        for k in (1, 5, 10):
            assert ranking.recall[k] == pytest.approx(sum(r <= k for r in ranks) / len(ranks))
        assert ranking.median_rank == statistics.median(ranks) and ranking.queries == len(ranks)
    assert 0 < found.text_to_image.recall[5] < 1


def test_a_small_table_by_hand() -> None:
    found = retrieval(torch.tensor([[0.9, 0.1, 0.2], [0.3, 0.5, 0.6], [0.95, 0.0, 0.7]]))
    assert found.as_dict() == pytest.approx(
        {
            "image_to_text_recall@1": 1 / 3,
            "image_to_text_recall@5": 1,
            "image_to_text_recall@10": 1,
            "image_to_text_median_rank": 2,
            "text_to_image_recall@1": 2 / 3,
            "text_to_image_recall@5": 1,
            "text_to_image_recall@10": 1,
            "text_to_image_median_rank": 1,
        }
    )


def test_a_collapsed_model_finds_nothing() -> None:
    found = retrieval(torch.ones(20, 20))
    assert found.image_to_text.recall[10] == 0 and found.text_to_image.median_rank == 20


def test_tables_that_are_no_pairs_are_refused() -> None:
    with pytest.raises(ValueError, match="2 images by 3 captions"):
        retrieval(torch.ones(2, 3))
    with pytest.raises(ValueError, match="each image must have a caption"):
        retrieval(torch.ones(2, 2), [0, 0])
    with pytest.raises(ValueError, match="some are not"):
        retrieval(torch.tensor([[1.0, float("nan")], [0.0, 1.0]]))


def test_captions_that_repeat_are_named() -> None:
    require_unique(["a", "b"])
    with pytest.raises(ValueError, match=r"'a cat' stands 3 times; 3 of 6 captions repeat"):
        require_unique(["a cat", "b", "a cat", "b", "a cat", "c"])

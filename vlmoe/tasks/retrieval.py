# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Recall at k and median rank of image-text retrieval, both ways.

Shapes: I images, C captions; each caption belongs to one image, and each image has a caption.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

TOP = (1, 5, 10)


@dataclass(frozen=True)
class Ranking:
    """How well one side finds the other.

    Attributes:
        recall: by k, the share of queries whose match is among the k nearest.
        median_rank: of the match, 1 is the nearest.
        queries: their number.
    """

    recall: dict[int, float]
    median_rank: float
    queries: int


@dataclass(frozen=True)
class Retrieval:
    """Both ways of image-text retrieval.

    Attributes:
        image_to_text: an image finds one of its captions.
        text_to_image: a caption finds its image.
    """

    image_to_text: Ranking
    text_to_image: Ranking

    def as_dict(self) -> dict[str, float]:
        """Return `image_to_text_recall@1` and the like, shares between 0 and 1, and ranks."""
        figures: dict[str, float] = {}
        for way, ranking in vars(self).items():
            figures |= {f"{way}_recall@{k}": share for k, share in ranking.recall.items()}
            figures[f"{way}_median_rank"] = ranking.median_rank
        return figures


def retrieval(similarity: torch.Tensor, image_of: Sequence[int] | None = None) -> Retrieval:
    """Rank captions for images and images for captions.

    A rank counts all that is as near as the match, so that a model that gives everything the same
    embedding finds nothing.

    Args:
        similarity: (I, C), larger is nearer.
        image_of: (C,) the image of each caption; by default caption i belongs to image i.

    Raises:
        ValueError: shapes do not fit, a similarity is not a number, or an image has no caption.
    """
    images, captions = similarity.shape
    owner = torch.arange(captions) if image_of is None else torch.as_tensor(image_of)
    if owner.shape != (captions,) or set(owner.tolist()) != set(range(images)):
        raise ValueError(
            f"similarity is {images} images by {captions} captions; each caption must belong to "
            f"one of the images, and each image must have a caption."
        )
    if not captions or similarity.isnan().any():
        raise ValueError("Similarities must be numbers, of at least one pair; some are not.")
    similarity = similarity.float().cpu()
    is_own = owner == torch.arange(images)[:, None]  # (I, C)
    best = similarity.masked_fill(~is_own, -torch.inf).amax(1, keepdim=True)  # (I, 1)
    of_images = 1 + (~is_own & (similarity >= best)).sum(1)
    own = similarity[owner, torch.arange(captions)]  # (C,)
    of_captions = 1 + (~is_own & (similarity >= own)).sum(0)
    return Retrieval(_ranking(of_images), _ranking(of_captions))


def require_unique(captions: Sequence[str]) -> None:
    """Refuse captions that several pairs share: only one of them would count as found.

    Raises:
        ValueError: there are some; the message names the most frequent one.
    """
    ((caption, times),) = Counter(captions).most_common(1) or [("", 1)]
    if times > 1:
        shared = len(captions) - len(set(captions))
        raise ValueError(
            f"the caption {caption!r:.80} stands {times} times; {shared} of {len(captions)} "
            "captions repeat another. Retrieval needs captions that are all different: drop the "
            "rows that repeat one, or give images with several captions as one row."
        )


def _ranking(ranks: torch.Tensor) -> Ranking:
    recall = {k: (ranks <= k).double().mean().item() for k in TOP}
    return Ranking(recall, ranks.double().quantile(0.5).item(), len(ranks))

# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Recall@k and the median rank of retrieval, from a matrix of similarities."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

KS = (1, 5, 10)


@dataclass(frozen=True)
class Recall:
    """How high the right items rank, in one direction.

    Attributes:
        at: by k, the share of queries with a right item among the first k, in 0..1.
        median_rank: of the best right item; 1 is the first place.
    """

    at: dict[int, float]
    median_rank: float


@dataclass(frozen=True)
class RetrievalScores:
    """Recall from text to image, and from image to text."""

    text_to_image: Recall
    image_to_text: Recall

    def figures(self) -> dict[str, float]:
        """Return every figure by name, such as `text_to_image_r1`."""
        named: dict[str, float] = {}
        for direction in ("text_to_image", "image_to_text"):
            recall: Recall = getattr(self, direction)
            named |= {f"{direction}_r{k}": share for k, share in recall.at.items()}
            named[f"{direction}_median_rank"] = recall.median_rank
        return named


def retrieval_scores(
    similarity: torch.Tensor, image_of_text: Sequence[int] | None = None, ks: Sequence[int] = KS
) -> RetrievalScores:
    """Score a matrix of similarities.

    Wrong items that tie with a right one rank before it: a constant matrix scores nothing.

    Args:
        similarity: (texts, images), higher is more alike.
        image_of_text: (texts,), the image that each text belongs to; an image may have several
            texts. By default text i belongs to image i.
        ks: the depths of the recall.

    Raises:
        ValueError: the matrix is empty or not finite, or the images of the texts do not fit it.
    """
    if similarity.ndim != 2 or not similarity.numel():
        raise ValueError(f"similarity must be (texts, images), got {tuple(similarity.shape)}.")
    if not similarity.isfinite().all():
        raise ValueError("the similarities are not finite.")
    texts, images = similarity.shape
    owners = list(range(texts)) if image_of_text is None else list(image_of_text)
    if len(owners) != texts or set(owners) != set(range(images)):
        raise ValueError(
            f"{texts} texts and {images} images need one image for each text, and a text for each "
            f"image; got {len(owners)} entries of {len(set(owners))} images."
        )
    is_right = torch.zeros(texts, images, dtype=torch.bool)
    is_right[torch.arange(texts), torch.tensor(owners)] = True
    similarity = similarity.detach().cpu()
    return RetrievalScores(_recall(similarity, is_right, ks), _recall(similarity.T, is_right.T, ks))


def _recall(similarity: torch.Tensor, is_right: torch.Tensor, ks: Sequence[int]) -> Recall:
    """Score one direction; both are (queries, items)."""
    best = similarity.masked_fill(~is_right, -torch.inf).amax(1, keepdim=True)
    ranks = 1 + ((similarity >= best) & ~is_right).sum(1)
    at = {k: (ranks <= k).double().mean().item() for k in ks}
    return Recall(at, ranks.double().quantile(0.5).item())

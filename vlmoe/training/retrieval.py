# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Retrieval on a dataset: rows of the task `image-text-retrieval`, each an image and captions."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..data.conversations import parse_row
from ..data.images import open_image
from ..data.row_fields import Rows
from ..hub.json_files import JsonObject
from ..processing.image_sources import DEFAULT_LIMITS, ImageLimits
from ..tasks.retrieval import Retrieval

if TYPE_CHECKING:
    from PIL import Image
    from sentence_transformers import SentenceTransformer

RETRIEVAL_TASK = "image-text-retrieval"


@dataclass(frozen=True)
class RetrievalEvaluation:
    """What `evaluate_retrieval_rows` measured.

    Attributes:
        images: their number.
        found: recalls and ranks, both ways.
    """

    images: int
    found: Retrieval

    def as_dict(self) -> JsonObject:
        """Return the figures as `Evaluation.as_dict` does; there is no exact match."""
        return {
            "exact_match": None,
            "exact_match_by_type": {},
            "count_by_type": {},
            "questions": self.images,
            "expert_load": None,
            "task": RETRIEVAL_TASK,
            "metrics": self.found.as_dict(),
        }

    def table(self) -> str:
        """Return the figures as text, a way a line."""
        tops = self.found.image_to_text.recall
        lines = [
            f"{'':13}  {'queries':>7}" + "".join(f"  {f'R@{k}':>7}" for k in tops) + "  median"
        ]
        for way, ranking in vars(self.found).items():
            shares = "".join(f"  {share:>7.2%}" for share in ranking.recall.values())
            name = way.replace("_", " ")
            lines.append(f"{name:13}  {ranking.queries:>7,}{shares}  {ranking.median_rank:>6g}")
        return "\n".join(lines)


def evaluate_retrieval_rows(
    model: "SentenceTransformer",
    rows: Rows,
    *,
    batch_size: int = 32,
    image_limits: ImageLimits = DEFAULT_LIMITS,
    allow_image_urls: bool = False,
) -> RetrievalEvaluation:
    """Measure retrieval on rows as `load_rows(..., task="image-text-retrieval")` gives them.

    Args:
        model: as `embedding_model` returns it.
        rows: each of one image and its captions, the answers of its conversations.
        batch_size: of encoding.
        image_limits: of the images.
        allow_image_urls: download images that rows name by http(s) URL.

    Raises:
        ValueError: a row has not one image, captions repeat, or an image cannot be read.
    """
    from .embedding import evaluate_retrieval

    images: list[Image.Image] = []
    captions: list[Sequence[str]] = []
    for position, row in enumerate(rows):
        parsed = parse_row(row, position)
        if len(parsed.images) != 1:
            raise ValueError(
                f"{parsed.name} has {len(parsed.images)} images; retrieval needs one a row."
            )
        image, name = parsed.images[0], parsed.name
        images.append(open_image(image, name, limits=image_limits, allow_urls=allow_image_urls))
        captions.append([conversation[-1].text() for conversation in parsed.conversations])
    found = evaluate_retrieval(model, images, captions, batch_size=batch_size)
    return RetrievalEvaluation(len(images), found)

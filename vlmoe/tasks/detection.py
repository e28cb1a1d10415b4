# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Measure detection: answers that hold boxes as text (`boxes.py`) against those of the data.

An answer's text has no scores. The score of an object is the geometric mean of the probabilities
of its tokens: exp of the mean log-probability over all tokens that hold a part of its text, from
the brace that opens it to the one that closes it.

AP is COCO's, by pycocotools. It depends on the order of the scores. Precision and recall at an IoU
of 0.5 do not: boxes are matched one to one, those that overlap most first.

Boxes are compared in relative coordinates: scaling an axis leaves the IoU as it is. So the
references are rounded as the answers are, to a thousandth of the side.
"""

import contextlib
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, TypedDict

import torch
from transformers import PreTrainedTokenizerBase

from .boxes import Corners, LabeledBox, ParsedBoxes, parse_boxes, pixel_corners
from .task import CertainMetric

if TYPE_CHECKING:
    from pycocotools.coco import COCO

MATCHING_IOU = 0.5
MOST_BOXES = 100
"""COCO counts so many boxes of a picture, those with the highest scores."""


class Detections(TypedDict):
    """The objects of one picture, as transformers' `post_process_object_detection` gives them.

    Attributes:
        scores: (objects,), in 0..1.
        labels: (objects,), the number of each label, -1 for one that has none.
        boxes: (objects, 4), left, top, right and bottom in pixels.
        text_labels: the labels themselves.
    """

    scores: torch.Tensor
    labels: torch.Tensor
    boxes: torch.Tensor
    text_labels: list[str]


@dataclass(frozen=True)
class DetectionScores:
    """How well the boxes of answers fit those of the data; shares in 0..1.

    Attributes:
        ap: COCO's average precision, the mean over IoUs from 0.5 to 0.95 and over the classes of
            the references. A label is of a class if case and surrounding blanks aside it is equal.
        ap50: the same at an IoU of 0.5.
        precision50: share of the answers' boxes that overlap a box of their class by an IoU of 0.5.
        recall50: share of the references' boxes that are overlapped so.
        precision50_any_class, recall50_any_class: the same without regard to the labels.
        unparsable: share of answers that are not a list of boxes to their end. Objects that they
            do hold count as all others do.
    """

    ap: float
    ap50: float
    precision50: float
    recall50: float
    precision50_any_class: float
    recall50_any_class: float
    unparsable: float

    def as_dict(self) -> dict[str, float]:
        """Return the figures by name."""
        return asdict(self)


def detections(
    answer: str,
    size: tuple[int, int],
    scores: Sequence[float] | None = None,
    label2id: dict[str, int] | None = None,
) -> Detections:
    """Read the objects of an answer as detection models of transformers give them.

    Args:
        answer: text of a model.
        size: width and height of the picture, in pixels.
        scores: of the objects, as `object_scores` gives them; by default 1 each.
        label2id: numbers of the labels, as in a model's config; by default by their first place
            in the answer.

    Raises:
        ValueError: the scores are not as many as the objects.
    """
    objects = parse_boxes(answer).objects
    names = [each.label for each in objects]
    numbers = label2id or {name: at for at, name in enumerate(dict.fromkeys(names))}
    return {
        "scores": torch.tensor(_scores(objects, scores)),
        "labels": torch.tensor([numbers.get(name, -1) for name in names], dtype=torch.long),
        "boxes": torch.tensor([pixel_corners(each.corners, size) for each in objects]).view(-1, 4),
        "text_labels": names,
    }


def object_scores(
    tokens: Sequence[int],
    log_probabilities: Sequence[float],
    tokenizer: PreTrainedTokenizerBase,
) -> list[float]:
    """Return the score of each object of an answer, in the order of `parse_boxes`.

    Args:
        tokens: the answer, with or without tokens that end or pad it.
        log_probabilities: of each token, given those before it.
        tokenizer: of the model.
    """
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    objects = parse_boxes(text).objects
    if not objects:
        return []
    ends = _ends(tokens, tokenizer)
    places = list(zip([0, *ends], ends, log_probabilities, strict=False))
    found = []
    for each in objects:
        start, end = each.span
        inside = [value for first, last, value in places if first < end and last > start]
        found.append(float(torch.tensor(inside).mean().exp()))
    return found


def detection_scores(
    answers: Sequence[str],
    references: Sequence[str],
    scores: Sequence[Sequence[float]] | None = None,
) -> DetectionScores:
    """Compare the boxes of answers with those of their references, one picture each.

    Args:
        answers: texts of a model.
        references: the right texts.
        scores: of each answer's objects, see `object_scores`; by default 1 each, and AP then
            depends on the order of the objects alone.

    Raises:
        ValueError: there is no answer, or no box in the references, a reference is no list of
            boxes, or the lists differ in length.
        ImportError: the package of the extra `metrics` is missing.
    """
    given = [parse_boxes(each) for each in answers]
    right = [_reference(each, number) for number, each in enumerate(references)]
    if not any(each.objects for each in right):
        raise ValueError("The references hold no box, so that AP is not defined.")
    pairs = list(zip(given, right, strict=True))
    by_object = [None] * len(given) if scores is None else scores
    ap, ap50 = _average_precision(right, [(*each.objects,) for each in given], [*by_object])
    with_class, any_class = (_precision_recall(pairs, same) for same in (True, False))
    unparsable = sum(not each.is_whole for each in given) / len(given)
    return DetectionScores(ap, ap50, *with_class, *any_class, unparsable)


def _box_figures(
    answers: Sequence[str],
    references: Sequence[Sequence[str]],
    scores: Sequence[Sequence[float]],
) -> dict[str, float]:
    """Return the figures of `detection_scores`; raise as it does, and for several references."""
    if any(len(several) != 1 for several in references):
        raise ValueError("a picture has several lists of boxes; give each row one.")
    return detection_scores(answers, [each for (each,) in references], scores).as_dict()


def _require_pycocotools() -> None:
    try:
        import pycocotools  # noqa: F401
    except ImportError as error:
        raise ImportError('AP needs pycocotools: pip install "vlmoe[metrics]".') from error


BOX_METRIC = CertainMetric(object_scores, _box_figures, _require_pycocotools)


def _average_precision(
    right: Sequence[ParsedBoxes],
    found: Sequence[Sequence[LabeledBox]],
    scores: Sequence[Sequence[float] | None],
) -> tuple[float, float]:
    """Return COCO's AP over all IoUs, and at 0.5."""
    _require_pycocotools()
    from pycocotools.cocoeval import COCOeval

    names = sorted({_class(each) for picture in right for each in picture.objects})
    numbers = {name: number for number, name in enumerate(names, 1)}
    truth = [
        _annotation(picture, numbers[_class(each)], each.corners, 1.0)
        for picture, parsed in enumerate(right)
        for each in parsed.objects
    ]
    guesses = [
        _annotation(picture, numbers[_class(each)], each.corners, score)
        for picture, objects in enumerate(found)
        for each, score in zip(objects, _scores(objects, scores[picture]), strict=True)
        if _class(each) in numbers
    ]
    if not guesses:
        return 0.0, 0.0
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints as it works
        sets = [_dataset(each, len(right), len(names)) for each in (truth, guesses)]
        evaluation = COCOeval(*sets, iouType="bbox")
        evaluation.params.maxDets = [1, 10, MOST_BOXES]
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return float(evaluation.stats[0]), float(evaluation.stats[1])


def _dataset(boxes: list[dict], pictures: int, classes: int) -> "COCO":
    """Return boxes as pycocotools wants them."""
    from pycocotools.coco import COCO

    coco = COCO()
    coco.dataset = {
        "images": [{"id": number} for number in range(pictures)],
        "categories": [{"id": number} for number in range(1, classes + 1)],
        "annotations": [{**each, "id": number} for number, each in enumerate(boxes, 1)],
    }
    coco.createIndex()
    return coco


def _annotation(picture: int, category: int, corners: Corners, score: float) -> dict:
    left, top, right, bottom = corners
    width, height = right - left, bottom - top
    return {
        "image_id": picture,
        "category_id": category,
        "bbox": [left, top, width, height],
        "area": width * height,
        "iscrowd": 0,
        "score": score,
    }


def _precision_recall(
    pairs: Sequence[tuple[ParsedBoxes, ParsedBoxes]], same_class: bool
) -> tuple[float, float]:
    """Return the shares of answered and of right boxes that are matched; 0 where there is none."""
    matched = sum(_matches(given.objects, right.objects, same_class) for given, right in pairs)
    answered = sum(len(given.objects) for given, _ in pairs)
    wanted = sum(len(right.objects) for _, right in pairs)
    return matched / max(answered, 1), matched / max(wanted, 1)


def _matches(given: Sequence[LabeledBox], right: Sequence[LabeledBox], same_class: bool) -> int:
    """Count the pairs of boxes with enough overlap, each box in one pair, best pairs first."""
    overlaps = sorted(
        (
            (iou(one.corners, other.corners), first, second)
            for first, one in enumerate(given)
            for second, other in enumerate(right)
            if not same_class or _class(one) == _class(other)
        ),
        key=lambda each: (-each[0], each[1:]),
    )
    taken: dict[int, int] = {}
    for overlap, first, second in overlaps:
        if overlap >= MATCHING_IOU and first not in taken and second not in taken.values():
            taken[first] = second
    return len(taken)


def iou(one: Corners, other: Corners) -> float:
    """Return the area that two boxes share over the area that they cover, in 0..1."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    shared = max(width, 0.0) * max(height, 0.0)
    covered = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)) - shared
    return shared / covered if covered else 0.0


def _ends(tokens: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return where the text of each token ends in the decoded text, in characters."""
    return [
        len(tokenizer.decode(tokens[: count + 1], skip_special_tokens=True))
        for count in range(len(tokens))
    ]


def _scores(objects: Sequence[LabeledBox], scores: Sequence[float] | None) -> list[float]:
    """Return one score an object."""
    given = [1.0] * len(objects) if scores is None else [float(each) for each in scores]
    if len(given) != len(objects):
        raise ValueError(f"an answer has {len(objects)} boxes, but {len(given)} scores.")
    return given


def _reference(text: str, number: int) -> ParsedBoxes:
    parsed = parse_boxes(text)
    if not parsed.is_whole:
        raise ValueError(
            f"reference {number} is no list of boxes: {text!r:.80}. Needed is JSON such as "
            '[{"bbox_2d": [x1, y1, x2, y2], "label": "cat"}], relative to the picture, 0 to 1000.'
        )
    return parsed


def _class(each: LabeledBox) -> str:
    return each.label.strip().casefold()

# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Classification by likelihood: how probable each label is as the answer to a row's question.

A label is scored as the whole answer: its tokens and the end of the turn. The labels may be any
texts, also such that the model was never trained on (zero-shot).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypedDict, cast

import torch
from torch.nn.functional import cross_entropy
from transformers.utils import logging

from ..data.answers import evaluation_mode
from ..data.collator import IGNORE_INDEX, VLMoECollator
from ..data.conversations import Turn, parse_row
from ..data.long_rows import length_limit
from ..data.native_collator import NativeCollator
from ..data.row_fields import AnyRow, Rows
from ..data.rows import ConversationRows
from ..hub.finite_outputs import require_finite_logits
from ..hub.saved_model import Processor, is_own_processor
from ..modeling_vlmoe.model_outputs import VLMoEImageFeatures
from ..processing.image_sources import DEFAULT_LIMITS, ImageLimits
from ..tasks.table import get_task, task_reader
from ..tasks.task import Task

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedModel

PIXELS = ("pixel_values", "pixel_attention_mask", "image_index")


class ImageOptions(TypedDict):
    """The options of `score_labels` and `evaluate` for the images of rows; see there."""

    image_limits: ImageLimits
    allow_image_urls: bool


@dataclass(frozen=True)
class LabelScores:
    """How likely each label is for each row.

    Attributes:
        labels: the texts that were scored.
        log_probabilities: (rows, labels), natural logarithm of the probability that the model
            answers with the label and ends there: the sum over its tokens.
        tokens: (rows, labels), how many tokens that are, the end of the turn included.
    """

    labels: list[str]
    log_probabilities: torch.Tensor
    tokens: torch.Tensor

    @property
    def per_token(self) -> torch.Tensor:
        """Return (rows, labels), the mean log-probability of a label's tokens.

        A sum falls with every token, so that short labels would win over long ones.
        """
        return self.log_probabilities / self.tokens

    def best(self, *, per_token: bool = True) -> list[str]:
        """Return the most likely label of each row, by the mean over tokens or by the sum."""
        scores = self.per_token if per_token else self.log_probabilities
        return [self.labels[i] for i in scores.argmax(1).tolist()]


def score_labels(
    model: "PreTrainedModel",
    processor: Processor,
    rows: "Rows | datasets.Dataset",
    labels: Sequence[str],
    *,
    task: str | Task | None = None,
    prompt: str | None = None,
    batch_size: int = 64,
    max_length: int | None = None,
    image_limits: ImageLimits = DEFAULT_LIMITS,
    allow_image_urls: bool = False,
    progress: bool = False,
) -> LabelScores:
    """Score every label as the answer to every conversation of the rows.

    A VLMoE encodes the images of a row once, a model of transformers once for each label.

    Args:
        model: a generating model, on any device; it keeps its mode.
        processor: the model's; of a language model its tokenizer.
        rows: as for `evaluate`. The last turn, if it is the assistant's, does not matter, and rows
            of a task need no answer: `{"image": ...}` will do for a classification.
        labels: the answers to compare.
        task: whose columns the rows have; see `load_rows`.
        prompt: the task's instruction, by default its own.
        batch_size: labels scored at the same time, of one row or of several.
        max_length: the longest conversation, in tokens; by default the model's positions.
        image_limits: as for `evaluate`.
        allow_image_urls: download images that rows name by http(s) URL.
        progress: show a progress bar.

    Raises:
        ValueError: `batch_size` is below 1, there are no rows, fewer than two labels, one twice or
            an empty one, a row is malformed or too long, or the logits are NaN or infinite.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    labels = require_labels(labels)
    if task is not None:
        rows = _with_answers(rows, get_task(task), labels[0])
    questions = ConversationRows(rows, reader=task_reader(task, prompt))
    if len(questions) == 0:
        raise ValueError("empty dataset: there are no rows to score.")
    limit = length_limit(model.config, max_length)
    collator: VLMoECollator | NativeCollator = (
        VLMoECollator(processor, limit, allow_image_urls=allow_image_urls)
        if is_own_processor(processor)
        else NativeCollator(
            processor, limit, limits=image_limits, allow_image_urls=allow_image_urls
        )
    )
    scorer = _Scorer(model, collator, labels, batch_size)
    at_once = max(1, batch_size // len(labels))
    bar = logging.tqdm(total=len(questions), desc="scoring", unit="row", disable=not progress)
    scores, tokens = [], []
    with evaluation_mode(model), torch.inference_mode(), bar:
        for start in range(0, len(questions), at_once):
            stop = min(start + at_once, len(questions))
            for score, count in scorer([questions[i] for i in range(start, stop)]):
                scores.append(score)
                tokens.append(count)
            bar.update(stop - start)
    shape = (len(questions), len(labels))
    return LabelScores(labels, torch.cat(scores).view(shape), torch.cat(tokens).view(shape))


def _with_answers(
    rows: "Rows | datasets.Dataset", task: Task, label: str
) -> "Rows | datasets.Dataset":
    """Give rows of a task without the column of their answer one, which is then replaced."""
    names = {"messages", *task.columns[-1]}
    columns = getattr(rows, "column_names", None)
    if columns:
        given = cast("datasets.Dataset", rows)
        missing = names.isdisjoint(columns)
        return given.add_column(task.columns[-1][0], [label] * len(given)) if missing else given
    if not isinstance(rows, list | tuple):
        return rows
    return [
        {**row, task.columns[-1][0]: label}
        if isinstance(row, Mapping) and names.isdisjoint(row)
        else row
        for row in rows
    ]


def require_labels(labels: Sequence[str]) -> list[str]:
    """Return labels as a list.

    Raises:
        ValueError: there are fewer than two, one is empty, or one stands there twice.
    """
    if isinstance(labels, str) or not all(isinstance(label, str) for label in labels):
        raise ValueError(f"labels must be a list of texts, got {labels!r:.80}.")
    if len(labels) < 2 or not all(label.strip() for label in labels):
        raise ValueError(
            f"labels must be two texts or more, none of them empty; got {labels!r:.80}."
        )
    twice = [label for i, label in enumerate(labels) if label in labels[:i]]
    if twice:
        raise ValueError(f"the label {twice[0]!r} stands twice among the labels.")
    return list(labels)


class _Scorer:
    """Scores all labels for a few rows, of one conversation each, at a time."""

    def __init__(
        self,
        model: "PreTrainedModel",
        collator: VLMoECollator | NativeCollator,
        labels: list[str],
        batch_size: int,
    ) -> None:
        self.model, self.collator = model, collator
        self.labels, self.batch_size = labels, batch_size

    def __call__(self, rows: list[AnyRow]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield log-probabilities and token counts, (conversations,), by row and then by label."""
        features = self._features(rows) if isinstance(self.collator, VLMoECollator) else None
        pairs = [(row, label) for row in range(len(rows)) for label in self.labels]
        for start in range(0, len(pairs), self.batch_size):
            chunk = pairs[start : start + self.batch_size]
            batch = self.collator([_answered(rows[row], label) for row, label in chunk])
            inputs: dict[str, Any] = {
                name: tensor.to(self.model.device) for name, tensor in batch.items()
            }
            if features is not None:
                inputs = {name: inputs[name] for name in inputs if name not in PIXELS}
                shown = torch.cat([features[row] for row, _ in chunk])
                inputs["mm_encoder_outputs"] = {"image": VLMoEImageFeatures(pooler_output=shown)}
            yield self._scores(inputs)

    def _features(self, rows: list[AnyRow]) -> list[torch.Tensor] | None:
        """Encode the images of the rows; give (tiles, image tokens, hidden) of each row."""
        batch = self.collator([_answered(row, self.labels[0]) for row in rows])
        pixels = {name: batch[name].to(self.model.device) for name in PIXELS if name in batch}
        if not pixels:
            return None
        tiles = self.model.get_image_features(**pixels, return_dict=True).pooler_output
        counts = batch["mm_token_type_ids"].sum(1) // tiles.shape[1]
        return list(tiles.split(counts.tolist()))

    def _scores(self, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum the log-probabilities of the last answer of each conversation, and count tokens."""
        labels = inputs.pop("labels")
        is_scored = _last_run(labels != IGNORE_INDEX)[:, 1:]
        kept = is_scored.any(0).nonzero().squeeze(1)  # the positions whose logits are needed
        logits = self.model(**inputs, logits_to_keep=kept, use_cache=False).logits
        require_finite_logits(logits, self.model, inputs)
        # (conversations, kept)
        losses = cross_entropy(
            logits.float().transpose(1, 2), labels[:, 1:][:, kept], reduction="none"
        )
        return -(losses * is_scored[:, kept]).sum(1).cpu(), is_scored.sum(1).cpu()


def _answered(row: AnyRow, label: str) -> AnyRow:
    """Put a label in the place of the last turn if it is the assistant's, else after it."""
    parsed = parse_row(row, 0)
    [conversation] = parsed.conversations
    asked = conversation[:-1] if conversation[-1].role == "assistant" else conversation
    messages = [turn.as_message() for turn in (*asked, Turn("assistant", (label,)))]
    return {"id": row.get("id"), "images": parsed.images, "messages": messages}


def _last_run(mask: torch.Tensor) -> torch.Tensor:
    """Keep the last unbroken run of True of each row of (rows, length)."""
    length = mask.shape[1]
    places = torch.arange(length, device=mask.device)
    last = torch.where(mask, places, -1).amax(1, keepdim=True)
    before = torch.where(~mask & (places < last), places, -1).amax(1, keepdim=True)
    return mask & (places > before) & (places <= last)

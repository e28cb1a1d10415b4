# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Measure a router on a dataset: load, specialization by question type, changes by training.

Every conversation runs through the model once, its reference answer included: nothing is generated,
so that two models see the same tokens.

Shapes: C conversations, N tokens without padding, L sparse layers, E experts, k experts per token,
Q question types.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from ...configuration.configuration_vlmoe_text import MODALITIES, Modality
from ...data.collator import VLMoECollator
from ...data.conversations import parse_row
from ...data.long_rows import length_limit
from ...data.native_collator import NativeCollator
from ...data.rows import ConversationRows, Rows
from ...hub.finite_outputs import require_finite_logits
from ...hub.json_files import JsonObject
from ...hub.saved_model import Processor, is_own_processor
from ...processing.image_sources import DEFAULT_LIMITS, ImageLimits
from ..kinds import KINDS, PADDING, has_video
from ..trace import ForwardRouting, record_routing

SHUFFLES = 200


@dataclass
class DatasetRouting:
    """The routing of a dataset's conversations.

    Attributes:
        layers: the decoder's index of each sparse layer.
        load: `ExpertLoad.as_dict`.
        question_types: of each conversation, "" for none.
        counts: (C, L, M, E) int32: how often tokens of each kind were sent to each expert; kinds
            are those of `KINDS` that the model takes.
        first_choices: (L, N) int16: each token's expert with the largest weight.
        token_ids, kinds: (N,); kinds are numbers of `KINDS`.
    """

    layers: tuple[int, ...]
    load: JsonObject
    question_types: list[str]
    counts: np.ndarray
    first_choices: np.ndarray
    token_ids: np.ndarray
    kinds: np.ndarray


def dataset_routing(
    model: PreTrainedModel,
    processor: Processor,
    rows: Rows,
    batch_size: int = 32,
    *,
    image_limits: ImageLimits = DEFAULT_LIMITS,
    allow_image_urls: bool = False,
    progress: bool = True,
) -> DatasetRouting:
    """Run every conversation of `rows` through the model and keep the routing of its tokens.

    Args:
        model: in eval mode, on any device.
        processor: its processor; of a language model its tokenizer.
        rows: as `load_rows` gives them.
        batch_size: conversations at a time; images they share are encoded once.
        image_limits: on the size of images; a `VLMoEProcessor` has its own.
        allow_image_urls: download images that rows name by http(s) URL.
        progress: show a progress bar.

    Raises:
        ValueError: `batch_size` is below 1, there are no rows, a row is malformed, or the model has
            no experts, or gives NaN or infinite numbers.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    questions = ConversationRows(rows)
    if len(questions) == 0:
        raise ValueError("empty dataset: there are no rows to inspect.")
    collator = _collator(processor, length_limit(model.config), image_limits, allow_image_urls)
    kinds = len(KINDS) if has_video(model.config) else len(Modality)
    types, counts, parts = [], [], []
    bar = logging.tqdm(total=len(questions), desc="routing", unit="question", disable=not progress)
    with bar, record_routing(model) as trace:
        for start in range(0, len(questions), batch_size):
            batch = [questions[i] for i in range(start, min(start + batch_size, len(questions)))]
            inputs = collator(batch)
            del inputs["labels"]
            with torch.inference_mode():
                on_device = {name: tensor.to(model.device) for name, tensor in inputs.items()}
                logits = model(**on_device, logits_to_keep=1).logits
            require_finite_logits(logits, model, on_device)
            [forward] = trace.forwards
            trace.forwards.clear()
            types += [kind for row in batch for kind in parse_row(row, 0).question_types]
            counts.append(_counts_by_row(forward, trace.num_experts, kinds))
            parts.append(_real_tokens(forward))
            bar.update(len(batch))
    first_choices, token_ids, kinds_of_tokens = zip(*parts, strict=True)
    return DatasetRouting(
        trace.layers,
        trace.load.as_dict(),
        types,
        np.concatenate(counts),
        np.concatenate(first_choices, 1),
        np.concatenate(token_ids),
        np.concatenate(kinds_of_tokens),
    )


def specialization(
    counts: np.ndarray, question_types: Sequence[str], seed: int = 0
) -> JsonObject | None:
    """Measure how far each type of question has experts of its own.

    The measure is the mutual information, in bits, of a token's expert and the type of its
    question: 0 if all types use the experts alike, at most the entropy of the types. A few
    questions give a little of it by chance. Beside it is the same measure with the
    types dealt out to the questions at random (`SHUFFLES` times): its mean, and the value that one
    shuffle in twenty exceeds. Whole questions are shuffled, since the tokens of one are alike.

    Args:
        counts: (C, L, M, E), see `DatasetRouting`.
        question_types: of each conversation; those with "" are left out.
        seed: of the shuffles.

    Returns:
        None if there are fewer than two types, else `types`, `questions` (of each type),
        `type_entropy_bits`, and under each kind of token: `shares` (L, Q, E), of the assignments of
        a type's tokens; `information_bits`, `shuffled_mean_bits`, `shuffled_95_bits` and, from
        these, `is_above_chance` (L,); and `strongest`, for each layer the `type` and `expert` whose
        share differs most from the expert's share of all types' tokens, with both (`share`,
        `average`), None without tokens.
    """
    types = sorted({kind for kind in question_types if kind})
    if len(types) < 2:
        return None
    known = np.array([bool(kind) for kind in question_types])
    labels = np.array([types.index(kind) for kind in question_types if kind])
    one_hot = np.eye(len(types))[labels]  # (C, Q)
    generator = np.random.default_rng(seed)
    shuffled = np.stack([generator.permutation(one_hot) for _ in range(SHUFFLES)])  # (S, C, Q)
    portions = one_hot.mean(0)
    result: JsonObject = {
        "types": types,
        "questions": one_hot.sum(0).astype(int).tolist(),
        "type_entropy_bits": float(-(portions * np.log2(portions)).sum()),
    }
    for position, modality in enumerate(KINDS[: counts.shape[2]]):
        of_questions = counts[known, :, position].astype(np.float64)  # (C, L, E)
        by_type = np.einsum("cq,cle->lqe", one_hot, of_questions)
        bits = mutual_information(by_type)  # (L,)
        by_chance = np.stack(
            [
                mutual_information(np.einsum("cq,cle->lqe", one, of_questions, optimize=True))
                for one in shuffled
            ]
        )  # (S, L)
        result[modality] = {
            "shares": _shares(by_type).tolist(),
            "information_bits": bits.tolist(),
            "shuffled_mean_bits": by_chance.mean(0).tolist(),
            "shuffled_95_bits": np.quantile(by_chance, 0.95, axis=0).tolist(),
            "is_above_chance": (bits > np.quantile(by_chance, 0.95, axis=0)).tolist(),
            "strongest": [_strongest(of_layer, types) for of_layer in by_type],
        }
    return result


def mutual_information(counts: np.ndarray) -> np.ndarray:
    """Return the mutual information of row and column of counts (..., Q, E), in bits, (...).

    It is 0 without counts.
    """
    joint = counts / np.maximum(counts.sum((-2, -1), keepdims=True), 1)
    independent = joint.sum(-1, keepdims=True) * joint.sum(-2, keepdims=True)
    ratio = np.divide(joint, independent, out=np.ones_like(joint), where=joint > 0)
    return np.maximum((joint * np.log2(ratio)).sum((-2, -1)), 0)


def change(before: DatasetRouting, after: DatasetRouting) -> JsonObject | None:
    """Return the share of tokens whose first expert another model chooses otherwise, by modality.

    None if the two models do not see the same tokens. Under each kind of token and `all`: `changed`
    (L,), and `by_chance` (L,), the share that would change if the two choices had nothing to do
    with each other and each expert kept its load; None for a kind without tokens.

    Raises:
        ValueError: the models have not the same sparse layers and number of experts.
    """
    experts = after.counts.shape[-1]
    if before.layers != after.layers or before.counts.shape[-1] != experts:
        first, second = (
            f"layers {list(routing.layers)} with {routing.counts.shape[-1]} experts"
            for routing in (before, after)
        )
        raise ValueError(f"Models cannot be compared whose experts differ: {first} and {second}.")
    if not np.array_equal(before.token_ids, after.token_ids):
        return None
    kinds = KINDS[: after.counts.shape[2]]
    masks = {kind: after.kinds == number for number, kind in enumerate(kinds)}
    masks["all"] = np.ones_like(after.kinds, dtype=bool)
    return {
        kind: _change(before.first_choices[:, mask], after.first_choices[:, mask], experts)
        if mask.any()
        else None
        for kind, mask in masks.items()
    }


def inspection_table(routing: DatasetRouting, types: JsonObject | None) -> str:
    """Return the load by layer as text.

    The columns are busiest over mean, dead experts, overlap, and the bits that an expert tells of
    the question's type, beside those of shuffled types.
    """
    head = ["layer", *(f"{kind} max/mean" for kind in MODALITIES), "dead", "overlap"]
    head += ["type bits", "shuffled"] if types else []
    lines = [head]
    for number, layer in enumerate(routing.layers):
        load = routing.load
        busiest = [load["max_violation"][kind][number] for kind in MODALITIES]
        overlap = load["overlap"][number]
        line = [str(layer), *("-" if value is None else f"{value + 1:.2f}" for value in busiest)]
        line += [str(load["dead_experts"]["all"][number])]
        line += ["-" if overlap is None else f"{overlap:.1%}"]
        if types:
            keys = ("information_bits", "shuffled_mean_bits")
            line += [f"{types['text'][key][number]:.4f}" for key in keys]
        lines.append(line)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    )


def _change(before: np.ndarray, after: np.ndarray, experts: int) -> dict[str, list[float]]:
    """See `change`; (L, N) each."""
    shares = [
        np.stack([np.bincount(layer, minlength=experts) for layer in choices]) / choices.shape[1]
        for choices in (before, after)
    ]
    return {
        "changed": (before != after).mean(1).tolist(),
        "by_chance": (1 - (shares[0] * shares[1]).sum(1)).tolist(),
    }


def _collator(
    processor: Processor, max_length: int | None, limits: ImageLimits, allow_urls: bool
) -> VLMoECollator | NativeCollator:
    if is_own_processor(processor):
        return VLMoECollator(processor, max_length, allow_image_urls=allow_urls)
    return NativeCollator(processor, max_length, limits=limits, allow_image_urls=allow_urls)


def _counts_by_row(forward: ForwardRouting, experts: int, kinds_shown: int) -> np.ndarray:
    """(B, L, M, E): assignments of the tokens of each kind in each row, padding left out."""
    layers, rows, tokens, k = forward.experts.shape
    counts = torch.zeros(layers, rows, PADDING + 1, experts, dtype=torch.int32)
    kinds = forward.kinds[None, ..., None].expand(layers, rows, tokens, k)
    row = torch.arange(rows)[None, :, None, None].expand_as(kinds)
    layer = torch.arange(layers)[:, None, None, None].expand_as(kinds)
    one = torch.ones((), dtype=torch.int32)
    counts.index_put_((layer, row, kinds, forward.experts), one, accumulate=True)
    return counts[:, :, :kinds_shown].transpose(0, 1).numpy()


def _real_tokens(forward: ForwardRouting) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """First choices (L, N), token ids and kinds (N,) of a forward pass, padding left out."""
    real = forward.kinds != PADDING
    first = forward.experts[..., 0][:, real].to(torch.int16)
    return first.numpy(), forward.token_ids[real].numpy(), forward.kinds[real].numpy()


def _shares(counts: np.ndarray) -> np.ndarray:
    return counts / np.maximum(counts.sum(-1, keepdims=True), 1)


def _strongest(counts: np.ndarray, types: Sequence[str]) -> JsonObject | None:
    """Of a layer's counts (Q, E) the type and expert that stand out most."""
    if counts.sum() == 0:
        return None
    shares, average = _shares(counts), _shares(counts.sum(0))
    row, expert = np.unravel_index(np.abs(shares - average).argmax(), shares.shape)
    return {
        "type": types[row],
        "expert": int(expert),
        "share": float(shares[row, expert]),
        "average": float(average[expert]),
    }

# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""The share of right answers during training, without generating.

A greedy decoder gives the reference answer exactly if every reference token is the most likely
one after those before it. One forward with labels, which `Trainer` runs for the loss anyhow,
therefore tells whether `generate` would be right, token for token:

    Trainer(..., compute_metrics=answer_accuracy, preprocess_logits_for_metrics=most_likely_tokens)

`vlmoe evaluate` compares strings instead, up to case and blanks, and may count a little more.
"""

import numpy as np
import torch
from transformers import EvalPrediction


def most_likely_tokens(
    logits: torch.Tensor | tuple[torch.Tensor, ...], labels: torch.Tensor
) -> torch.Tensor:
    """Logits (rows, length, vocab) -> token ids (rows, length).

    A model of transformers may have further outputs, after the logits.
    """
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(-1)


def answer_accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """`{"exact_match": share of rows whose label tokens are all predicted}`, in 0..1.

    Args:
        prediction: its `predictions` (rows, length), the most
            likely next token at each position, and `label_ids` (rows, length), -100 for no label.
            Rows without labels do not count.
    """
    predicted, labels = prediction.predictions[:, :-1], prediction.label_ids[:, 1:]
    has_label = labels != -100
    right = ((predicted == labels) | ~has_label).all(axis=1)
    counted = has_label.any(axis=1)
    return {"exact_match": float(np.mean(right[counted])) if counted.any() else 0.0}

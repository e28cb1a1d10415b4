# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Greedy answers to prompts."""

from typing import Any

import torch

from ..hub.finite_outputs import finite_logits


def greedy_answers(
    model: Any, tokenizer: Any, inputs: dict[str, torch.Tensor], max_new_tokens: int
) -> torch.Tensor:
    """(batch, new tokens): what the model says next, with end and padding tokens.

    Raises:
        ValueError: the logits are NaN or infinite; the message names the layer.
    """
    sequences = model.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        logits_processor=finite_logits(model, inputs),
    )
    return sequences[:, inputs["input_ids"].shape[1] :]

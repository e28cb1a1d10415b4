# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Images and texts on which a dense model and its native sparse version are compared."""

import copy

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from .sample import TEXTS
from .target import Processor, Sample

Tensor = torch.Tensor


def processed_inputs(processor: Processor, config: PreTrainedConfig) -> Sample:
    """Encode three rows, padded on the left: with two images, with one, and with text alone.

    Args:
        processor: of the dense model; a tokenizer for a language model.
        config: of the dense model.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    options = {"padding": True, "padding_side": "left", "return_tensors": "pt"}
    if isinstance(processor, PreTrainedTokenizerBase):
        tokenizer = copy.deepcopy(tokenizer)
        if tokenizer.pad_token is None:  # masked anyway
            tokenizer.pad_token = tokenizer.eos_token
        return dict(tokenizer(list(TEXTS), **options))
    raise NotImplementedError


@torch.no_grad()
def drawn_inputs(model: PreTrainedModel, length: int = 24) -> Sample:
    """Draw inputs for a model without its processor: three rows, padded on the left.

    Args:
        model: the dense model.
        length: tokens of text of the longest row.
    """
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (3, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, :5], mask[2, :9] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}

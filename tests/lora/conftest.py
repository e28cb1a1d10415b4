"""Fixtures of the tests of LoRA on experts."""

from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from vlmoe.lora import wrappers as expert_lora


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[type]:
    """One entry for each call of the routed path: the class of the bank."""
    calls: list[type] = []
    routed = expert_lora.routed_lora_forward

    def counted(experts: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(type(experts))
        return routed(experts, *args, **kwargs)

    monkeypatch.setattr(expert_lora, "routed_lora_forward", counted)
    return calls


@pytest.fixture
def sentences(tokenizer: PreTrainedTokenizerBase) -> Dataset:
    rows = [tokenizer(f"what color is it? blue {i}")["input_ids"][:12] for i in range(8)]
    return Dataset.from_list([{"input_ids": row, "labels": row} for row in rows])

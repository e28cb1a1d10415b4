"""Counted expert load against the router logits that the model returns."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from vlmoe import VLMoEForConditionalGeneration
from vlmoe.training.expert_load import load_shares, record_expert_load

IMAGE, K = 5, 2


def batch(rows: int = 3, length: int = 11, side: str = "left") -> dict[str, torch.Tensor]:
    """Rows with 4 image tokens each, and padding of 0, 2, 4, ... tokens."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(6, 90, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(rows):
        padding = slice(0, 2 * row) if side == "left" else slice(length - 2 * row, length)
        ids[row, padding], mask[row, padding] = 0, 0
        start = 2 * row if side == "left" else 0
        ids[row, start + 1 : start + 5] = IMAGE
    pixels = torch.randn(rows, 3, 16, 16, generator=generator)
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}


def expected(model: VLMoEForConditionalGeneration, inputs: dict[str, Any]) -> dict[str, list]:
    """Counts by a loop over layers and tokens."""
    with torch.no_grad():
        logits = model(**inputs, output_router_logits=True).router_logits
    counts = {kind: torch.zeros(len(logits), logits[0].shape[1]).tolist() for kind in ("i", "t")}
    ids, mask = inputs["input_ids"].flatten(), inputs["attention_mask"].flatten()
    for layer, of_layer in enumerate(logits):
        for token, of_token in enumerate(of_layer):
            for expert in of_token.topk(K).indices.tolist():
                kind = "i" if ids[token] == IMAGE else "t"
                counts[kind][layer][expert] += int(mask[token])
    return counts


@pytest.mark.parametrize("side", ["left", "right"])
def test_counts_equal_those_of_the_router_logits(
    tiny_model: Callable[..., VLMoEForConditionalGeneration], side: str
) -> None:
    model, inputs = tiny_model(), batch(side=side)
    right = expected(model, inputs)
    with record_expert_load(model) as load, torch.no_grad():
        model(**inputs)
        model(**inputs)
    assert load.image_counts.tolist() == [[2 * n for n in row] for row in right["i"]]
    assert load.text_counts.tolist() == [[2 * n for n in row] for row in right["t"]]
    assert load.counts.sum(1).tolist() == [2 * K * int(inputs["attention_mask"].sum())] * 3
    with torch.no_grad():
        model(**inputs)
    assert load.counts.sum() == 3 * 2 * K * inputs["attention_mask"].sum(), "hooks were left"


def test_each_decoded_token_counts_once_as_text(
    tiny_model: Callable[..., VLMoEForConditionalGeneration],
) -> None:
    model, inputs = tiny_model(), batch()
    with record_expert_load(model) as load:
        model.generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=None)
    prompt = int(inputs["attention_mask"].sum())
    image_tokens = int((inputs["input_ids"] == IMAGE).sum())
    decoded = 3 * 3  # the last new token is not fed back
    assert load.image_counts.sum(1).tolist() == [K * image_tokens] * 3
    assert load.text_counts.sum(1).tolist() == [K * (prompt - image_tokens + decoded)] * 3


def test_gradient_checkpointing_counts_no_token_twice(
    tiny_model: Callable[..., VLMoEForConditionalGeneration],
) -> None:
    model, inputs = tiny_model(), batch()
    model.train().activation_checkpointing_enable({"use_reentrant": False})
    with record_expert_load(model) as load:
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert load.counts.sum(1).tolist() == [K * int(inputs["attention_mask"].sum())] * 3


def test_embeddings_are_split_by_their_token_types(
    tiny_model: Callable[..., VLMoEForConditionalGeneration],
) -> None:
    model, inputs = tiny_model(), batch()
    types = (inputs["input_ids"] == IMAGE).long()
    embeddings = model.get_input_embeddings()(inputs["input_ids"])
    with record_expert_load(model) as load, torch.no_grad():
        model(inputs_embeds=embeddings, mm_token_type_ids=types)
        model(inputs_embeds=embeddings)
    assert load.image_counts.sum(1).tolist() == [K * int(types.sum())] * 3
    assert load.counts.sum(1).tolist() == [2 * K * types.numel()] * 3


def test_shares_are_of_a_layers_assignments(
    tiny_model: Callable[..., VLMoEForConditionalGeneration],
) -> None:
    assert load_shares(torch.tensor([[3, 1], [0, 0]])).tolist() == [[0.75, 0.25], [0.0, 0.0]]
    with record_expert_load(tiny_model()) as load:
        pass
    load.image_counts += torch.tensor([6, 0, 2, 0])
    load.text_counts += torch.tensor([0, 0, 4, 4])
    summary = load.as_dict()
    assert summary["fair_share"] == 0.25
    assert summary["image_share"][0] == [0.75, 0.0, 0.25, 0.0]
    assert summary["all_share"][2] == [0.375, 0.0, 0.375, 0.25]
    assert summary["max_over_mean"] == [1.5] * 3 and summary["unused_experts"] == [1] * 3


def test_a_model_without_experts_and_an_unknown_mask_are_refused(
    tiny_model: Callable[..., VLMoEForConditionalGeneration],
) -> None:
    with (
        pytest.raises(ValueError, match="no VLMoERouter"),
        record_expert_load(torch.nn.Linear(1, 1)),
    ):
        pass
    model, ids = tiny_model(), torch.full((1, 3), 9)
    with record_expert_load(model), pytest.raises(ValueError, match="attention mask"):
        model(input_ids=ids, attention_mask=torch.zeros(1, 1, 3, 3))

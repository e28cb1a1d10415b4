"""Recorded choices of each token against the router logits that the model returns."""

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vlmoe import VLMoEForConditionalGeneration
from vlmoe.routing.trace import TokenRouting, record_routing, trace_answers

IMAGE, K = 5, 2
Model = Callable[..., VLMoEForConditionalGeneration]


def batch(side: str = "left") -> dict[str, torch.Tensor]:
    """Three rows with 4 image tokens each, and padding of 0, 2 and 4 tokens."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(6, 90, (3, 11), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(3):
        padding = slice(0, 2 * row) if side == "left" else slice(11 - 2 * row, 11)
        ids[row, padding], mask[row, padding] = 0, 0
        start = 2 * row if side == "left" else 0
        ids[row, start + 1 : start + 5] = IMAGE
    pixels = torch.randn(3, 3, 16, 16, generator=generator)
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}


def processor(eos_token_id: int | None) -> Any:
    return SimpleNamespace(tokenizer=SimpleNamespace(pad_token_id=0, eos_token_id=eos_token_id))


def alone(model: VLMoEForConditionalGeneration, ids: list[int], pixels: Any) -> list[list[tuple]]:
    """For each layer and token the (expert, weight) pairs, by a loop over the router logits of the
    sequence alone."""
    inputs = {"input_ids": torch.tensor([ids]), "pixel_values": pixels[None]}
    with torch.no_grad():
        logits = model(**inputs, output_router_logits=True).router_logits
    layers = []
    for of_layer in logits:
        tokens = []
        for of_token in of_layer:
            probabilities = of_token.softmax(-1).tolist()
            order = sorted(range(len(probabilities)), key=lambda e: -probabilities[e])[:K]
            total = sum(probabilities[e] for e in order)
            tokens.append(tuple((e, probabilities[e] / total) for e in order))
        layers.append(tokens)
    return layers


def assert_same(routing: TokenRouting, expected: list[list[tuple]], tokens: int) -> None:
    assert routing.experts.shape == (3, tokens, K)
    for layer, of_layer in enumerate(expected):
        for token, pairs in enumerate(of_layer[:tokens]):
            experts, weights = zip(*pairs, strict=True)
            assert routing.experts[layer, token].tolist() == list(experts)
            assert routing.weights[layer, token].tolist() == pytest.approx(weights, abs=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_choices_are_those_of_the_router_logits_and_padding_is_left_out(
    tiny_model: Model, side: str
) -> None:
    model, inputs = tiny_model(), batch(side)
    with record_routing(model) as trace, torch.no_grad():
        model(**inputs)
    with torch.no_grad():
        model(**inputs)
    assert len(trace.forwards) == 1, "hooks were left"
    for row, routing in enumerate(trace.sequences()):
        ids = inputs["input_ids"][row][inputs["attention_mask"][row] == 1].tolist()
        assert routing.token_ids.tolist() == ids
        assert routing.is_image.tolist() == [token == IMAGE for token in ids]
        assert_same(routing, alone(model, ids, inputs["pixel_values"][row]), len(ids))


def test_generated_tokens_follow_the_prompt_up_to_the_end_token(tiny_model: Model) -> None:
    model, inputs = tiny_model(), batch()
    endless = [answer.tolist() for _, answer in trace_answers(model, processor(None), inputs, 5)]
    assert [len(answer) for answer in endless] == [5, 5, 5]
    end = endless[1][2]
    lengths = [answer.index(end) + 1 if end in answer else 5 for answer in endless]
    assert lengths[1] < max(lengths), "no row goes on after another's end"
    traced = trace_answers(model, processor(end), inputs, 5)
    for row, (routing, answer) in enumerate(traced):
        assert answer.tolist() == endless[row][: lengths[row]]
        prompt = inputs["input_ids"][row][inputs["attention_mask"][row] == 1].tolist()
        fed = prompt + answer.tolist()[:-1]  # the last one is not fed back
        assert routing.token_ids.tolist() == fed
        assert_same(routing, alone(model, fed, inputs["pixel_values"][row]), len(fed))


def test_the_first_expert_is_the_one_with_the_largest_weight_also_with_a_selection_bias(
    tiny_model: Model,
) -> None:
    model = tiny_model(text={"router_bias_update_rate": 0.1})
    for module in model.modules():
        if type(module).__name__ == "VLMoERouter":
            module.e_score_correction_bias.copy_(torch.tensor([0.0, 5.0, 0.0, 0.0]))
    with record_routing(model) as trace, torch.no_grad():
        model(**batch())
    [forward] = trace.forwards
    assert (forward.experts == 1).any(-1).all(), "the bias chooses expert 1 for all tokens"
    assert (forward.experts[..., 0] != 1).any(), "its weight is not always the largest"
    assert (forward.weights[..., 0] >= forward.weights[..., 1]).all()


def test_what_cannot_be_recorded_is_refused(tiny_model: Model) -> None:
    model, inputs = tiny_model(), batch()
    embeddings = model.get_input_embeddings()(inputs["input_ids"])
    with record_routing(model) as trace, torch.no_grad():
        with pytest.raises(ValueError, match="needs `input_ids`"):
            model(inputs_embeds=embeddings)
        model(input_ids=torch.tensor([[7, 8]]))
        model(input_ids=torch.tensor([[7, 8], [9, 6]]))
    with pytest.raises(ValueError, match=r"have \[1, 2\] rows"):
        trace.sequences()
    dense = tiny_model(text={"mlp_only_layers": [0, 1, 2]})
    with pytest.raises(ValueError, match="has no experts"), record_routing(dense):
        pass


@pytest.mark.parametrize("in_thread", [False, True])
def test_a_model_is_recorded_by_one_block_at_a_time(tiny_model: Model, in_thread: bool) -> None:
    model = tiny_model().eval()
    errors: list[BaseException] = []

    def record() -> None:
        try:
            with record_routing(model):
                pytest.fail("recorded twice")
        except RuntimeError as error:
            errors.append(error)

    with record_routing(model) as trace, torch.no_grad():
        if in_thread:
            thread = threading.Thread(target=record)
            thread.start()
            thread.join()
        else:
            record()
        model(**batch())
    assert "being recorded already" in str(errors[0])
    assert len(trace.forwards) == 1
    with record_routing(model) as again, torch.no_grad():
        model(**batch())
    assert len(trace.forwards) == len(again.forwards) == 1

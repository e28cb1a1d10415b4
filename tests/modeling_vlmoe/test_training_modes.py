"""Gradient checkpointing and bfloat16 change how the model computes, not what."""

from collections.abc import Callable

import pytest
import torch

from vlmoe import VLMoEForConditionalGeneration

Inputs = dict[str, torch.Tensor]
Batch = Callable[..., Inputs]
Model = Callable[..., VLMoEForConditionalGeneration]

ROWS = {"mixed": ["..ab...", ".c.", "....."], "text": ["....", "..."]}


def labelled(inputs: Inputs) -> Inputs:
    text = (inputs["attention_mask"] == 1) & (inputs["mm_token_type_ids"] == 0)
    return inputs | {"labels": inputs["input_ids"].masked_fill(~text, -100)}


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("text", [{}, {"num_shared_experts": 1, "mlp_only_layers": [1]}])
def test_checkpointing_gives_the_same_loss_and_gradients(
    tiny_model: Model, tiny_batch: Batch, text: dict[str, object], rows: str
) -> None:
    model = tiny_model(text={"router_aux_loss_coef": 0.5, "router_z_loss_coef": 0.5} | text).train()
    inputs = labelled(tiny_batch(model.config, ROWS[rows]))
    layer_calls: list[int] = []
    model.model.language_model.layers[0].self_attn.register_forward_hook(
        lambda *_: layer_calls.append(1)
    )
    results = []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable()
        layer_calls.clear()
        model.zero_grad()
        output = model(**inputs, output_router_logits=True)
        output.loss.backward()
        assert len(layer_calls) == 1 + checkpointing  # computed once more, in the backward pass
        assert len(output.router_logits) == sum(
            model.config.text_config.is_sparse_layer(i) for i in range(3)
        )
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
        results.append((output, gradients))
    (expected, expected_gradients), (output, gradients) = results
    for name in ("loss", "aux_loss", "z_loss", "logits"):
        assert torch.equal(output[name], expected[name]), name
    for name, gradient in gradients.items():
        assert torch.equal(gradient, expected_gradients[name]), name


@pytest.mark.parametrize("how", ["parameters", "autocast"])
def test_bfloat16_is_close_to_float32(tiny_model: Model, tiny_batch: Batch, how: str) -> None:
    """With every token through all experts, so that no rounding error sends one elsewhere."""
    fields = {"num_experts_per_tok": 4, "norm_topk_prob": False, "router_aux_loss_coef": 0.1}
    model = tiny_model(text=fields)
    inputs = labelled(tiny_batch(model.config, ROWS["mixed"]))
    expected = model(**inputs, output_router_logits=True)
    if how == "parameters":
        model = model.to(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=how == "autocast"):
        output = model(**inputs, output_router_logits=True)
    real = inputs["attention_mask"].bool()
    assert output.logits.dtype == torch.bfloat16
    assert {logits.dtype for logits in output.router_logits} == {torch.float32}
    difference = (output.logits.float() - expected.logits)[real].norm()
    assert difference < 0.03 * expected.logits[real].norm()
    assert output.loss.item() == pytest.approx(expected.loss.item(), rel=0.01)
    output.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)

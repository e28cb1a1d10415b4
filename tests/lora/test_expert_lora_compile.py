"""torch.compile(fullgraph=True) with routed LoRA, forward and backward, against eager."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lora_runs import MODELS, assert_close, lora, randomize, run
from peft import get_peft_model
from torch._dynamo.utils import counters
from transformers import PreTrainedModel

from vlmoe import enable_routed_lora
from vlmoe.lora import routed as routed_lora

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

Model = Callable[..., PreTrainedModel]


@pytest.mark.parametrize("kernel", [True, False], ids=["cpu kernel", "grouped"])
@pytest.mark.parametrize(
    "backend",
    ["eager", *(pytest.param(name, marks=pytest.mark.slow) for name in ("aot_eager", "inductor"))],
)
@pytest.mark.parametrize("name", [MODELS[0], "OlmoeForCausalLM"])
def test_two_lengths_take_at_most_one_recompilation(
    tiny_moe: Model,
    name: str,
    backend: str,
    kernel: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not kernel:
        monkeypatch.setattr(routed_lora, "_fits_cpu_kernel", lambda *_: False)
    model = get_peft_model(tiny_moe(name), lora())
    randomize(model)
    enable_routed_lora(model)
    graphs: list[int] = []
    for length in (7, 12, 9):
        ids = torch.arange(2 * length).view(2, length) + 6
        expected = run(model, ids)
        if length == 7:
            compiled = torch.compile(model, fullgraph=True, backend=backend)
        assert_close(run(model, ids, compiled), expected, 5e-5 if backend == "inductor" else 1e-5)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] >= 1 and graphs[-1] == graphs[1] <= graphs[0] + 1


@pytest.mark.parametrize("int8", [False, True])
def test_the_operators_of_the_kernel_are_well_formed(int8: bool) -> None:
    """Schema, fake tensors and autograd registration, as torch checks them."""
    torch.manual_seed(0)
    x = torch.randn(5, 6, requires_grad=True)
    weights = torch.rand(10, requires_grad=True)
    token, ends = torch.arange(5).repeat(2), torch.tensor([4, 4, 10], dtype=torch.int32)
    gate_up, down = torch.randn(3, 8, 6), torch.randn(3, 6, 4)
    a, b = torch.randn(3, 2, 6, requires_grad=True), torch.randn(3, 2, 8, requires_grad=True)
    banks: list[Any] = [gate_up, None, down, None]
    if int8:
        banks = [*quantized(gate_up), *quantized(down)]
        grouped = (torch.randn(10, 6), *banks[:2], ends, False)
        torch.library.opcheck(torch.ops.vlmoe.int8_grouped_linear.default, grouped)
    arguments = (x, weights, token, ends, *banks, a, b, None, None, True)
    torch.library.opcheck(torch.ops.vlmoe.routed_lora.default, arguments)


def quantized(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers and scales of rows."""
    scale = weight.abs().amax(-1, keepdim=True) / 127
    return (weight / scale).round().to(torch.int8), scale


def test_generation_by_the_routed_path_gives_the_tokens_of_pefts(tiny_moe: Model) -> None:
    model = get_peft_model(tiny_moe(MODELS[0]), lora())
    randomize(model)
    ids = torch.tensor([[7, 8, 9, 10]])
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    plain = model.base_model.model
    with model.disable_adapter():
        base = plain.generate(input_ids=ids, **options)
    expected = plain.generate(input_ids=ids, **options)
    assert not torch.equal(expected, base), "the adapter changes nothing"
    enable_routed_lora(model)
    assert torch.equal(plain.generate(input_ids=ids, **options), expected)

"""`experts_implementation="auto"` against a loop in float64, and which way it went.

Banks of all layouts that transformers' experts interface knows; hidden, inner, experts and tokens
all differ.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from expert_banks import EVEN, EXPERTS, HIDDEN, INNER, LAYOUTS, ODD, make_bank
from lora_runs import MODELS, lora, randomize
from peft import get_peft_model
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from vlmoe import enable_routed_lora
from vlmoe.modeling_vlmoe import experts_auto as experts_dispatch

Model = Callable[..., PreTrainedModel]


def make_inputs(bank: Any, tokens: int, k: int = 2) -> tuple[torch.Tensor, ...]:
    """Tokens, choice, routing weights. From two tokens on the first two choose alike."""
    torch.manual_seed(1)
    dtype = bank.down_proj.dtype
    hidden = bank.down_proj.shape[2 if bank.is_transposed else 1]
    choice = torch.rand(tokens, bank.num_experts).argsort(-1)[:, :k]
    choice[1:2] = choice[:1]
    return torch.randn(tokens, hidden).to(dtype), choice, torch.rand(tokens, k).to(dtype)


def loop(bank: Any, x: torch.Tensor, choice: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """One token and one expert after the other, in the dtype of `x`."""
    parameters = {name: p.to(x.dtype) for name, p in bank.named_parameters()}

    def linear(row: torch.Tensor, name: str, expert: int) -> torch.Tensor:
        weight = parameters[name][expert]
        row = row @ weight if bank.is_transposed else weight @ row
        return row + parameters[f"{name}_bias"][expert] if bank.has_bias else row

    output = torch.zeros_like(x)
    for t in range(len(x)):
        for j, expert in enumerate(choice[t].tolist()):
            if bank.has_gate:
                gate, up = linear(x[t], "gate_up_proj", expert).chunk(2)
                inner = F.silu(gate) * up
            else:
                inner = F.silu(linear(x[t], "up_proj", expert))
            row = linear(inner, "down_proj", expert)
            if bank.has_post_expert_norm:
                scale = parameters["post_expert_norm.weight"]
                row = F.rms_norm(row, row.shape, scale, torch.finfo(bank.down_proj.dtype).eps)
            output = output + F.one_hot(torch.tensor(t), len(x))[:, None] * weights[t, j] * row
    return output


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the ways that were chosen."""
    names: list[str] = []
    choose = experts_dispatch._choose

    def noted(*args: Any) -> str:
        names.append(choose(*args))
        return names[-1]

    monkeypatch.setattr(experts_dispatch, "_choose", noted)
    return names


@pytest.fixture(params=["one thread", "two threads"])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one thread vectors are multiplied by numpy, with two they are not."""
    count = 1 if request.param == "one thread" else 2
    monkeypatch.setattr(torch, "get_num_threads", lambda: count)


def assert_close(ours: torch.Tensor, expected: torch.Tensor, relative: float = 1e-5) -> None:
    assert ours.shape == expected.shape
    assert (ours - expected).norm() <= relative * expected.norm()


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("k", [1, 2, EXPERTS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sizes", [(EXPERTS, HIDDEN, INNER), ODD], ids=["even", "odd"])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("large", [0, experts_dispatch.LARGE_BYTES], ids=["large", "small"])
def test_the_output_equals_a_float64_loop(
    layout: str,
    sizes: tuple[int, int, int],
    dtype: torch.dtype,
    k: int,
    grad: bool,
    large: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(experts_dispatch, "LARGE_BYTES", large)
    bank = make_bank(layout, sizes, dtype)
    for tokens in (0, 1, 2, 5, 64 // k):
        x, choice, weights = make_inputs(bank, tokens, k)
        with torch.set_grad_enabled(grad):
            output = bank(x, choice, weights)
        assert output.dtype == dtype
        assert output.requires_grad == grad
        assert_close(output.double(), loop(bank, x.double(), choice, weights.double()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tokens", [1, 7])
def test_gradients_equal_those_of_a_float64_loop(
    layout: str, frozen: bool, dtype: torch.dtype, tokens: int, ran: list[str]
) -> None:
    bank = make_bank(layout, dtype=dtype).requires_grad_(not frozen)
    x, choice, weights = make_inputs(bank, tokens)
    leaves = [x, weights, *([] if frozen else bank.parameters())]
    if not bank.has_post_expert_norm:
        leaves = [leaf for leaf in leaves if leaf is not bank.post_expert_norm.weight]
    direction = torch.linspace(-1, 1, x.numel()).view_as(x)
    x.requires_grad_(), weights.requires_grad_()
    grads = torch.autograd.grad((bank(x, choice, weights) * direction).sum(), leaves)
    expected = loop(bank, x.double(), choice, weights.double())
    expected = torch.autograd.grad((expected * direction).sum(), leaves)
    for ours, reference in zip(grads, expected, strict=True):
        assert_close(ours.double(), reference.double())
    assert ran == ["grouped_mm" if dtype == torch.float32 else "expert_by_expert"]


WAYS: dict[str, tuple[str, dict[str, Any]]] = {  # tokens 1, 5 (two rows of an expert), 64
    "fp32, one thread": ("one_token, expert_by_expert, grouped_mm", {}),
    "fp32, two threads": ("one_token, grouped_mm, grouped_mm", {"threads": 2}),
    "fp32, transposed": ("one_token, grouped_mm, grouped_mm", {"layout": "transposed, biases"}),
    "bf16": ("one_token, grouped_mm, grouped_mm", {"dtype": torch.bfloat16, "sizes": EVEN}),
    "large": ("one_token, expert_by_expert, expert_by_expert", {"large": 0}),
    "gradients": ("grouped_mm, grouped_mm, grouped_mm", {"grad": True}),
    "gradients, frozen": ("one_token, expert_by_expert, grouped_mm", {"grad": "frozen"}),
    "bf16, odd": ("one_token, expert_by_expert, expert_by_expert", {"dtype": torch.bfloat16}),
    "bf16, odd, gradients": (
        "expert_by_expert, expert_by_expert, expert_by_expert",
        {"dtype": torch.bfloat16, "grad": True},
    ),
    "parallel": ("grouped_mm, grouped_mm, grouped_mm", {"parallel": True}),
    "parallel, odd": ("batched_mm, batched_mm, batched_mm", {"parallel": True, "sizes": ODD}),
    "autocast": ("grouped_mm, grouped_mm, grouped_mm", {"autocast": True}),
}


@pytest.mark.parametrize("case", WAYS)
def test_which_way_is_chosen(case: str, ran: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    expected, given = WAYS[case]
    monkeypatch.setattr(torch, "get_num_threads", lambda: given.get("threads", 1))
    monkeypatch.setattr(experts_dispatch, "LARGE_BYTES", given.get("large", 2**25))
    bank = make_bank(
        **{name: given[name] for name in ("layout", "sizes", "dtype") if name in given}
    )
    bank._is_expert_parallel = given.get("parallel", False)
    bank.requires_grad_(given.get("grad") != "frozen")
    for tokens in (1, 5, 64):
        inputs = make_inputs(bank, tokens)
        with (
            torch.set_grad_enabled("grad" in given),
            torch.autocast("cpu", torch.bfloat16, enabled="autocast" in given),
        ):
            bank(*inputs)
    assert ", ".join(ran) == expected


@pytest.mark.parametrize("sizes", [EVEN, (EXPERTS, HIDDEN, INNER)], ids=["even", "odd"])
@pytest.mark.parametrize("tokens", [1, 7, 64])
@pytest.mark.parametrize("grad", [False, True])
def test_bf16_is_as_accurate_as_the_librarys_ways(
    sizes: tuple[int, int, int], tokens: int, grad: bool
) -> None:
    """batched_mm takes any size; grouped_mm refuses some."""
    bank = make_bank(sizes=sizes, dtype=torch.bfloat16)
    inputs = make_inputs(bank, tokens)
    exact = loop(bank, inputs[0].double(), inputs[1], inputs[2].double())
    with torch.set_grad_enabled(grad):
        ours = bank(*inputs)
        bank.config._experts_implementation = "batched_mm"
        theirs = bank(*inputs)
        bank.config._experts_implementation = "grouped_mm"
        if sizes != EVEN:
            with pytest.raises(RuntimeError, match="16 bytes"):
                bank(*inputs)
    assert ours.dtype == torch.bfloat16
    assert (ours - exact).norm() <= 1.2 * (theirs - exact).norm()


def test_autocast_gives_what_grouped_mm_gives() -> None:
    bank = make_bank()
    for tokens in (1, 5):
        inputs = make_inputs(bank, tokens)
        results = []
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            for implementation in ("auto", "grouped_mm"):
                bank.config._experts_implementation = implementation
                results.append(bank(*inputs))
        assert torch.equal(*results)


@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize("sizes", [(EXPERTS, HIDDEN, INNER), ODD], ids=["even", "odd"])
def test_experts_of_other_ranks_add_nothing(sizes: tuple[int, int, int], tokens: int) -> None:
    bank = make_bank(sizes=sizes)
    bank._is_expert_parallel = True
    x, choice, weights = make_inputs(bank, tokens)
    choice[:, 1] = EXPERTS  # not of this rank; its routing weight is zero
    weights[:, 1] = 0.0
    weights.requires_grad_()
    output = bank(x, choice, weights)
    assert_close(output.double(), loop(bank, x.double(), choice[:, :1], weights[:, :1].double()))
    output.sum().backward()
    assert not weights.grad[:, 1].any() and weights.grad[:, 0].all()


def test_forward_mode_derivatives_are_not_lost(ran: list[str]) -> None:
    bank = make_bank(dtype=torch.float64).requires_grad_(False)
    x, choice, weights = make_inputs(bank, 1)
    tangent = torch.ones_like(x)
    with forward_ad.dual_level():
        dual = bank(forward_ad.make_dual(x, tangent), choice, weights)
        ours = forward_ad.unpack_dual(dual).tangent
    step = 1e-6 * tangent
    expected = (
        loop(bank, x + step, choice, weights) - loop(bank, x - step, choice, weights)
    ) / 2e-6
    assert_close(ours, expected, 1e-6)
    assert ran == ["expert_by_expert"]


def test_fake_tensors_read_no_values(ran: list[str]) -> None:
    bank = make_bank(sizes=EVEN, dtype=torch.bfloat16)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        x, weights = (torch.empty(1, size, dtype=torch.bfloat16) for size in (HIDDEN, 2))
        assert bank(x, torch.zeros(1, 2, dtype=torch.long), weights).shape == x.shape
    assert ran == ["grouped_mm"]


CUDA_WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "nothing loadable": ("grouped_mm", {}),
    "one token": ("batched_mm", {"tokens": 1}),
    "one token, gradients": ("grouped_mm", {"tokens": 1, "needs_grad": True}),
    "odd sizes": ("batched_mm", {"sizes": (EXPERTS, HIDDEN, INNER)}),
    "sonicmoe": ("sonicmoe", {"loadable": (True, True), "needs_grad": True}),
    "no gate": ("deepgemm", {"loadable": (True, True), "layout": "no gate, biases"}),
    "deepgemm": ("deepgemm", {"loadable": (False, True)}),
    "deepgemm, gradients": ("grouped_mm", {"loadable": (False, True), "needs_grad": True}),
    "norm": ("grouped_mm", {"loadable": (True, True), "layout": "norm of each expert"}),
    "fp32": ("grouped_mm", {"loadable": (True, True), "dtype": torch.float32}),
}


@pytest.mark.parametrize("case", CUDA_WAYS)
def test_which_way_is_chosen_on_cuda(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The choice alone: there is no GPU."""
    expected, given = CUDA_WAYS[case]
    monkeypatch.setattr(experts_dispatch, "_loadable", lambda: given.get("loadable", (False,) * 2))
    bank = make_bank(
        given.get("layout", "gated"), given.get("sizes", EVEN), given.get("dtype", torch.bfloat16)
    )
    projections = experts_dispatch.projections_of(bank)
    arguments = (given.get("tokens", 7), given.get("needs_grad", False))
    assert experts_dispatch._choose_on_cuda(bank, projections, *arguments) == expected


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("lengths", [(7, 12, 9, 40), (1, 7, 12, 9)])
def test_compiled_it_takes_the_graphs_of_grouped_mm(lengths: tuple[int, ...], grad: bool) -> None:
    graphs: dict[str, int] = {}
    for implementation in ("grouped_mm", "auto"):
        torch._dynamo.reset()
        counters.clear()
        bank = make_bank(implementation=implementation).requires_grad_(grad)
        compiled = torch.compile(bank, fullgraph=True, backend="eager")
        for tokens in lengths:
            inputs = make_inputs(bank, tokens)
            assert_close(compiled(*inputs), loop(bank, *inputs))
        assert not counters["graph_break"]
        graphs[implementation] = counters["stats"]["unique_graphs"]
    assert graphs["auto"] == graphs["grouped_mm"] <= 2 + (1 in lengths)


@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_bf16_of_odd_sizes_works() -> None:
    bank = make_bank(dtype=torch.bfloat16)
    inputs = make_inputs(bank, 7)
    compiled = torch.compile(bank, fullgraph=True, backend="eager")
    exact = loop(bank, inputs[0].double(), inputs[1], inputs[2].double())
    assert_close(compiled(*inputs).double(), exact, 1e-2)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_models_of_the_library_generate_as_with_eager(
    tiny_moe: Model, name: str, ran: list[str]
) -> None:
    model = tiny_moe(name, "auto")
    ids = torch.tensor([[7, 8, 9, 10], [11, 7, 12, 13]])
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    for prompt in (ids, ids[:1]):
        model.set_experts_implementation("auto")
        tokens, logits = model.generate(input_ids=prompt, **options), model(prompt).logits
        model.set_experts_implementation("eager")
        assert torch.equal(tokens, model.generate(input_ids=prompt, **options))
        assert_close(logits, model(prompt).logits)
    assert "one_token" in ran


def test_routed_lora_runs_on_a_model_with_auto(tiny_moe: Model) -> None:
    """Without an active adapter, too, when the bank itself runs."""
    model = get_peft_model(tiny_moe(MODELS[0], "auto"), lora())
    randomize(model)
    ids = torch.tensor([[7, 8, 9, 10]])
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        enable_routed_lora(model)
        assert_close(model(input_ids=ids).logits, expected)
        with model.disable_adapter():
            ours = model(input_ids=ids[:, :1]).logits
            model.base_model.model.set_experts_implementation("eager")
            assert_close(ours, model(input_ids=ids[:, :1]).logits)


def test_auto_is_an_implementation_beside_the_others_and_not_the_default(
    tiny_model: Model,
) -> None:
    assert ALL_EXPERTS_FUNCTIONS["auto"] is experts_dispatch.auto_experts_forward
    assert {"batched_mm", "grouped_mm", "sonicmoe", "deepgemm"} <= set(ALL_EXPERTS_FUNCTIONS)
    model = tiny_model()
    assert model.config.text_config._experts_implementation == "grouped_mm"
    assert "experts_implementation" not in model.config.to_json_string()
    with pytest.raises(ValueError, match="experts_implementation"):
        model.set_experts_implementation("automatic")

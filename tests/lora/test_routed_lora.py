"""Adapted experts, both ways to compute them, against a loop in float64 that adds B A to W."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from expert_banks import make_bank
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from vlmoe.lora import routed as routed_lora
from vlmoe.lora.routed import ExpertAdapter, routed_lora_forward
from vlmoe.modeling_vlmoe.sparse_moe import VLMoEExperts

Tensors = dict[str, torch.Tensor]

TOKENS, RANK, K = 11, 3, 2
PROJECTIONS = ["gate_up_proj", "down_proj"]
ADAPTED = [PROJECTIONS, PROJECTIONS[:1], PROJECTIONS[1:]]
# Choices of experts: spread, one without tokens, all tokens to the same two.
ROUTINGS = {"spread": [0, 1, 2, 3], "one idle": [0, 1, 3], "two experts": [3, 1]}


@pytest.fixture(params=["cpu kernel", "grouped"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to compute; the other one fails."""

    def fail(*_: Any) -> None:
        raise AssertionError("the wrong way")

    if request.param == "grouped":
        monkeypatch.setattr(routed_lora, "_fits_cpu_kernel", lambda *_: False)
        monkeypatch.setattr(routed_lora, "routed_lora_cpu", fail)
    else:
        monkeypatch.setattr(routed_lora, "_grouped", fail)
    return request.param


@pytest.fixture
def bank(tiny_config: Callable[..., Any]) -> VLMoEExperts:
    config = tiny_config().text_config
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    bank = VLMoEExperts(config).double().requires_grad_(False)
    for parameter in bank.parameters():
        parameter.normal_(std=0.3)
    return bank


def make_inputs(
    bank: VLMoEExperts, routing: str, ranks: tuple[int, ...] = (RANK,), tokens: int = TOKENS
) -> Tensors:
    """Float64 leaves: tokens, routing weights, and A and B as PEFT lays them out."""
    torch.manual_seed(1)
    experts = bank.num_experts
    x = torch.randn(tokens, bank.hidden_dim, dtype=torch.float64)
    allowed = torch.tensor(ROUTINGS[routing])
    choice = torch.stack([allowed[torch.randperm(len(allowed))[:K]] for _ in range(tokens)])
    inputs = {"x": x, "weights": torch.rand(tokens, K, dtype=torch.float64)}
    for name in PROJECTIONS:
        out, width = getattr(bank, name).shape[1:]
        for i, rank in enumerate(ranks):
            inputs[f"{name}.{i}.A"] = torch.randn(rank * experts, width).double() * 0.3
            inputs[f"{name}.{i}.B"] = torch.randn(out, rank * experts).double() * 0.3
    return {"choice": choice} | {n: t.requires_grad_() for n, t in inputs.items()}


def scaling(i: int) -> float:
    return 0.7 + i


def adapters_of(inputs: Tensors, adapted: list[str]) -> dict[str, list[ExpertAdapter]]:
    count = sum(name.startswith("down_proj") for name in inputs) // 2
    return {
        name: [
            ExpertAdapter(inputs[f"{name}.{i}.A"], inputs[f"{name}.{i}.B"], scaling(i))
            for i in range(count)
        ]
        for name in adapted
    }


def backward(output: torch.Tensor, inputs: Tensors) -> Tensors:
    """The output, and the gradient of each leaf that has one."""
    direction = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    leaves = {n: t for n, t in inputs.items() if t.requires_grad}
    grads = torch.autograd.grad(output, list(leaves.values()), direction, allow_unused=True)
    named = {n: g for n, g in zip(leaves, grads, strict=True) if g is not None}
    return {"output": output.detach()} | named


def by_loop(bank: VLMoEExperts, inputs: Tensors, adapted: list[str]) -> Tensors:
    """Token by token and choice by choice, each with its expert's W + scaling * B A."""
    weights = {}
    for name in PROJECTIONS:
        weight = getattr(bank, name)
        for i, (a, b, scale) in enumerate(adapters_of(inputs, adapted).get(name, [])):
            assert scale == scaling(i)
            e = bank.num_experts
            a, b = a.view(e, -1, a.shape[-1]), b.view(b.shape[0], -1, e)
            weight = weight + scale * torch.stack([b[:, :, n] @ a[n] for n in range(e)])
        weights[name] = weight
    rows = []
    for t in range(len(inputs["x"])):
        row = 0
        for j in range(K):
            e = inputs["choice"][t, j]
            gate, up = (weights["gate_up_proj"][e] @ inputs["x"][t]).chunk(2)
            hidden = torch.nn.functional.silu(gate) * up
            row = row + inputs["weights"][t, j] * (weights["down_proj"][e] @ hidden)
        rows.append(row)
    return backward(torch.stack(rows), inputs)


def routed(bank: VLMoEExperts, inputs: Tensors, adapted: list[str]) -> Tensors:
    arguments = (bank, inputs["x"], inputs["choice"], inputs["weights"])
    return backward(routed_lora_forward(*arguments, adapters_of(inputs, adapted)), inputs)


def leaves_in(dtype: torch.dtype, inputs: Tensors) -> Tensors:
    return {
        name: tensor if name == "choice" else tensor.detach().to(dtype).requires_grad_()
        for name, tensor in inputs.items()
    }


def error(ours: torch.Tensor, exact: torch.Tensor) -> float:
    return ((ours.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("adapted", ADAPTED, ids=str)
@pytest.mark.parametrize("ranks", [(RANK,), (RANK, 5)], ids=str)
@pytest.mark.parametrize(
    ("way", "dtype", "tolerance"),
    [  # torch's grouped matrix product knows no float64
        ("cpu kernel", torch.float64, 1e-13),
        ("cpu kernel", torch.float32, 2e-6),
        ("grouped", torch.float32, 2e-6),
    ],
    indirect=["way"],
)
def test_output_and_gradients_equal_the_loop_in_float64(
    way: str,
    bank: VLMoEExperts,
    routing: str,
    adapted: list[str],
    ranks: tuple[int, ...],
    dtype: torch.dtype,
    tolerance: float,
) -> None:
    inputs = make_inputs(bank, routing, ranks)
    exact = by_loop(bank, inputs, adapted)
    ours = routed(bank.to(dtype), leaves_in(dtype, inputs), adapted)
    assert ours.keys() == exact.keys()
    assert len(exact) == 3 + 2 * len(adapted) * len(ranks)
    for name, tensor in exact.items():
        assert ours[name].dtype == dtype
        assert error(ours[name], tensor) <= tolerance, name


@pytest.mark.parametrize("wanted", ["x", "weights", "gate_up_proj.0.A", "down_proj.0.B"])
def test_one_gradient_alone_is_the_one_among_all(way: str, bank: VLMoEExperts, wanted: str) -> None:
    inputs, bank = leaves_in(torch.float32, make_inputs(bank, "spread")), bank.float()
    full = routed(bank, inputs, PROJECTIONS)
    alone = {
        n: t.detach().requires_grad_(n == wanted) if n != "choice" else t for n, t in inputs.items()
    }
    ours = routed(bank, alone, PROJECTIONS)
    assert ours.keys() == {"output", wanted}
    torch.testing.assert_close(ours[wanted], full[wanted])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fp32_adapters", [False, True])
def test_low_precision_errs_no_more_than_adapted_weights_in_eager(
    way: str, bank: VLMoEExperts, dtype: torch.dtype, fp32_adapters: bool
) -> None:
    """The other way rounds W + B A, ours the two products."""
    allowed = 1.2
    exact_inputs = make_inputs(bank, "spread", tokens=200)
    for name in PROJECTIONS:  # a tenth of the base weights: still more than training makes of it
        exact_inputs[f"{name}.0.B"].data.mul_(0.3)
    inputs = leaves_in(dtype, exact_inputs)
    bank = bank.to(dtype)
    exact = by_loop(bank.double(), leaves_in(torch.float64, inputs), PROJECTIONS)
    bank = bank.to(dtype)
    peer_bank = Qwen3MoeExperts(bank.config).requires_grad_(False).to(dtype)
    for name in PROJECTIONS:
        (a, b, scale), e = adapters_of(inputs, PROJECTIONS)[name][0], bank.num_experts
        lhs, rhs = b.view(b.shape[0], -1, e).permute(2, 0, 1), a.view(e, -1, a.shape[-1])
        del peer_bank._parameters[name]
        setattr(peer_bank, name, torch.baddbmm(getattr(bank, name), lhs, rhs, alpha=scale))
    arguments = (inputs["x"], inputs["choice"], inputs["weights"])
    peer = backward(peer_bank(*arguments), inputs)
    if fp32_adapters:
        inputs |= {n: t.detach().float().requires_grad_() for n, t in inputs.items() if "proj" in n}
    ours = routed(bank, inputs, PROJECTIONS)
    assert ours.keys() == peer.keys() == exact.keys()
    for name, tensor in exact.items():
        assert ours[name].dtype == inputs.get(name, inputs["x"]).dtype
        assert 0 < error(ours[name], tensor) <= allowed * error(peer[name], tensor), name


def test_autocast_computes_in_its_dtype(way: str, bank: VLMoEExperts) -> None:
    inputs = leaves_in(torch.float32, make_inputs(bank, "spread"))
    bank = bank.float()
    with torch.autocast("cpu", torch.bfloat16):
        output = routed_lora_forward(
            bank, inputs["x"], inputs["choice"], inputs["weights"], adapters_of(inputs, PROJECTIONS)
        )
    assert output.dtype == torch.float32
    ours = backward(output, inputs)
    rounded = leaves_in(torch.bfloat16, inputs)
    reference = routed(bank.bfloat16(), rounded | {"weights": inputs["weights"]}, PROJECTIONS)
    for name, tensor in reference.items():
        assert ours[name].dtype == torch.float32
        assert error(ours[name], tensor.double()) < 0.02, name


@pytest.mark.parametrize("act", ["gelu", "relu", "silu"])
def test_the_kernel_is_for_silu_and_other_activations_are_right_too(
    bank: VLMoEExperts, act: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.activations import ACT2FN

    bank.act_fn = ACT2FN[act]
    used: list[int] = []
    kernel = routed_lora.routed_lora_cpu

    def counted(*args: Any) -> torch.Tensor:
        used.append(1)
        return kernel(*args)

    monkeypatch.setattr(routed_lora, "routed_lora_cpu", counted)
    inputs, bank = leaves_in(torch.float32, make_inputs(bank, "spread")), bank.float()
    arguments = (inputs["x"], inputs["choice"], inputs["weights"])
    output = routed_lora_forward(bank, *arguments, adapters={})
    torch.testing.assert_close(output, bank(*arguments))
    assert len(used) == (act == "silu")


@pytest.mark.parametrize("adapted", ADAPTED, ids=str)
def test_no_pass_makes_a_tensor_of_the_shape_of_the_base_weights(
    way: str, bank: VLMoEExperts, adapted: list[str]
) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    shapes = [getattr(bank, name).shape for name in PROJECTIONS]
    forbidden = {*shapes, *(torch.Size((s[0], s[2], s[1])) for s in shapes)}
    made: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            output = func(*args, **kwargs or {})
            for tensor in output if isinstance(output, tuple | list) else [output]:
                own = isinstance(tensor, torch.Tensor) and tensor.shape in forbidden
                if own and not tensor._is_view() and "transpose" not in str(func):
                    made.append(str(func))
            return output

    inputs, bank = leaves_in(torch.float32, make_inputs(bank, "spread")), bank.float()
    with Watch():
        routed(bank, inputs, adapted)
    assert not made


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("layout", ["gated", "no gate, biases", "transposed, biases"])
def test_the_grouped_way_reads_no_values_on_the_host(
    layout: str, per_token: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fake tensors have none: to read one, or to ask for a shape that depends on one, raises.

    Those of CPUs, since a torch without CUDA cannot slice fake ones of CUDA.
    """
    monkeypatch.setattr(routed_lora, "_fits_cpu_kernel", lambda *_: False)
    monkeypatch.setattr(torch, "promote_types", lambda dtype, _: dtype)  # as on CUDA
    bank = make_bank(layout, (4, 8, 16), torch.bfloat16).requires_grad_(False)
    first = "gate_up_proj" if bank.has_gate else "up_proj"
    with FakeTensorMode(allow_non_fake_inputs=True):
        adapters = {}
        for name in (first, "down_proj"):
            shape = getattr(bank, name).shape[1:]
            width, out = shape if bank.is_transposed else reversed(shape)
            a = torch.empty(8 * 4, width, dtype=torch.bfloat16, requires_grad=True)
            b = torch.empty(out, 8 * 4, dtype=torch.bfloat16, requires_grad=True)
            adapters[name] = [ExpertAdapter(a, b, 2.0)]
        x = torch.empty(6, 8, dtype=torch.bfloat16, requires_grad=True)
        choice, weights = torch.zeros(6, 2, dtype=torch.long), torch.empty(6, 2)
        owner = torch.zeros(6, dtype=torch.long) if per_token else None
        arguments = (bank, x, choice, weights, adapters)
        output = routed_lora_forward(*arguments, adapter_of_token=owner)
        output.sum().backward()
    assert output.shape == x.shape
    assert x.grad is not None and adapters[first][0].lora_a.grad is not None

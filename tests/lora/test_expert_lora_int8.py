"""LoRA on int8 experts: the numbers of the dequantised weights, which never exist all at once.

Nearly every case runs two models with the same adapters: one whose experts are int8, and its twin,
whose experts are plain and have the values that the int8 ones stand for.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import stored_bytes
from lora_runs import INPUT_IDS, LAYERS, MODELS, assert_close, lora, randomize, run, train
from peft import PeftModel, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from torchao.quantization import Float8WeightOnlyConfig, FqnToConfig, Int8WeightOnlyConfig
from torchao.quantization.granularity import PerGroup
from transformers import PreTrainedModel, TorchAoConfig

import vlmoe
from vlmoe import enable_routed_lora, expert_int8_config, expert_lora_config
from vlmoe.lora import int8 as int8_experts
from vlmoe.lora import routed as routed_lora
from vlmoe.lora import routed_cpu as routed_lora_cpu
from vlmoe.lora.int8 import is_int8
from vlmoe.modeling_vlmoe.quantization import EXPERT_PARAMETERS

Model = Callable[..., PreTrainedModel]
Twins = tuple[PreTrainedModel, PreTrainedModel]

WAYS = ["cpu kernel", "grouped"]
OURS, QWEN, GPT_OSS = MODELS[0], "Qwen3MoeForCausalLM", "GptOssForCausalLM"


@pytest.fixture
def twins(tiny_moe: Model, tmp_path: Path) -> Callable[..., Twins]:
    """`twins(name, dtype)`: the model with int8 experts, and the one with their values."""

    def make(
        name: str = OURS,
        dtype: torch.dtype = torch.float32,
        implementation: str = "eager",
        **fields: Any,
    ) -> Twins:
        model = tiny_moe(name, "eager", **fields)
        folder = tmp_path / name
        model.save_pretrained(folder)
        load = type(model).from_pretrained
        options = {"dtype": dtype, "experts_implementation": implementation}
        int8 = load(folder, quantization_config=expert_int8_config(), **options).eval()
        plain = load(folder, **options).eval()
        values = dict(int8.named_parameters())
        for parameter_name, parameter in plain.named_parameters():
            if is_int8(values[parameter_name]):
                parameter.data = values[parameter_name].dequantize()
        return int8, plain

    return make


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to compute, with experts that are dequantised in parts."""
    monkeypatch.setattr(int8_experts, "CHUNK", 200)
    if request.param == "grouped":
        monkeypatch.setattr(routed_lora, "_fits_cpu_kernel", lambda *_: False)
    return request.param


def by_peft(model: PreTrainedModel) -> torch.nn.Module:
    """With the same trained-looking adapters each time."""
    torch.manual_seed(4)
    peft_model = get_peft_model(model, lora())
    randomize(peft_model)
    return peft_model


def adapted(model: PreTrainedModel) -> torch.nn.Module:
    peft_model = by_peft(model)
    enable_routed_lora(peft_model)
    return peft_model


def banks(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [p for p in model.parameters() if is_int8(p)]


@pytest.mark.parametrize("implementation", ["eager", "auto"])
@pytest.mark.parametrize("name", [OURS, QWEN, GPT_OSS])
def test_numbers_are_those_of_the_dequantised_weights_in_float64(
    twins: Callable[..., Twins], calls: list[type], way: str, name: str, implementation: str
) -> None:
    int8, plain = twins(name, implementation=implementation)
    ours = run(adapted(int8))
    assert len(calls) == LAYERS and len(banks(int8)) == 2 * LAYERS
    exact = run(by_peft(plain).double())
    assert len(calls) == LAYERS  # the reference is PEFT's own path
    assert sum("lora_" in each for each in exact) == 4 * LAYERS
    assert_close(ours, exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_bf16_and_autocast_are_those_of_the_dequantised_weights(
    twins: Callable[..., Twins], way: str, dtype: torch.dtype
) -> None:
    """In bf16 the same rounded weights; under autocast they are rounded from int8 at once."""
    results = []
    for model in map(adapted, twins(dtype=dtype)):
        assert {p.dtype for n, p in model.named_parameters() if "lora" in n} == {torch.float32}
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
            results.append(run(model))
    if way == "cpu kernel":
        assert_close(*results)
    else:  # products of the whole bank sum in another order
        assert_close(*results, relative=0.05)


def bodies() -> dict[Any, Callable[..., Any]]:
    """What the project's operators run, which is hidden from a mode."""
    kernel, operators = routed_lora_cpu, torch.ops.vlmoe
    return {
        operators.routed_lora.default: kernel._routed_lora._init_fn,
        operators.routed_lora_backward.default: kernel._routed_lora_backward._init_fn,
        operators.int8_grouped_linear.default: routed_lora.int8_grouped_linear._init_fn,
    }


class Recorder(TorchDispatchMode):
    """The bytes of the largest floating tensor that is made, within operators too."""

    def __init__(self) -> None:
        super().__init__()
        self.bodies, self.largest, self.operators = bodies(), 0, set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators.add(func)
        if func in self.bodies:
            with self:
                return self.bodies[func](*args, **kwargs or {})
        output = func(*args, **kwargs or {})
        for tensor in output if isinstance(output, tuple | list) else [output]:
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                if not is_int8(tensor):
                    self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        return output


def bank_of(model: torch.nn.Module) -> torch.nn.Module:
    return model.base_model.model.model.language_model.layers[1].mlp.experts


def test_one_expert_at_a_time_is_dequantised_and_none_is_kept(
    twins: Callable[..., Twins], way: str
) -> None:
    int8, _ = twins(num_experts=16, num_experts_per_tok=2)
    bank = bank_of(adapted(int8))
    expert = (48, 32)  # the larger projection
    x = torch.randn(12, 32, requires_grad=True)
    choice = torch.rand(12, 16).topk(2).indices
    saved: set[tuple[int, ...]] = set()

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_floating_point():
            saved.add(tuple(tensor.shape))
        return tensor

    with Recorder() as recorder:
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            output = bank(x, choice, torch.rand(12, 2))
        output.square().sum().backward()
    assert recorder.operators & recorder.bodies.keys()
    assert (
        48 * 32 * 4 <= recorder.largest <= 2 * 48 * 32 * 4
    )  # of 16 experts, of which 12 have rows
    assert saved and not saved & {expert, (32, 24), (16, *expert), (16, 32, 24)}


def test_experts_of_512_take_at_most_55_percent_of_bf16_before_and_after_a_step(
    twins: Callable[..., Twins],
) -> None:
    sizes = {"hidden_size": 512, "moe_intermediate_size": 512, "num_hidden_layers": 1}
    int8, plain = twins(dtype=torch.bfloat16, mlp_only_layers=[], **sizes)
    model, weights = adapted(int8), banks(int8)
    before = [weight.qdata.clone() for weight in weights]
    model(input_ids=INPUT_IDS, labels=INPUT_IDS).loss.backward()
    torch.optim.AdamW(p for p in model.parameters() if p.requires_grad).step()
    bf16 = sum(stored_bytes(p) for n, p in plain.named_parameters() if ".experts." in n)
    assert bf16 == 4 * 3 * 512 * 512 * 2
    assert sum(map(stored_bytes, weights)) <= 0.55 * bf16
    assert all(torch.equal(w.qdata, b) for w, b in zip(weights, before, strict=True))
    assert all(weight.grad is None for weight in weights)


@pytest.mark.parametrize("name", [OURS, QWEN])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(
    twins: Callable[..., Twins], calls: list[type], name: str, use_reentrant: bool
) -> None:
    model = adapted(twins(name)[0]).train()
    reference = run(model)
    calls.clear()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    assert_close(run(model), reference)
    assert len(calls) == 2 * LAYERS


def disabled(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    with model.disable_adapter():
        return run(model)


def by_row(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    torch.manual_seed(5)
    model.add_adapter("other", lora(r=4))
    randomize(model, "other", seed=2)
    return {"logits": model(input_ids=INPUT_IDS, adapter_names=["other", "__base__"]).logits}


def two_active(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    torch.manual_seed(5)
    model.add_adapter("other", lora(r=4))
    randomize(model, "other", seed=2)
    model.base_model.set_adapter(["default", "other"])
    return run(model)


def with_dropout(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    enable_routed_lora(model.train(), dropout=0.3)
    torch.manual_seed(3)
    return run(model)


def some_experts(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.unflatten(1, (-1, 4))[..., [0, 2, 3]] = 0
    enable_routed_lora(model, train_experts={layer: [1] for layer in range(LAYERS)})
    return run(model)


def generated(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    return {"tokens": model.generate(input_ids=INPUT_IDS[:1], **options).float()}


@pytest.mark.parametrize(
    "use", [disabled, by_row, two_active, with_dropout, some_experts, generated]
)
def test_what_lora_does_on_plain_experts_it_does_on_int8(
    twins: Callable[..., Twins], use: Callable[..., dict[str, torch.Tensor]]
) -> None:
    assert_close(*(use(adapted(model).eval()) for model in twins()))


@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_it_is_one_graph(twins: Callable[..., Twins], way: str) -> None:
    model = adapted(twins()[0])
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for length in (7, 12):
        ids = torch.arange(2 * length).view(2, length) + 6
        assert_close(run(model, ids, compiled), run(model, ids))


@pytest.mark.parametrize("name", [OURS, QWEN])
@pytest.mark.parametrize("kind", ["Trainer", "TRL"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_trained_saved_and_loaded_onto_int8_and_onto_plain_experts(
    twins: Callable[..., Twins],
    name: str,
    kind: str,
    dtype: torch.dtype,
    sentences: Any,
    tokenizer: Any,
    tmp_path: Path,
) -> None:
    int8, plain = twins(name, dtype, vocab_size=len(tokenizer))
    model = get_peft_model(int8, expert_lora_config(int8, r=3))
    enable_routed_lora(model)
    losses = train(model, kind, sentences, tmp_path, tokenizer)
    assert losses[-1] < losses[0]
    logits = run(model.eval())["logits"]
    model.save_pretrained(tmp_path / "adapter")
    int8_again, _ = twins(name, dtype, vocab_size=len(tokenizer))
    for base, relative in ((int8_again, 0.0), (plain, 1e-5 if dtype == torch.float32 else 0.05)):
        loaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
        enable_routed_lora(loaded)
        assert_close({"logits": run(loaded)["logits"]}, {"logits": logits}, relative)


def hooked(model: torch.nn.Module) -> None:
    bank_of(model).get_base_layer().register_forward_hook(lambda *_: None)
    run(model)


REFUSED: dict[Callable[..., Any], str] = {
    lambda model: model.merge_adapter(): r"cannot be merged into quantized experts\. Save",
    lambda model: model.merge_and_unload(): r"without `quantization_config`, and merge there",
    vlmoe.disable_routed_lora: r"layers\.0\.mlp\.experts: .* PEFT's own path cannot compute",
    hooked: r"needs the routed path, which cannot run here: VLMoEExperts has hooks\. Change that",
}


@pytest.mark.parametrize("use", REFUSED, ids=["merge", "merge for good", "disable", "fall back"])
def test_what_needs_plain_weights_is_refused_and_the_adapter_stays(
    twins: Callable[..., Twins], calls: list[type], use: Callable[..., Any]
) -> None:
    config = lora()
    config.target_modules = {"q_proj"}  # comes before the experts, and is not merged either
    model = get_peft_model(twins()[0], config)
    randomize(model)
    enable_routed_lora(model)
    before = run(model)
    with pytest.raises(ValueError, match=REFUSED[use]):
        use(model)
    bank_of(model).get_base_layer()._forward_hooks.clear()
    calls.clear()
    assert_close(run(model), before)
    assert len(calls) == LAYERS


@pytest.mark.parametrize(
    "config", [Int8WeightOnlyConfig(granularity=PerGroup(8)), Float8WeightOnlyConfig()], ids=str
)
def test_other_kinds_of_torchao_and_other_implementations_are_refused(
    tiny_moe: Model, tmp_path: Path, config: Any
) -> None:
    tiny_moe(QWEN).save_pretrained(tmp_path)
    load = type(tiny_moe(QWEN)).from_pretrained
    config = TorchAoConfig(FqnToConfig({EXPERT_PARAMETERS: config}))
    model = get_peft_model(load(tmp_path, quantization_config=config), lora())
    kind = r"experts: .*_proj is a .*Tensor of torchao; under LoRA allowed: int8"
    with pytest.raises(ValueError, match=kind):
        enable_routed_lora(model)
    int8 = load(tmp_path, quantization_config=expert_int8_config())
    int8.set_experts_implementation("grouped_mm")
    model = get_peft_model(int8, lora())
    with pytest.raises(ValueError, match=r"`experts_implementation` is 'grouped_mm'.*'eager'"):
        enable_routed_lora(model)
    model.base_model.model.set_experts_implementation("eager")
    enable_routed_lora(model)
    run(model)

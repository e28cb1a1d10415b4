"""PEFT's operations on experts' LoRA: the routed path gives PEFT's numbers, and it is what ran.

Every case runs one model twice, by PEFT's own path and by ours, and counts the calls of ours.
"""

import copy
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import cpu_offload
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from lora_runs import BOTH, INPUT_IDS, LAYERS, MODELS, Tensors, assert_close, lora, randomize, run
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import ParamWrapper
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.distributed.tensor.experimental import implicit_replication
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import PreTrainedModel

from vlmoe import (
    disable_routed_lora,
    enable_routed_lora,
    expert_lora_config,
    hotswap_expert_lora,
)
from vlmoe.lora import wrappers as expert_lora

Model = Callable[..., PreTrainedModel]


@pytest.fixture
def compare(calls: list[type]) -> Callable[..., Tensors]:
    """`compare(model, layers)`: PEFT's numbers and ours, ours in so many routed calls."""

    def both(model: torch.nn.Module, routed_calls: int = LAYERS) -> Tensors:
        disable_routed_lora(model)
        calls.clear()
        reference = run(model)
        assert not calls
        enable_routed_lora(model)
        ours = run(model)
        assert len(calls) == routed_calls
        assert_close(ours, reference)
        return ours

    return both


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm", "auto"])
@pytest.mark.parametrize("name", MODELS)
def test_every_model_and_implementation(
    tiny_moe: Model, compare: Callable[..., Tensors], name: str, implementation: str
) -> None:
    model = get_peft_model(tiny_moe(name, implementation), lora())
    randomize(model)
    ours = compare(model)
    assert sum("lora_" in each for each in ours) == 4 * LAYERS


@pytest.mark.parametrize("targets", [BOTH[:1], BOTH[1:]])
@pytest.mark.parametrize("name", ["VLMoEForConditionalGeneration", "GptOssForCausalLM"])
def test_one_parameter_only(
    tiny_moe: Model, compare: Callable[..., Tensors], name: str, targets: list[str]
) -> None:
    model = get_peft_model(tiny_moe(name), lora(targets))
    randomize(model)
    assert sum("lora_" in each for each in compare(model)) == 2 * LAYERS


@pytest.mark.parametrize(
    "fields",
    [
        {"use_rslora": True},
        {"rank_pattern": {"experts.gate_up_proj": 5}},
        {"alpha_pattern": {"experts.down_proj": 7}, "lora_alpha": 3},
        {"init_lora_weights": "gaussian"},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["VLMoEForConditionalGeneration", "MixtralForCausalLM"])
def test_ranks_and_scalings(
    tiny_moe: Model, compare: Callable[..., Tensors], name: str, fields: dict[str, Any]
) -> None:
    model = get_peft_model(tiny_moe(name), lora(**fields))
    randomize(model)
    wrapper = next(m for m in model.modules() if isinstance(m, ParamWrapper))
    ranks = {
        wrapper.parameter_name: wrapper.r,
        wrapper.base_layer.parameter_name: wrapper.base_layer.r,
    }
    patterns = fields.get("rank_pattern", {})
    for name, rank in ranks.items():
        assert rank["default"] == patterns.get(f"experts.{name}", 3)
    compare(model)


def test_attention_and_router_are_adapted_beside(
    tiny_moe: Model, compare: Callable[..., Tensors]
) -> None:
    config = lora([*BOTH, "router.weight"])
    config.target_modules = ["q_proj"]
    model = get_peft_model(tiny_moe("VLMoEForConditionalGeneration"), config)
    randomize(model)
    assert any("router" in each for each in compare(model))


def test_several_adapters_one_or_two_of_them_active(
    tiny_moe: Model, compare: Callable[..., Tensors]
) -> None:
    model = get_peft_model(tiny_moe("VLMoEForConditionalGeneration"), lora())
    enable_routed_lora(model)
    model.add_adapter("other", lora(r=4, lora_alpha=2))
    for adapter in ("default", "other"):
        randomize(model, adapter, seed=len(adapter))
    logits = [compare(model)["logits"]]
    for adapters in ("other", ["default", "other"], ["other", "default"]):
        model.base_model.set_adapter(adapters)
        logits.append(compare(model)["logits"])
    assert not torch.allclose(logits[0], logits[1]) and not torch.allclose(logits[1], logits[2])
    model.delete_adapter("other")
    assert torch.allclose(compare(model)["logits"], logits[0])


def test_disabled_and_merged_adapters_are_the_base_models(
    tiny_moe: Model, calls: list[type]
) -> None:
    base = tiny_moe("VLMoEForConditionalGeneration")
    plain = run(copy.deepcopy(base).requires_grad_(False))["logits"]
    model = get_peft_model(base, lora())
    randomize(model)
    enable_routed_lora(model)
    adapted = run(model)["logits"]
    calls.clear()
    with model.disable_adapter():
        assert torch.equal(run(model)["logits"], plain)
    model.merge_adapter()
    torch.testing.assert_close(run(model)["logits"], adapted)
    assert not calls
    model.unmerge_adapter()
    torch.testing.assert_close(run(model)["logits"], adapted)
    assert len(calls) == LAYERS
    merged = model.merge_and_unload(safe_merge=True)
    assert not any(isinstance(module, ParamWrapper) for module in merged.modules())
    torch.testing.assert_close(run(merged.requires_grad_(False))["logits"], adapted)


def test_saved_adapters_are_pefts_and_load_both_ways(
    tiny_moe: Model, compare: Callable[..., Tensors], tmp_path: Path
) -> None:
    model = get_peft_model(tiny_moe("VLMoEForConditionalGeneration"), lora())
    randomize(model)
    files = []
    for folder, switch in (("peft", disable_routed_lora), ("ours", enable_routed_lora)):
        switch(model)
        model.save_pretrained(tmp_path / folder)
        names = ("adapter_model.safetensors", "adapter_config.json")
        files.append([(tmp_path / folder / name).read_bytes() for name in names])
    assert files[0] == files[1]
    logits = run(model)["logits"]
    loaded = PeftModel.from_pretrained(
        tiny_moe("VLMoEForConditionalGeneration"), tmp_path / "ours", is_trainable=True
    )
    torch.testing.assert_close(compare(loaded)["logits"], logits)
    # the same through transformers' own integration
    integrated = tiny_moe("VLMoEForConditionalGeneration")
    integrated.load_adapter(tmp_path / "ours")
    torch.testing.assert_close(compare(integrated)["logits"], logits)


def test_hotswap_at_equal_rank_and_no_other(
    tiny_moe: Model, compare: Callable[..., Tensors], tmp_path: Path
) -> None:
    for rank in (2, 3, 5):
        model = get_peft_model(
            tiny_moe("VLMoEForConditionalGeneration"), lora(r=rank, lora_alpha=9)
        )
        randomize(model, seed=rank)
        model.save_pretrained(tmp_path / str(rank))
        logits = run(model)["logits"] if rank == 3 else None
        if logits is not None:
            expected = logits
    model = get_peft_model(tiny_moe("VLMoEForConditionalGeneration"), lora())
    randomize(model)
    before = compare(model)["logits"]
    for rank in ("2", "5"):
        with pytest.raises(ValueError, match=r"can be swapped at equal rank and number of experts"):
            hotswap_expert_lora(model, str(tmp_path / rank), "default", torch_device="cpu")
        assert torch.equal(run(model)["logits"], before)
    hotswap_expert_lora(model, str(tmp_path / "3"), "default", torch_device="cpu")
    torch.testing.assert_close(compare(model)["logits"], expected)


def flip_the_header(file: Path) -> None:
    file.write_bytes(bytes(byte ^ 255 for byte in file.read_bytes()[:16]) + file.read_bytes()[16:])


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-50])


def one_expert_less(file: Path) -> None:
    tensors = load_file(file)
    tensors = {n: t[:9] if "lora_A" in n else t[:, :9] for n, t in tensors.items()}
    save_file({n: t.contiguous() for n, t in tensors.items()}, file)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip_the_header, r"adapter in .* is damaged"),
        (truncate, r"adapter in .* is damaged"),
        (one_expert_less, r"shape \(9, .*at equal rank and number of experts"),
    ],
)
def test_a_bad_adapter_is_not_swapped_in(
    tiny_moe: Model, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    model = get_peft_model(tiny_moe("VLMoEForConditionalGeneration"), lora())
    model.save_pretrained(tmp_path)
    randomize(model)
    enable_routed_lora(model)
    before = run(model)
    damage(tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=message):
        hotswap_expert_lora(model, str(tmp_path), "default", torch_device="cpu")
    assert_close(run(model), before, 0.0)


def test_switching_is_idempotent_and_leaves_other_models_alone(
    tiny_moe: Model, calls: list[type]
) -> None:
    model, other = (get_peft_model(tiny_moe("MixtralForCausalLM"), lora()) for _ in range(2))
    classes = [type(module) for module in model.modules()]
    for _ in range(2):
        enable_routed_lora(model)
    wrappers = [type(m) for m in model.modules() if isinstance(m, ParamWrapper)]
    assert len(wrappers) == 2 * LAYERS
    assert sum(each is expert_lora.ParamWrapper for each in wrappers) == LAYERS
    assert {each.__name__ for each in wrappers} == {"ParamWrapper"}
    run(other)
    assert not calls
    for _ in range(2):
        disable_routed_lora(model)
    assert [type(module) for module in model.modules()] == classes


def test_copies_and_pickles_stay_routed(tiny_moe: Model, calls: list[type]) -> None:
    model = get_peft_model(tiny_moe("Qwen3MoeForCausalLM"), lora())
    randomize(model)
    enable_routed_lora(model)
    expected = run(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for each in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        calls.clear()
        assert_close(run(each), expected)
        assert len(calls) == LAYERS


def test_what_cannot_be_routed_is_refused_and_nothing_changes(tiny_moe: Model) -> None:
    base = tiny_moe("OlmoeForCausalLM")
    with pytest.raises(ValueError, match=r"has no LoRA on experts.*expert_lora_config"):
        enable_routed_lora(base)
    with pytest.raises(ValueError, match=r"has no LoRA on experts"):
        enable_routed_lora(get_peft_model(base, LoraConfig(target_modules=["q_proj"])))
    biased = get_peft_model(tiny_moe("GptOssForCausalLM"), lora([*BOTH, "experts.down_proj_bias"]))
    with pytest.raises(ValueError, match=r"GptOssExperts has adapters on .*down_proj_bias"):
        enable_routed_lora(biased)
    holder = torch.nn.Module()
    holder.bank = torch.nn.Module()
    holder.bank.weight = torch.nn.Parameter(torch.ones(2, 3, 4))
    unknown = get_peft_model(
        holder, LoraConfig(target_modules=[], target_parameters=["bank.weight"])
    )
    with pytest.raises(ValueError, match=r"bank: Module is no bank of experts"):
        enable_routed_lora(unknown)
    for model in (biased, unknown):
        assert not any(isinstance(m, expert_lora.ParamWrapper) for m in model.modules())


def hook_on_bank(bank: torch.nn.Module, wrapper: torch.nn.Module) -> None:
    bank.register_forward_hook(lambda *_: None)


def hook_on_inner_wrapper(bank: torch.nn.Module, wrapper: torch.nn.Module) -> None:
    wrapper.base_layer.register_forward_pre_hook(lambda *_: None)


def backward_hook_on_bank(bank: torch.nn.Module, wrapper: torch.nn.Module) -> None:
    bank.register_full_backward_hook(lambda *_: None)


def backward_pre_hook_on_inner_wrapper(bank: torch.nn.Module, wrapper: torch.nn.Module) -> None:
    wrapper.base_layer.register_full_backward_pre_hook(lambda *_: None)


def accelerates_hook_on_bank(bank: torch.nn.Module, wrapper: torch.nn.Module) -> None:
    add_hook_to_module(bank, AlignDevicesHook(execution_device="cpu"))


def trainable_base(bank: torch.nn.Module, wrapper: torch.nn.Module) -> None:
    bank.down_proj.requires_grad_(True)


def expert_parallel(bank: torch.nn.Module, wrapper: torch.nn.Module) -> None:
    bank._is_expert_parallel = True


def distributed_tensors(bank: torch.nn.Module, wrapper: torch.nn.Module) -> None:
    mesh = init_device_mesh("cpu", (1,))
    for module in wrapper.modules():
        for name, old in list(module.named_parameters(recurse=False)):
            new = distribute_tensor(old.detach(), mesh, [Replicate()])
            setattr(module, name, torch.nn.Parameter(new, requires_grad=old.requires_grad))
    whole = [Replicate()]
    wrapper.register_forward_pre_hook(
        lambda module, args: tuple(DTensor.from_local(each, mesh, whole) for each in args)
    )
    wrapper.register_forward_hook(lambda module, args, output: output.full_tensor())


# What may fall back to PEFT's own forward, and what the log says. Parameters without data are
# refused: see `test_weights_without_data_are_refused_before_anything_is_computed`.
FALLBACKS: dict[Callable[..., None], str] = {
    hook_on_bank: "VLMoEExperts has hooks",
    hook_on_inner_wrapper: "ParamWrapper has hooks",
    backward_hook_on_bank: "VLMoEExperts has hooks",
    backward_pre_hook_on_inner_wrapper: "ParamWrapper has hooks",
    accelerates_hook_on_bank: "VLMoEExperts has hooks",
    trainable_base: "the base weights are trainable",
    expert_parallel: "the experts are spread over ranks",
    distributed_tensors: "a parameter is a DTensor",
}


@pytest.fixture
def one_rank() -> Iterator[None]:
    """A process group without other processes; plain tensors count as replicated."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    with implicit_replication():
        yield
    dist.destroy_process_group()


def whole(tensors: Tensors) -> Tensors:
    return {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in tensors.items()}


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("change", FALLBACKS)
def test_fallbacks_run_pefts_forward_and_say_why_once(
    tiny_moe: Model,
    calls: list[type],
    change: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = get_peft_model(tiny_moe("VLMoEForConditionalGeneration", "batched_mm"), lora())
    randomize(model)
    wrapper = model.base_model.model.model.language_model.layers[1].mlp.experts
    change(wrapper.get_base_layer(), wrapper)
    reference = whole(run(model))
    enable_routed_lora(model)
    logged: list[str] = []
    monkeypatch.setattr(expert_lora.logger, "warning_once", logged.append)
    assert_close(whole(run(model)), reference)
    assert len(calls) == LAYERS - 1
    assert [FALLBACKS[change] in line for line in logged] == [True]


def test_weights_without_data_are_refused_before_anything_is_computed(
    tiny_moe: Model, calls: list[type]
) -> None:
    model = get_peft_model(tiny_moe("VLMoEForConditionalGeneration"), lora())
    enable_routed_lora(model)
    wrapper = model.base_model.model.model.language_model.layers[0].mlp.experts
    wrapper.get_base_layer().to("meta")
    with pytest.raises(ValueError, match=r"gate_up_proj has no data.*needs the experts in memory"):
        run(model)
    assert not calls


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offloaded_experts_are_refused_before_and_after_injection(
    tiny_moe: Model, tmp_path: Path, where: str
) -> None:
    model = tiny_moe("Qwen3MoeForCausalLM")
    model.save_pretrained(tmp_path / "model")
    names = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"]
    places = dict.fromkeys([*names, *(f"model.layers.{i}" for i in range(LAYERS))], "cpu")
    places["model.layers.1"] = "disk"
    base = type(model).from_pretrained(
        tmp_path / "model",
        device_map=None if where == "cpu" else places,
        offload_folder=tmp_path / "offload",
    )
    if where == "cpu":
        cpu_offload(base, execution_device="cpu")
    layer = 0 if where == "cpu" else 1
    assert base.model.layers[layer].mlp.experts.down_proj.is_meta
    assert torch.allclose(base(input_ids=INPUT_IDS).logits, model(input_ids=INPUT_IDS).logits)
    name = rf"model\.layers\.{layer}\.mlp\.experts\.gate_up_proj is offloaded.*experts in memory"
    with pytest.raises(ValueError, match=name):
        expert_lora_config(base)
    injected = get_peft_model(base, lora())  # by PEFT alone
    with pytest.raises(ValueError, match=r"experts.*_proj is offloaded.*experts in memory"):
        enable_routed_lora(injected)
    assert not any(isinstance(each, expert_lora.ParamWrapper) for each in injected.modules())


def test_hooks_on_the_outermost_wrapper_run_and_it_stays_routed(
    tiny_moe: Model, compare: Callable[..., Tensors]
) -> None:
    model = get_peft_model(tiny_moe("VLMoEForConditionalGeneration"), lora())
    randomize(model)
    seen: list[torch.Size] = []
    wrapper = model.base_model.model.model.language_model.layers[1].mlp.experts
    wrapper.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    compare(model)
    assert seen[0] == seen[1] and len(seen) == 2

"""The proximal step of the group lasso: its closed form, its unit, its zeros, and resuming."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

from vlmoe import VLMoEForConditionalGeneration, VLMoEProcessor, VLMoETrainer
from vlmoe.routing.neuron_banks import NeuronBank, neuron_banks
from vlmoe.training.group_lasso import HALF_STEPS, GroupLasso, shrink

STEPS = 6


def bank_of(dtype: torch.dtype) -> NeuronBank:
    """Three experts of five neurons; one is shorter than the rest, one is zero."""
    torch.manual_seed(0)
    gate_up, down = torch.randn(3, 10, 4).to(dtype), torch.randn(3, 4, 5).to(dtype)
    for number, scale in ((1, 0.01), (4, 0.0)):
        gate_up[0, number] *= scale
        gate_up[0, 5 + number] *= scale
        down[0, :, number] *= scale
    return NeuronBank("bank", nn.Parameter(gate_up), nn.Parameter(down))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_is_the_closed_form_of_each_neuron(dtype: torch.dtype) -> None:
    bank, length = bank_of(dtype), 0.3
    gate_up, down = bank.gate_up.detach().double(), bank.down.detach().double()
    shrink(bank, length)
    zero = []
    for e in range(3):
        for i in range(5):
            group = torch.cat([gate_up[e, i], gate_up[e, 5 + i], down[e, :, i]])
            factor = max(0.0, 1 - length / group.norm().item()) if group.any() else 0.0
            ours = torch.cat([bank.gate_up[e, i], bank.gate_up[e, 5 + i], bank.down[e, :, i]])
            tolerance = 1e-6 if dtype == torch.float32 else 2**-8
            torch.testing.assert_close(
                ours.detach().double(), group * factor, rtol=tolerance, atol=0
            )
            zero += [(e, i)] if factor == 0 else []
    assert zero == [(0, 1), (0, 4)]
    assert (~bank.alive()).nonzero().tolist() == [[0, 1], [0, 4]]


def scheduled(
    model: nn.Module, callback: GroupLasso, steps: int, schedule: Any = None
) -> list[torch.Tensor]:
    """Take the steps of a run without gradients; return the neurons' norms before and after."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = (schedule or (lambda o: LambdaLR(o, lambda step: 1 - step / steps)))(optimizer)
    state = SimpleNamespace(
        max_steps=steps, global_step=0, stateful_callbacks={}, is_world_process_zero=True
    )
    given: Any = {"args": None, "control": None, "state": state, "model": model}
    given |= {"optimizer": optimizer, "lr_scheduler": scheduler}
    Accelerator(cpu=True)
    norms = [torch.cat([b.norms().flatten() for b in neuron_banks(model)[0]])]
    callback.on_train_begin(**given)
    for _ in range(steps):
        callback.on_optimizer_step(**given)
        scheduler.step()
        state.global_step += 1
    callback.on_train_end(**given)
    return [*norms, torch.cat([b.norms().flatten() for b in neuron_banks(model)[0]])]


@pytest.mark.parametrize("steps", [STEPS, 3 * HALF_STEPS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_share_is_a_length_in_median_norms_over_the_run(
    tiny_model: Any, dtype: torch.dtype, steps: int
) -> None:
    before, after = scheduled(tiny_model().to(dtype), GroupLasso(share=0.5), steps)
    off = before - after
    half = 0.5 * before.median()
    assert off.max().item() == pytest.approx(half.item(), rel=1e-4 if dtype.itemsize == 4 else 0.05)
    strength = 0.5 * before.median().item() / sum(0.1 * (1 - i / steps) for i in range(steps))
    _, same = scheduled(tiny_model().to(dtype), GroupLasso(strength), steps)
    assert torch.equal(same, after)


def trainer(folder: Path, rows: Any, output: Path) -> VLMoETrainer:
    """Train the model of a folder, with Adam, a schedule, and a checkpoint at every second step."""
    arguments = {
        "output_dir": str(output),
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "learning_rate": 5e-3,
        "save_strategy": "steps",
        "save_steps": 2,
        "save_total_limit": None,
        "report_to": "none",
        "use_cpu": True,
    }
    model = VLMoEForConditionalGeneration.from_pretrained(folder)
    return VLMoETrainer(
        model,
        arguments,
        train_dataset=rows,
        processing_class=VLMoEProcessor.from_pretrained(folder),
        callbacks=[GroupLasso(share=1.1)],
    )


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    return [{"question": f"what is {n}?", "answer": f"it is {n}"} for n in range(6)]


def test_neurons_become_and_stay_zero_and_a_resumed_run_ends_with_the_same_bits(
    model_folder: Path, rows: Any, tmp_path: Path
) -> None:
    whole = trainer(model_folder, rows, tmp_path)
    before = {name: p.detach().clone() for name, p in whole.model.named_parameters()}
    whole.train()
    alive = torch.cat([bank.alive().flatten() for bank in neuron_banks(whole.model)[0]])
    assert 0.3 < (~alive).float().mean() < 1
    for name, parameter in whole.model.named_parameters():
        if before[name].any() and "experts." not in name:
            assert parameter.any(), name
    resumed = trainer(model_folder, rows, tmp_path / "again")
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    one, other = (
        load_file(folder / f"checkpoint-{STEPS}" / "model.safetensors")
        for folder in (tmp_path, tmp_path / "again")
    )
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_it_finds_the_experts_of_native_models(tiny_moe: Any) -> None:
    model = tiny_moe("OlmoeForCausalLM")
    banks, others = neuron_banks(model)
    assert len(banks) == model.config.num_hidden_layers and not others
    _, after = scheduled(model, GroupLasso(share=2.0), STEPS)
    assert not after.any()
    assert neuron_banks(tiny_moe("GptOssForCausalLM"))[0] == []


@pytest.mark.parametrize(
    ("given", "facts"),
    [
        ({}, "one of `strength` and `share`"),
        ({"strength": 1.0, "share": 1.0}, "one of"),
        ({"strength": 0.0}, "strength.*0.0"),
        ({"share": float("nan")}, "share.*nan"),
    ],
)
def test_values_that_shrink_nothing_are_refused(given: dict[str, float], facts: str) -> None:
    with pytest.raises(ValueError, match=facts):
        GroupLasso(**given)


def test_what_it_cannot_shrink_is_refused(tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"ReduceLROnPlateau.*strength"):
        scheduled(tiny_model(), GroupLasso(share=1.0), STEPS, ReduceLROnPlateau)
    adapted = get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"no experts to shrink: .*experts.*frozen"):
        scheduled(adapted, GroupLasso(1.0), STEPS)
    monkeypatch.setitem(PartialState._shared_state, "distributed_type", DistributedType.FSDP)
    with pytest.raises(ValueError, match=r"FSDP.*all-reduce"):
        GroupLasso(1.0).on_train_begin(*(None,) * 3, model=tiny_model())  # type: ignore[arg-type]

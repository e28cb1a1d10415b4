"""A run on transformers' own sparse models that is resumed ends bit-equal; Trainer's does not."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from fsdp_ranks import fsdp2_of, is_sharded, shard_on_cpus
from peft import LoraConfig, get_peft_model
from ranks import on_ranks
from safetensors.torch import load_file, save_file
from sparse_families import FAMILIES, FamilyCollator, row, sparse_family
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from vlmoe.training.strict_resume import StrictResumeMixin, load_weights_in_place

FAST = ("mixtral", "qwen3_moe", "glm4v_moe", "qwen3_vl_moe", "gemma4", "llava_qwen3_moe")
EVERY = (*FAMILIES, "llava_dense")
NOT_LOADED = {
    "mixtral": (6, 21),
    "qwen3_moe": (4, 25),
    "qwen2_moe": (4, 35),
    "olmoe": (4, 25),
    "granitemoe": (6, 21),
    "gpt_oss": (0, 37),
    "deepseek_v3": (2, 31),
    "lfm2_moe": (4, 24),
    "qwen3_vl_moe": (0, 64),
    "qwen3_5_moe": (4, 69),
    "glm4v_moe": (2, 58),
    "ernie4_5_vl_moe": (67, 71),
    "minimax_m3_vl": (70, 70),
    "gemma4": (0, 76),
    "llava_qwen3_moe": (68, 68),
    "internvl_qwen3_moe": (65, 65),
    "llava_dense": (68, 68),
}
"""Tensors that plain Trainer leaves as they are when it resumes, of all."""

STEPS, RESUMED_FROM = 4, 2


class StrictTrainer(StrictResumeMixin, Trainer):
    """Under test."""


class MoveBias(TrainerCallback):
    """Changes every selection bias after each step, by numbers of the step."""

    def on_optimizer_step(self, args: Any, state: Any, *more: Any, **kwargs: Any) -> None:
        """Add the step's number to each."""
        tensors: PreTrainedModel = kwargs["model"]
        for name, bias in [*tensors.named_buffers(), *tensors.named_parameters()]:
            if name.endswith(("e_score_correction_bias", "expert_bias")):
                bias.data.add_(torch.arange(bias.shape[-1]) * (state.global_step + 1) / 100)


def families(names: Iterable[str]) -> list[Any]:
    """Mark those that are not `FAST` as slow."""
    return [pytest.param(n, marks=[] if n in FAST else pytest.mark.slow) for n in names]


def run(
    kind: type[Trainer], name: str, model: torch.nn.Module, output: Path, **more: Any
) -> Trainer:
    """Train a few steps, with a checkpoint after each second one."""
    resume = more.pop("resume", None)
    arguments = TrainingArguments(
        output_dir=str(output),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        save_steps=RESUMED_FROM,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        use_cpu=True,
        **more,
    )
    if arguments.fsdp:
        arguments = shard_on_cpus(arguments)
    images = int(bool(arguments.fsdp))
    rows = [row(6 + n, 3 + n % 3, n, images) for n in range(6)]
    trainer = kind(
        model,
        arguments,
        FamilyCollator(name),
        train_dataset=rows,
        eval_dataset=rows[:2],
        callbacks=[MoveBias()],
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def different(ours: torch.nn.Module, theirs: torch.nn.Module) -> list[str]:
    """Name the tensors that are not equal bit for bit."""
    own, other = ours.state_dict(), theirs.state_dict()
    assert own.keys() == other.keys()
    return [name for name, tensor in own.items() if not torch.equal(tensor, other[name])]


@pytest.mark.parametrize("name", families(EVERY))
def test_a_resumed_run_ends_with_the_weights_of_the_one_that_was_never_killed(
    name: str, tmp_path: Path
) -> None:
    whole = run(StrictTrainer, name, sparse_family(name), tmp_path / "whole")
    checkpoint = tmp_path / "whole" / f"checkpoint-{RESUMED_FROM}"
    fresh = sparse_family(name, seed=1)  # nothing is right by chance
    parameters = {n: id(p) for n, p in fresh.named_parameters()}
    resumed = run(StrictTrainer, name, fresh, tmp_path / "resumed", resume=str(checkpoint))
    assert different(resumed.model, whole.model) == []
    assert {n: id(p) for n, p in fresh.named_parameters()} == parameters
    files = [tmp_path / each / f"checkpoint-{STEPS}" for each in ("whole", "resumed")]
    ours, theirs = (load_file(folder / "model.safetensors") for folder in files)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("name", families(NOT_LOADED))
def test_plain_trainer_leaves_tensors_of_these_families_as_they_are(
    name: str, tmp_path: Path
) -> None:
    saved, fresh = sparse_family(name), sparse_family(name, seed=1)
    for model in (saved, fresh):  # every tensor differs, constants included
        for tensor in model.state_dict().values():
            tensor.add_(torch.randn_like(tensor.float()).to(tensor.dtype))
    saved.save_pretrained(tmp_path)
    before = {key: tensor.clone() for key, tensor in fresh.state_dict().items()}
    arguments = TrainingArguments(output_dir=str(tmp_path / "run"), report_to=[], use_cpu=True)
    Trainer(fresh, arguments)._load_from_checkpoint(str(tmp_path))
    after = fresh.state_dict()
    left = [key for key, tensor in before.items() if torch.equal(tensor, after[key])]
    assert (len(left), len(before)) == NOT_LOADED[name]
    load_weights_in_place(fresh, tmp_path)
    assert different(fresh, saved) == []


def test_the_best_model_is_loaded_whole(tmp_path: Path) -> None:
    worst = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": RESUMED_FROM}
    worst |= {"metric_for_best_model": "eval_loss", "greater_is_better": True}
    trainer = run(StrictTrainer, "mixtral", sparse_family("mixtral"), tmp_path, **worst)
    first = tmp_path / f"checkpoint-{RESUMED_FROM}"
    assert trainer.state.best_model_checkpoint == str(first)
    loaded = sparse_family("mixtral", seed=1)
    load_weights_in_place(loaded, first)
    assert different(trainer.model, loaded) == []


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shards_and_tied_weights_are_loaded_in_place(
    tied: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    saved, fresh = (
        sparse_family("deepseek_v3", seed, tie_word_embeddings=tied).to(dtype) for seed in (0, 1)
    )
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    for model in (saved, fresh):  # fp32 beside bf16, as from_pretrained keeps it
        model.get_submodule(bias.rpartition(".")[0]).e_score_correction_bias = torch.zeros(4)
    saved.get_buffer(bias).add_(torch.rand(4))
    saved.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) >= 2
    own = fresh.state_dict(keep_vars=True)
    load_weights_in_place(fresh, tmp_path)
    assert different(fresh, saved) == []
    assert fresh.get_buffer(bias).dtype == torch.float32
    assert all(fresh.state_dict(keep_vars=True)[name] is tensor for name, tensor in own.items())
    assert (fresh.lm_head.weight is fresh.model.embed_tokens.weight) == tied


def test_pickled_weights_are_loaded(tmp_path: Path) -> None:
    saved, fresh = sparse_family("llava_qwen3_moe"), sparse_family("llava_qwen3_moe", seed=1)
    saved.save_pretrained(tmp_path)
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    load_weights_in_place(fresh, tmp_path)
    assert different(fresh, saved) == []


def damage_missing(weights: dict[str, torch.Tensor]) -> None:
    """Lose a router."""
    del weights["model.layers.1.block_sparse_moe.gate.weight"]


def damage_unexpected(weights: dict[str, torch.Tensor]) -> None:
    """Add a layer."""
    weights["model.layers.2.mlp.gate.weight"] = torch.zeros(4, 32)


def damage_shape(weights: dict[str, torch.Tensor]) -> None:
    """Widen a norm."""
    weights["model.norm.weight"] = torch.zeros(33)


def damage_expert(weights: dict[str, torch.Tensor]) -> None:
    """Lose one expert of the bank."""
    for matrix in ("w1", "w2", "w3"):
        del weights[f"model.layers.0.block_sparse_moe.experts.3.{matrix}.weight"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_missing, r"1 missing \(model\.layers\.1\.mlp\.gate\.weight\)"),
        (damage_unexpected, r"1 unexpected \(model\.layers\.2\.mlp\.gate\.weight\)"),
        (damage_shape, r"of another shape \(model\.norm\.weight is \(33,\), .* needs \(32,\)"),
        (damage_expert, r"2 of another shape \(model\.layers\.0\.mlp\.experts\.down_proj is \(3,"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_by_name_and_nothing_is_loaded(
    damage: Any, message: str, tmp_path: Path
) -> None:
    model = sparse_family("mixtral", seed=1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    own = model.state_dict(keep_vars=True)
    sparse_family("mixtral").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    damage(weights)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=message):
        load_weights_in_place(model, tmp_path)
    after = model.state_dict(keep_vars=True)
    assert all(after[name] is tensor for name, tensor in own.items())
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no weights"):
        load_weights_in_place(sparse_family("mixtral"), tmp_path)


def with_adapters(seed: int, rank: int = 4) -> torch.nn.Module:
    """A model with LoRA on its attention and experts, and a trained copy of its routers."""
    adapters = LoraConfig(
        r=rank,
        target_modules=["q_proj", "v_proj"],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
        modules_to_save=["gate"],
        init_lora_weights=False,
    )
    base = sparse_family("mixtral")
    torch.manual_seed(seed)
    return get_peft_model(base, adapters)


def test_adapters_are_resumed_whole(tmp_path: Path) -> None:
    whole = run(StrictTrainer, "mixtral", with_adapters(0), tmp_path / "whole")
    checkpoint = tmp_path / "whole" / f"checkpoint-{RESUMED_FROM}"
    assert not (checkpoint / "model.safetensors").exists()
    resume = str(checkpoint)
    resumed = run(StrictTrainer, "mixtral", with_adapters(1), tmp_path / "on", resume=resume)
    assert different(resumed.model, whole.model) == []

    with pytest.raises(ValueError, match=r"of another shape .* is \(4, 32\), the model needs \(2,"):
        run(StrictTrainer, "mixtral", with_adapters(1, rank=2), tmp_path / "on", resume=resume)
    file = checkpoint / "adapter_model.safetensors"
    weights = load_file(file)
    lost = next(name for name in weights if name.endswith("gate.weight"))
    del weights[lost]
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(ValueError, match=rf"1 missing \({lost}\)".replace(".", r"\.")):
        run(StrictTrainer, "mixtral", with_adapters(1), tmp_path / "on", resume=resume)


def run_on_a_rank(folder: Path, way: str) -> dict[str, torch.Tensor]:
    """Return the tensors in which a resumed run ends otherwise than the whole one."""
    more: dict[str, Any] = {}
    # FSDP resumes an optimizer only if each parameter had a gradient; LLaVA's last layer has none
    family = "llava_qwen3_moe" if way == "DDP" else "qwen3_vl_moe"
    if way != "DDP":
        more = fsdp2_of(family, state_dict_type=f"{way.split()[1]}_STATE_DICT")
    ends = []
    for seed, output, resume in ((0, "whole", None), (1, "resumed", "whole")):
        checkpoint = resume and str(folder / resume / f"checkpoint-{RESUMED_FROM}")
        trainer = run(
            StrictTrainer,
            family,
            sparse_family(family, seed),
            folder / output,
            resume=checkpoint,
            ddp_find_unused_parameters=True if way == "DDP" else None,
            **more,
        )
        assert is_sharded(trainer) == (way != "DDP")
        state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
        ends.append({name.removeprefix("module."): t.clone() for name, t in state.items()})
    assert ends[0].keys() == ends[1].keys()
    return {
        name: tensor for name, tensor in ends[0].items() if not torch.equal(tensor, ends[1][name])
    }


@pytest.mark.slow
@pytest.mark.parametrize("way", ["DDP", "FSDP2 SHARDED", "FSDP2 FULL"])
def test_a_run_on_two_ranks_is_resumed_whole(way: str, tmp_path: Path) -> None:
    (tmp_path / "ranks").mkdir()
    for different_on_rank in on_ranks(run_on_a_rank, tmp_path, way, folder=tmp_path / "ranks"):
        assert different_on_rank == {}
    if way == "FSDP2 SHARDED":  # the weights have a file for each rank
        return
    files = [tmp_path / each / f"checkpoint-{STEPS}" for each in ("whole", "resumed")]
    ours, theirs = (load_file(folder / "model.safetensors") for folder in files)
    assert ours.keys() == theirs.keys() and len(ours) > 50
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_another_version_of_transformers_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(StrictTrainer, "mixtral", sparse_family("mixtral"), tmp_path)
    checkpoint = tmp_path / f"checkpoint-{RESUMED_FROM}"
    config = checkpoint / "config.json"
    config.write_text(re.sub(r'(transformers_version": ")[^"]+', r"\g<1>5.0.0", config.read_text()))
    run(StrictTrainer, "mixtral", sparse_family("mixtral"), tmp_path, resume=str(checkpoint))
    assert "was written by transformers 5.0.0" in caplog.text


def test_the_table_of_the_docs_is_that_of_these_tests() -> None:
    page = Path(__file__).parents[2] / "docs" / "how-to" / "train_native.md"
    rows = re.findall(r"^\| `(\w+)` \| (\d+) \| (\d+) \|$", page.read_text(), re.MULTILINE)
    assert {name: (int(left), int(every)) for name, left, every in rows} == NOT_LOADED

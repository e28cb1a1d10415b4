"""`VLMoETrainer` on transformers' own sparse models over two ranks, by DDP and by FSDP2."""

from pathlib import Path
from typing import Any

import pytest
import torch
from builders import assistant, picture, row, user
from fsdp_ranks import fsdp2_of, is_sharded, shard_on_cpus
from native_processors import tiny_processor
from ranks import WORLD_SIZE, on_ranks
from safetensors.torch import load_file
from sparse_families import sparse_family

from vlmoe import VLMoETrainer
from vlmoe.training.arguments import training_arguments

pytestmark = pytest.mark.slow
ROWS = 4
WAYS = ("DDP", "FSDP2 FULL", "FSDP2 SHARDED")
PICTURES = {"DDP": 2}
"""Rows with a picture; FSDP2 needs one in each batch, so that all ranks gather the tower."""


def rows(pictures: int) -> list[dict[str, Any]]:
    """Answers of several lengths; only the first rows have a picture."""
    answers = ("red", "a blue one", "no", "it is green and round")
    return [
        row(
            user(f"color {i}?", int(i < pictures)),
            assistant(answer),
            images=[picture(i)] if i < pictures else [],
        )
        for i, answer in enumerate(answers)
    ]


def trainer_of(
    family: str, output: Path, way: str = "", seed: int = 0, pictures: int = ROWS, **values: Any
) -> VLMoETrainer:
    arguments = {
        "output_dir": str(output),
        "max_steps": 1,
        "learning_rate": 0.1,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "max_grad_norm": 0.0,
        "train_sampling_strategy": "sequential",
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "per_device_train_batch_size": 1,
    }
    if way.startswith("FSDP2"):
        values |= fsdp2_of(family, state_dict_type=f"{way.split()[1]}_STATE_DICT")
    prepared = training_arguments(**arguments | values)
    return VLMoETrainer(
        sparse_family(family, seed),
        shard_on_cpus(prepared) if prepared.fsdp else prepared,
        train_dataset=rows(pictures),
        processing_class=tiny_processor(family),
    )


def weights_of(trainer: VLMoETrainer) -> dict[str, torch.Tensor]:
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    return {name.removeprefix("module."): tensor.clone() for name, tensor in state.items()}


def runs_on_a_rank(folder: Path, family: str, way: str) -> dict[str, Any]:
    """Return the weights after a step, and the names of those that a resumed run ends without."""
    pictures = PICTURES.get(way, ROWS)
    batch = ROWS // WORLD_SIZE
    one = trainer_of(
        family, folder / "one", way, pictures=pictures, per_device_train_batch_size=batch
    )
    one.train()
    assert is_sharded(one) == (way != "DDP")
    several = {
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "optim": "adamw_torch",
        "learning_rate": 1e-2,
    }
    whole = trainer_of(family, folder / "whole", way, **several)
    whole.train()
    resumed = trainer_of(family, folder / "resumed", way, seed=1, **several)
    resumed.train(resume_from_checkpoint=str(folder / "whole" / "checkpoint-2"))
    ends = weights_of(whole), weights_of(resumed)
    assert ends[0].keys() == ends[1].keys()
    lost = [name for name, tensor in ends[0].items() if not torch.equal(tensor, ends[1][name])]
    return {"step": weights_of(one), "lost": lost}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", ["qwen3_vl_moe"])
def test_two_ranks_make_the_step_of_one_and_resume_it_whole(
    family: str, way: str, tmp_path: Path
) -> None:
    (tmp_path / "ranks").mkdir()
    ranks = on_ranks(runs_on_a_rank, tmp_path, family, way, folder=tmp_path / "ranks")
    assert [rank["lost"] for rank in ranks] == [[]] * WORLD_SIZE
    pictures = PICTURES.get(way, ROWS)
    alone = trainer_of(
        family, tmp_path / "alone", pictures=pictures, per_device_train_batch_size=ROWS
    )
    before = {name: tensor.clone() for name, tensor in alone.model.state_dict().items()}
    alone.train()
    after = alone.model.state_dict()
    ours = ranks[0]["step"]
    assert ours.keys() == after.keys()
    for name, expected in after.items():
        moved = (expected - before[name]).norm()
        rounding = 1e-7 * expected.norm()  # of weights near 1 in fp32
        assert (ours[name] - expected).norm() <= 1e-5 * moved + rounding, name
    if way == "FSDP2 SHARDED":  # the weights have a file for each rank
        return
    files = [tmp_path / each / "checkpoint-4" for each in ("whole", "resumed")]
    saved, again = (load_file(folder / "model.safetensors") for folder in files)
    assert saved.keys() == again.keys() and len(saved) > 20
    assert all(torch.equal(saved[name], again[name]) for name in saved)


def refused_on_a_rank(folder: Path) -> str:
    with pytest.raises(ValueError) as raised:
        trainer_of("qwen3_vl_moe", folder, "FSDP2 FULL", pictures=2)
    return str(raised.value)


def test_fsdp_refuses_rows_without_a_picture(tmp_path: Path) -> None:
    """Ranks with a picture would wait for those without, which do not run the vision tower."""
    (tmp_path / "ranks").mkdir()
    for message in on_ranks(refused_on_a_rank, tmp_path, folder=tmp_path / "ranks"):
        assert (
            "'train_dataset[2]'" in message
            and "has no image" in message
            and "DistributedDataParallel" in message
        )

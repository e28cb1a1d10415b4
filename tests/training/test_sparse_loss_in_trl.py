"""`SparseLoss` in TRL's SFTTrainer makes the updates that it makes in plain `Trainer`."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from native_processors import tiny_processor
from sparse_families import FamilyCollator, row, sparse_family
from transformers import Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from vlmoe import SparseLoss

ARGUMENTS: dict[str, Any] = {
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "learning_rate": 0.1,
    "lr_scheduler_type": "constant",
    "optim": "sgd",
    "max_grad_norm": 0.0,
    "train_sampling_strategy": "sequential",
    "remove_unused_columns": False,
    "save_strategy": "no",
    "logging_steps": 1,
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
}


class Rows:
    """Collates rows that are named by number: TRL takes a `Dataset`, whose tensors are lists."""

    def __init__(self, family: str):
        self.collate = FamilyCollator(family)
        images = int(family == "qwen3_vl_moe")
        self.rows = [row(6 + 3 * n, 2 + n % 3, n, images) for n in range(4)]

    def __call__(self, batch: list[dict[str, int]]) -> dict[str, torch.Tensor]:
        """Return the inputs of the numbered rows."""
        return self.collate([self.rows[each["number"]] for each in batch])


@pytest.mark.parametrize("family", ["mixtral", "qwen3_vl_moe"])
def test_an_update_is_that_of_plain_trainer(family: str, tmp_path: Path) -> None:
    numbers, losses, weights = Dataset.from_dict({"number": range(4)}), [], []
    before = sparse_family(family).state_dict()
    for in_trl in (False, True):
        model = sparse_family(family)
        common = {"train_dataset": numbers, "data_collator": Rows(family)}
        common["compute_loss_func"] = SparseLoss(model, balance=1.0, z=0.1)
        given = ARGUMENTS | {"output_dir": str(tmp_path)}
        if in_trl:
            skip = {"dataset_kwargs": {"skip_prepare_dataset": True}}
            arguments = SFTConfig(**given | skip, activation_checkpointing=False, bf16=False)
            processor = tiny_processor(family)
            trainer = SFTTrainer(model, arguments, processing_class=processor, **common)
        else:
            trainer = Trainer(model, TrainingArguments(**given), **common)
        trainer.train()
        losses.append([each["loss"] for each in trainer.state.log_history if "loss" in each])
        weights.append(model.state_dict())
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    for name, expected in weights[0].items():
        moved = (expected - before[name]).norm()
        rounding = 1e-7 * expected.norm()
        assert (weights[1][name] - expected).norm() <= 1e-5 * moved + rounding, name
    router = next(name for name in before if name.endswith("gate.weight"))
    assert not torch.equal(weights[0][router], before[router])

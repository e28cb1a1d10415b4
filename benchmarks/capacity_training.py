# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Training and questioning of the capacity benchmark's arms, through the package's trainer.

The vision tower and connector learn to see once, on random emblems; then the tower is frozen, the
same for all arms and seeds. Every arm is trained by the same recipe, but for its learning rate.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from capacity_arms import ARMS, TWIN, Arm, config_of
from capacity_data import EncodedBatches, prepare_perception, single
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, set_seed
from upcycling_training import StepTimes, times

from vlmoe import VLMoEForConditionalGeneration, VLMoEProcessor, record_routing
from vlmoe.hub.provenance import saved_json
from vlmoe.routing.record import has_experts
from vlmoe.training.arguments import training_arguments
from vlmoe.training.trainer import VLMoETrainer

RATES = (0.006, 0.012, 0.024, 0.048, 0.096, 0.192)
EVALUATION_ROWS = 1024
EYES = ("model.vision_tower.", "model.multi_modal_projector.")


@dataclass(frozen=True)
class Recipe:
    """Numbers of the training, the same for every arm."""

    steps: int = 600
    see_steps: int = 800
    see_rate: float = 4e-3
    warmup_steps: int = 100

    def shortened(self, steps: int) -> "Recipe":
        """Return the same recipe with at most so many steps of every kind."""
        return replace(self, steps=min(steps, self.steps), see_steps=min(steps, self.see_steps))


def train(
    model: PreTrainedModel,
    processor: VLMoEProcessor,
    batches: EncodedBatches,
    rate: float,
    seed: int,
    recipe: Recipe,
    folder: Path,
) -> dict[str, float]:
    """Train on every batch once; return the times of the steps and the last training loss.

    Args:
        model: changed in place.
        processor: of the model.
        batches: in their order.
        rate: highest learning rate; it falls linearly to zero.
        seed: of the trainer.
        recipe: of the benchmark.
        folder: for the trainer; nothing is saved there.
    """
    arguments = training_arguments(
        output_dir=str(folder),
        max_steps=len(batches),
        per_device_train_batch_size=1,
        learning_rate=rate,
        lr_scheduler_type="linear",
        warmup_steps=min(recipe.warmup_steps, len(batches) // 2),
        adam_beta2=0.98,
        max_grad_norm=1.0,
        weight_decay=0.0,
        logging_steps=min(50, len(batches)),
        save_strategy="no",
        eval_strategy="no",
        seed=seed,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        train_sampling_strategy="sequential",
    )
    trainer = VLMoETrainer(
        model,
        arguments,
        train_dataset=batches,
        data_collator=single,
        processing_class=processor,
    )
    trainer.add_callback(StepTimes())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {**times(trainer.state.log_history), "last_loss": losses[-1]}


def learn_to_see(
    processor: VLMoEProcessor, recipe: Recipe, folder: Path
) -> dict[str, torch.Tensor]:
    """Return the weights of tower and connector after they have learned to see, once."""
    file = folder / "eyes.safetensors"
    if not file.exists():
        data = prepare_perception(recipe.see_steps, processor, folder / "perception")
        set_seed(0)
        model = VLMoEForConditionalGeneration(config_of(ARMS[TWIN]))
        batches = EncodedBatches(data)
        train(model, processor, batches, recipe.see_rate, 0, recipe, folder / "see")
        weights = {n: w.clone() for n, w in model.state_dict().items() if n.startswith(EYES)}
        save_file(weights, staging := folder / ".eyes.safetensors")
        staging.rename(file)
    return load_file(file)


def run_folder(output_dir: Path, study: str, name: str, seed: int, rate: float) -> Path:
    """Return the folder of a run."""
    return output_dir / study / str(seed) / name / str(rate)


def grid(output_dir: Path, study: str, name: str) -> dict[float, float]:
    """Return the accuracy of every rate on validation phrasings of seed 0.

    Raises:
        FileNotFoundError: the grid has not run to its end.
    """
    found = {}
    for rate in RATES:
        result = saved_json(run_folder(output_dir, study, name, 0, rate) / "result.json")
        if result is None:
            raise FileNotFoundError(
                f"{study}: {name} has not run with rate {rate} on seed 0, which chooses the rate."
            )
        found[rate] = result["accuracy"]["facts-validation"]
    return found


def best_rate(accuracies: dict[float, float]) -> float:
    """Return the rate of a grid with the best accuracy."""
    return max(accuracies, key=lambda rate: accuracies[rate])


def new_model(arm: Arm, seed: int, eyes: dict[str, torch.Tensor]) -> PreTrainedModel:
    """Return the arm's model: new weights but for tower and connector; the tower is frozen."""
    set_seed(seed)
    model = VLMoEForConditionalGeneration(config_of(arm))
    model.load_state_dict(eyes, strict=False)
    return freeze(model)


def upcycled_model(arm: Arm, seed: int, start: Path) -> PreTrainedModel:
    """Return the model that an arm starts from: a trained dense one, or its upcycled form."""
    if arm.upcycling is None:
        model = VLMoEForConditionalGeneration.from_pretrained(start)
    else:
        model = VLMoEForConditionalGeneration.from_dense(str(start), seed=seed, **arm.upcycling)
        for name, value in arm.balance.items():
            setattr(model.config.text_config, name, value)
    return freeze(model.train())


def freeze(model: PreTrainedModel) -> PreTrainedModel:
    model.model.vision_tower.requires_grad_(False)
    return model


@torch.no_grad()
def right_answers(model: PreTrainedModel, batches: EncodedBatches) -> torch.Tensor:
    """Return for each row whether the most likely tokens are those of its answer: (rows,) bool.

    An answer of several tokens counts where each is the most likely one after those before it,
    which is when greedy decoding gives the answer.
    """
    model.eval()
    (batch,) = batches
    parts = []
    for start in range(0, len(batch["input_ids"]), EVALUATION_ROWS):
        rows = {name: value[start : start + EVALUATION_ROWS] for name, value in batch.items()}
        labels = rows.pop("labels")[:, 1:]
        guesses = model(**rows).logits[:, :-1].argmax(-1)
        parts.append(((guesses == labels) | (labels == -100)).all(-1))
    return torch.cat(parts)


def worst_load(model: PreTrainedModel, batches: EncodedBatches) -> float:
    """Return the busiest expert's tokens over the mean, on questions; 1 for a dense model."""
    if not has_experts(model):
        return 1.0
    (batch,) = batches
    rows = {name: value[:EVALUATION_ROWS] for name, value in batch.items() if name != "labels"}
    with torch.no_grad(), record_routing(model, choices=False) as record:
        model(**rows)
    return record.load.as_dict()["max_over_mean"][0]


def answers(model: PreTrainedModel, folder: Path, shown: str) -> dict[str, Any]:
    """Return the right answers of each set of questions, as text of 0 and 1."""
    names = [f"facts-{split}-{shown}" for split in ("train", "validation", "test")]
    if shown == "image":
        names.append("cells-test")
    found = {}
    for name in names:
        right = right_answers(model, EncodedBatches(folder / name))
        found[name.removesuffix(f"-{shown}")] = "".join(str(int(each)) for each in right)
    return found

# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Does a small model learn where things are? One to three objects in unseen scenes, as boxes.

    OMP_NUM_THREADS=1 python benchmarks/detection.py
    OMP_NUM_THREADS=1 python benchmarks/detection.py --scenes scenes_emoji
    OMP_NUM_THREADS=1 python benchmarks/detection.py --steps 4 --test_scenes 4 \\
        --output_dir outputs/try --results outputs/try/detection.json

The model is `tiny` with an image token for each patch, 64 in all, and a tokenizer with one token
for each coordinate. It is trained from scratch by the package's trainer, three times on each of
24,000 scenes, and evaluated once on the test scenes. A killed training goes on from its last
checkpoint.
"""

import argparse
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from measure import RESULTS, environment
from transformers import set_seed
from transformers.trainer_utils import get_last_checkpoint
from upcycling import check_same
from upcycling_training import StepTimes, one_thread, times

from vlmoe import VLMoEConfig, VLMoEForConditionalGeneration, VLMoEProcessor, evaluate
from vlmoe.data.box_tokenizer import box_tokenizer
from vlmoe.data.rows import Rows, as_rows
from vlmoe.data.scenes import COLORS, EMOJI, SHAPES, scene_rows
from vlmoe.hub.atomic_files import write_json
from vlmoe.hub.provenance import saved_json
from vlmoe.tasks import task_reader
from vlmoe.training.trainer import VLMoETrainer

TASK = "object-detection"
PROMPT = "find all objects."
GOAL = {"ap50": 0.5, "unparsable": 0.01}


@dataclass(frozen=True)
class Recipe:
    """Numbers of the training; the rate rises, then falls linearly to zero."""

    scenes: str = "scenes"
    steps: int = 2300
    distinct: int = 24_000
    batch: int = 32
    rate: float = 2e-3
    warmup: int = 100
    seed: int = 0


def detection_rows(recipe: Recipe, split: str, count: int) -> Rows:
    """Return so many scenes of a split as conversations."""
    rows = scene_rows(split, emoji=recipe.scenes == "scenes_emoji", count=count)
    return as_rows(rows, recipe.scenes, task_reader(TASK, PROMPT))


def new_model(recipe: Recipe) -> tuple[VLMoEForConditionalGeneration, VLMoEProcessor]:
    """Return `tiny` with new weights, an image token a patch, and its processor."""
    shapes = [f"{color} {shape}" for color in COLORS for shape in SHAPES]
    labels = EMOJI if recipe.scenes == "scenes_emoji" else shapes
    tokenizer = box_tokenizer([PROMPT, *labels])
    text = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    config = VLMoEConfig.from_preset(
        "tiny",
        pixel_shuffle_factor=1,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        text_config=text,
    )
    set_seed(recipe.seed)
    model = VLMoEForConditionalGeneration(config)
    return model, VLMoEProcessor.for_config(config, tokenizer)


def train(recipe: Recipe, folder: Path) -> dict[str, float]:
    """Train in `folder`, whose `model` holds the result; return the times, unless that is done."""
    done = saved_json(folder / "training.json")
    if done is not None:
        return done
    model, processor = new_model(recipe)
    arguments = {
        "output_dir": str(folder),
        "max_steps": recipe.steps,
        "per_device_train_batch_size": recipe.batch,
        "learning_rate": recipe.rate,
        "lr_scheduler_type": "linear",
        "warmup_steps": min(recipe.warmup, recipe.steps // 2),
        "adam_beta2": 0.98,
        "max_grad_norm": 1.0,
        "weight_decay": 0.0,
        "logging_steps": min(25, recipe.steps),
        "save_strategy": "steps",
        "save_steps": 200,
        "save_total_limit": 1,
        "eval_strategy": "no",
        "report_to": "none",
        "seed": recipe.seed,
        "use_cpu": True,
    }
    trainer = VLMoETrainer(
        model,
        arguments,
        train_dataset=detection_rows(
            recipe, "train", min(recipe.distinct, recipe.steps * recipe.batch)
        ),
        processing_class=processor,
    )
    trainer.add_callback(StepTimes())
    last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    trainer.train(resume_from_checkpoint=last)
    log = trainer.state.log_history
    losses = [entry["loss"] for entry in log if "loss" in entry]
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    result = {**times(log), "last_loss": losses[-1], "losses": losses}
    write_json(folder / "training.json", result)
    return result


def measure(recipe: Recipe, folder: Path, scenes: int) -> dict[str, Any]:
    """Return the figures of the trained model on unseen scenes, and its answers."""
    model = VLMoEForConditionalGeneration.from_pretrained(folder / "model")
    processor = VLMoEProcessor.from_pretrained(folder / "model")
    rows = detection_rows(recipe, "test", scenes)
    evaluation = evaluate(model, processor, rows, task=TASK)
    write_json(folder / "predictions.json", evaluation.predictions)
    return {"exact_match": evaluation.exact_match, **evaluation.metrics}


def main() -> None:
    """Run what is missing, print the figures, write the result."""
    options = parse_options()
    one_thread()
    steps = {"steps": options.steps} if options.steps else {}
    recipe = Recipe(scenes=options.scenes, seed=options.seed, **steps)
    folder = options.output_dir / recipe.scenes / str(recipe.seed)
    check_same(folder / "config.json", asdict(recipe))
    training = train(recipe, folder)
    figures = measure(recipe, folder, options.test_scenes)
    for name, value in figures.items():
        print(f"{name:24}{value:>9.2%}")
    print(f"{'CPU minutes of training':24}{training['cpu_seconds'] / 60:>9.1f}")
    results = saved_json(options.results) or {"goal": GOAL, "runs": {}}
    own = results["runs"].setdefault(recipe.scenes, {})
    own[str(recipe.seed)] = {
        "recipe": asdict(recipe),
        "test_scenes": options.test_scenes,
        "figures": figures,
        "training": training,
        "environment": environment(),
    }
    write_json(options.results, results)
    print(f"Wrote {options.results}")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scenes", choices=("scenes", "scenes_emoji"), default="scenes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help=f"by default {Recipe.steps}")
    parser.add_argument("--test_scenes", type=int, default=500)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/detection"))
    parser.add_argument("--results", type=Path, default=RESULTS / "detection.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()

# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Does upcycling help? A dense model at its plateau is trained on as it is, or with experts.

Sparse and dense models trained from scratch for as long are the controls.

    OMP_NUM_THREADS=1 python benchmarks/upcycling.py
    OMP_NUM_THREADS=1 python benchmarks/upcycling.py --tasks composition --seeds 0 \\
        --arms dense upcycled
    python benchmarks/upcycling.py --report_only
    OMP_NUM_THREADS=1 python benchmarks/upcycling.py --max_images 100 --max_steps 20 \\
        --output_dir outputs/try --results outputs/try/upcycling.json

1. Each seed trains a dense model: first on descriptions of the pictures, so that its vision tower
   learns to see, then on questions until its validation accuracy stands still.
2. From it start the arms "dense, continued" and the upcycled ones; each gets the same further data
   and steps. Arms from scratch go through both stages themselves, with the same steps in all.
3. Every arm answers all test questions, and is compared with "dense, continued".

What a killed run has finished is kept, and a run that was under way goes on from its checkpoint.
"""

import argparse
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

from measure import RESULTS
from transformers.utils import logging
from upcycling_arms import ARMS, PLATEAU, Arm, build, flops_per_token
from upcycling_data import IMAGES, TASKS, prepare
from upcycling_report import report
from upcycling_training import Recipe, learn_to_see, one_thread, times, train_for, train_to_plateau

from vlmoe.data.loading import load_rows
from vlmoe.hub.atomic_files import write_json
from vlmoe.hub.provenance import saved_json
from vlmoe.training.evaluation import Evaluation, evaluate

EVALUATION_BATCH = 256
LENGTH = 32
"""Of a question with its image, about, in tokens: for the operations of attention."""


def run_arm(name: str, seed: int, data: Path, folder: Path, recipe: Recipe) -> dict[str, Any]:
    """Train an arm and let it answer the test questions, unless that is done.

    Args:
        name: one of `ARMS`.
        seed: of weights and of the order of the data.
        data: as `prepare` gives it.
        folder: of the seed; the arm gets one of its name in it.
        recipe: of the training.

    Returns:
        What the arm's result.json holds.
    """
    arm, own = ARMS[name], folder / name
    done = saved_json(own / "result.json")
    if done is not None:
        return done
    plateau = saved_json(folder / PLATEAU / "result.json")
    rows = {
        split: load_rows(str(data / "data"), split, with_images=arm.with_images)
        for split in ("descriptions", "train", "validation", "test")
    }
    model, processor = build(arm, seed, data / "tokenizer", folder / PLATEAU / "model")
    parts = []
    if arm.from_scratch and arm.with_images:
        seen = learn_to_see(model, processor, rows, recipe, own / "see", seed)
        parts.append(times(seen.log_history))
        model = seen.model
    if name == PLATEAU:
        trained = train_to_plateau(model, processor, rows, recipe, own / "model", seed)
    else:
        before = plateau["steps"] if arm.from_scratch and arm.with_images else 0
        steps = before + recipe.further_steps
        trained = train_for(model, processor, rows, recipe, own / "model", seed, steps)
    parts.append(times(trained.log_history))
    model = trained.model.eval()
    answers = evaluate(model, processor, rows["test"], batch_size=EVALUATION_BATCH, progress=True)
    result = describe(arm, model, trained, parts, answers)
    result["accuracy_in_training"] = seen_accuracy(model, processor, rows)
    write_json(own / "result.json", result)
    return result


def seen_accuracy(model: Any, processor: Any, rows: dict[str, Any]) -> float:
    """Measure accuracy on as many training pictures as validation has, to show overfitting.

    Only question types of the test count.
    """
    types = {each for row in rows["test"]["question_type"] for each in row}
    pictures = range(min(len(rows["train"]), len(rows["validation"])))
    asked = rows["train"].select(pictures)
    answers = evaluate(model, processor, asked, batch_size=EVALUATION_BATCH, progress=True)
    records = [each for each in answers.predictions if each["question_type"] in types]
    return statistics.mean(record["correct"] for record in records)


def describe(
    arm: Arm, model: Any, trained: Any, parts: list[dict[str, float]], answers: Evaluation
) -> dict[str, Any]:
    """Gather an arm's accuracy, sizes, costs, and whether each answer is right."""
    records = answers.predictions
    history = [entry for entry in trained.log_history if "eval_exact_match" in entry]
    return {
        "label": arm.label,
        "accuracy": answers.exact_match,
        "accuracy_by_type": answers.exact_match_by_type,
        "count_by_type": answers.count_by_type,
        "parameters": model.active_parameters(),
        "flops_per_token": flops_per_token(model.config.text_config, LENGTH),
        "steps": trained.metrics["steps"],
        "cpu_seconds": sum(part["cpu_seconds"] for part in parts),
        **{key: parts[-1][key] for key in ("step_seconds", "step_cpu_seconds")},
        "validation": [[entry["step"], entry["eval_exact_match"]] for entry in history],
        "images": [record["id"] for record in records],
        "right": "".join(str(int(record["correct"])) for record in records),
    }


def main() -> None:
    """Run what is missing, print the table, write the result."""
    options = parse_options()
    one_thread()
    recipe = Recipe()
    if options.max_steps:
        recipe = recipe.shortened(options.max_steps)
    config = {"recipe": asdict(recipe), "images": IMAGES | {"max": options.max_images}}
    check_same(options.output_dir / "config.json", config)
    runs = [(task, seed) for task in options.tasks for seed in options.seeds]
    arms = [PLATEAU, *(arm for arm in ARMS if arm in options.arms and arm != PLATEAU)]
    bar = logging.tqdm(total=len(runs) * len(arms), desc="arms", unit="arm")
    with bar:
        for task, seed in [] if options.report_only else runs:
            data = prepare(task, options.output_dir / "data" / task, options.max_images)
            for arm in arms:
                bar.set_postfix_str(f"{task}, seed {seed}, {arm}")
                run_arm(arm, seed, data, options.output_dir / task / str(seed), recipe)
                bar.update()
                report(options.output_dir, options.results, config)
    print(report(options.output_dir, options.results, config))


def check_same(file: Path, config: dict[str, Any]) -> None:
    """Refuse to mix runs of different recipes in a folder.

    Raises:
        ValueError: the folder's runs have another recipe.
    """
    found = saved_json(file)
    if found is not None and found != config:
        raise ValueError(
            f"{file.parent} holds runs of another recipe: {found}, not {config}. Choose another "
            "--output_dir, or delete it."
        )
    write_json(file, config)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--max_images", type=int, help="of every split, to try it out")
    parser.add_argument("--max_steps", type=int, help="of every stage, to try it out")
    parser.add_argument("--report_only", action="store_true", help="train nothing")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/upcycling"))
    parser.add_argument("--results", type=Path, default=RESULTS / "upcycling.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()

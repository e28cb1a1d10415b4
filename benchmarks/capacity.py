# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Do experts hold more knowledge at the same compute? Emblems, asked for facts about them.

    OMP_NUM_THREADS=1 python benchmarks/capacity.py
    OMP_NUM_THREADS=1 python benchmarks/capacity.py --studies facts_4096 --seeds 0 \\
        --arms dense_37 experts_16
    python benchmarks/capacity.py --report_only
    OMP_NUM_THREADS=1 python benchmarks/capacity.py --max_steps 4 --seeds 0 \\
        --output_dir outputs/try --results outputs/try/capacity.json

1. The vision tower learns to see, once for all.
2. Each arm of a study is trained with every learning rate of one grid on seed 0. The rate with the
   best accuracy on validation phrasings is the arm's rate on the other seeds.
3. Every arm answers every fact in a phrasing that was never trained, on drawings never seen.

What a killed run has finished is kept.
"""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from capacity_arms import LENGTH, STUDIES, Arm, config_of
from capacity_data import EncodedBatches, emblem_processor, prepare, prepare_questions
from capacity_report import report
from capacity_training import (
    RATES,
    Recipe,
    answers,
    best_rate,
    grid,
    learn_to_see,
    new_model,
    run_folder,
    train,
    upcycled_model,
    worst_load,
)
from measure import RESULTS
from transformers.utils import logging
from upcycling import check_same
from upcycling_arms import flops_per_token
from upcycling_training import one_thread

from vlmoe import VLMoEProcessor
from vlmoe.data.emblems import Emblems
from vlmoe.hub.atomic_files import write_json
from vlmoe.hub.provenance import saved_json


def run_arm(
    study: str, name: str, seed: int, rate: float, recipe: Recipe, output_dir: Path
) -> dict[str, Any]:
    """Train an arm with a rate and let it answer, unless that is done.

    Args:
        study: a name of `STUDIES`.
        name: of an arm of the study.
        seed: of facts, drawings, weights and batches.
        rate: highest learning rate.
        recipe: of the training.
        output_dir: of the benchmark.

    Returns:
        What the run's result.json holds.
    """
    arm = STUDIES[study].arms[name]
    own = run_folder(output_dir, study, name, seed, rate)
    done = saved_json(own / "result.json")
    if done is not None:
        return done
    processor = emblem_processor(config_of(arm))
    data = prepared(study, arm, seed, recipe, processor, output_dir)
    if arm.start is None:
        model = new_model(arm, seed, learn_to_see(processor, recipe, output_dir))
    else:
        chosen = best_rate(grid(output_dir, study, arm.start))
        start = run_folder(output_dir, study, arm.start, seed, chosen)
        model = upcycled_model(arm, seed, start / "model")
    first = 0 if arm.start is None else recipe.steps
    batches = EncodedBatches(data / f"train-{arm.shown}", first, first + arm.length * recipe.steps)
    times = train(model, processor, batches, rate, seed, recipe, own)
    if any(other.start == name for other in STUDIES[study].arms.values()):
        model.save_pretrained(own / "model")
        processor.save_pretrained(own / "model")
    result = describe(arm, model, data, times)
    write_json(own / "result.json", result)
    return result


def prepared(
    study: str, arm: Arm, seed: int, recipe: Recipe, processor: VLMoEProcessor, output_dir: Path
) -> Path:
    """Return the folder of a seed's data, with what the arm needs in it."""
    own, folder = STUDIES[study], output_dir / study / str(seed) / "data"
    task = Emblems(own.entities, seed)
    longest = own.longest if arm.shown == "image" else 1
    prepare(task, longest * recipe.steps, own.rows, arm.shown, processor, folder)
    return prepare_questions(task, arm.shown, processor, folder)


def describe(arm: Arm, model: Any, data: Path, times: dict[str, float]) -> dict[str, Any]:
    """Gather an arm's accuracies, sizes, costs, and whether each answer is right."""
    right = answers(model, data, arm.shown)
    return {
        "accuracy": {name: each.count("1") / len(each) for name, each in right.items()},
        "parameters": model.active_parameters(),
        "flops_per_token": flops_per_token(model.config.text_config, LENGTH),
        "worst_load": worst_load(model, EncodedBatches(data / f"facts-test-{arm.shown}")),
        **times,
        "right": right,
    }


def main() -> None:
    """Run what is missing, print the table, write the result."""
    options = parse_options()
    one_thread()
    recipe = Recipe().shortened(options.max_steps) if options.max_steps else Recipe()
    config = {"recipe": asdict(recipe), "rates": list(RATES)}
    output_dir, results = options.output_dir, options.results
    check_same(output_dir / "config.json", config)
    runs = [] if options.report_only else planned(options)
    bar = logging.tqdm(total=len(runs), desc="runs", unit="run")
    with bar:
        for study, name, seed, rate in runs:
            rate = best_rate(grid(output_dir, study, name)) if rate is None else rate
            bar.set_postfix_str(f"{study}, seed {seed}, {name}, rate {rate}")
            run_arm(study, name, seed, rate, recipe, output_dir)
            bar.update()
    print(report(output_dir, results, config))


def planned(options: argparse.Namespace) -> list[tuple[str, str, int, float | None]]:
    """Return the runs in their order; the rate of all seeds but 0 is chosen when it is known."""
    runs: list[tuple[str, str, int, float | None]] = []
    for study in options.studies:
        arms = [name for name in STUDIES[study].arms if name in (options.arms or [name])]
        for seed in sorted(options.seeds):
            rates = RATES if seed == 0 else (None,)
            runs += [(study, name, seed, rate) for name in arms for rate in rates]
    return runs


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arms = sorted({name for study in STUDIES.values() for name in study.arms})
    parser.add_argument("--studies", nargs="+", choices=STUDIES, default=list(STUDIES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="0 comes first")
    parser.add_argument("--arms", nargs="+", choices=arms, help="by default all")
    parser.add_argument("--max_steps", type=int, help="of every stage, to try it out")
    parser.add_argument("--report_only", action="store_true", help="train nothing")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/capacity"))
    parser.add_argument("--results", type=Path, default=RESULTS / "capacity.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()

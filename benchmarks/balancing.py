# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Ways of balancing experts on the demo's data: accuracy, load and dead experts on the test set.

    OMP_NUM_THREADS=1 python benchmarks/balancing.py --seeds 0 1 2

Each arm and seed is the demo's two training stages with the demo's recipes and its tokenizer;
only the balancing differs. A stage whose results are there is not run again.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from measure import write_result

from vlmoe.training.recipes import CAPTIONS, QUESTIONS, RECIPES, save_tokenizer

ARMS: dict[str, dict[str, float]] = {
    "off": {"router_aux_loss_coef": 0.0},
    "auxiliary loss": {},  # the preset's
    "bias": {"router_aux_loss_coef": 0.0, "router_bias_update_rate": 0.001},
}
EVALUATION_BATCH = "256"


def train(recipe: str, model: str, folder: Path, seed: int, extra: list[str]) -> Path:
    """Return the folder of a trained stage."""
    if not (folder / "train_results.json").exists():
        command = ["train", "--config", str(RECIPES / f"{recipe}.yaml"), "--model", model]
        _vlmoe([*command, "--output_dir", str(folder), "--seed", str(seed), *extra])
    return folder


def run_arm(fields: dict[str, float], seed: int, folder: Path, tokenizer: str) -> dict[str, Any]:
    """Train a run in two stages, and evaluate it on the whole test set, once."""
    results = folder / "evaluation.json"
    if not results.exists():
        extra = ["--tokenizer", tokenizer]
        extra += ["--model_overrides", json.dumps({"text_config": fields})] if fields else []
        captions = train(CAPTIONS, "tiny", folder / "captions", seed, extra)
        model = train(QUESTIONS, str(captions), folder / "model", seed, [])
        command = ["evaluate", "--model", str(model), "--dataset", "easy_vqa", "--split", "test"]
        _vlmoe([*command, "--batch_size", EVALUATION_BATCH, "--output", str(results)])
    return json.loads(results.read_text())


def summary(results: dict[str, Any]) -> dict[str, Any]:
    """Gather the figures of one run for the table and the result file."""
    load = results["expert_load"]
    return {
        "accuracy": results["exact_match"],
        "max / mean load by layer": [round(value, 3) for value in load["max_over_mean"]],
        "dead experts by layer": load["dead_experts"]["all"],
        "overlap of image and text by layer": load["overlap"],
    }


def _vlmoe(arguments: list[str]) -> None:
    subprocess.run([sys.executable, "-m", "vlmoe_cli.main", *arguments], check=True)


def main() -> None:
    """Run what is missing, print the table, write the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/balancing"))
    options = parser.parse_args()
    tokenizer = options.output_dir / "tokenizer"
    if not tokenizer.exists():
        save_tokenizer(tokenizer)
    runs: dict[str, dict[str, Any]] = {}
    for arm in options.arms:
        for seed in options.seeds:
            folder = options.output_dir / arm.replace(" ", "_") / str(seed)
            runs.setdefault(arm, {})[str(seed)] = summary(
                run_arm(ARMS[arm], seed, folder, str(tokenizer))
            )
    print(f"{'':16}{'accuracy':>10}  {'max / mean load of the worst layer':>36}{'dead':>6}")
    for arm, of_arm in runs.items():
        accuracy = statistics.mean(run["accuracy"] for run in of_arm.values())
        worst = [max(run["max / mean load by layer"]) for run in of_arm.values()]
        dead = max(sum(run["dead experts by layer"]) for run in of_arm.values())
        of_seeds = " ".join(f"{value:.2f}" for value in worst)
        print(f"{arm:16}{accuracy:>10.2%}  {of_seeds:>36}{dead:>6}")
    write_result("balancing", {"arms": ARMS, "runs": runs})


if __name__ == "__main__":
    main()

# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""The demo with several seeds: accuracy on easy-VQA beside its baselines, seconds, expert load.

    python benchmarks/demo_seeds.py --seeds 0 1 2

Each seed runs `vlmoe demo` in a process of its own; a seed whose metrics.json is already there is
not run again.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from measure import write_result


def run_seed(seed: int, folder: Path) -> dict[str, Any]:
    """Metrics of the demo with one seed, from its folder if it has been run."""
    metrics = folder / "metrics.json"
    if not metrics.exists():
        command = [sys.executable, "-m", "vlmoe_cli.demo"]
        command += ["--seed", str(seed), "--output_dir", str(folder)]
        subprocess.run(command, check=True)
    return json.loads(metrics.read_text())


def summary(metrics: dict[str, Any]) -> dict[str, Any]:
    """Gather the figures of one run for the table and the result file."""
    load = metrics["expert_load"]
    baselines = {name: b["exact_match"] for name, b in metrics["baselines"].items()}
    return {
        "accuracy": metrics["accuracy"],
        **{f"accuracy {kind}": value for kind, value in metrics["accuracy_by_type"].items()},
        **baselines,
        "threads": metrics["threads"],
        "train seconds": metrics["train_seconds"],
        "seconds in all": metrics["seconds"],
        "tokens per second": metrics["tokens_per_second"],
        "max expert load / mean": max(load["max_over_mean"]),
    }


def main() -> None:
    """Run the seeds, print the table, write the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/demo_seeds"))
    parser.add_argument("--note", help="a remark on the conditions, kept in the result file")
    options = parser.parse_args()
    runs = {seed: run_seed(seed, options.output_dir / str(seed)) for seed in options.seeds}
    rows = {seed: summary(metrics) for seed, metrics in runs.items()}
    print(f"{'':24}" + "".join(f"{f'seed {seed}':>12}" for seed in rows) + f"{'mean':>12}")
    for name in rows[options.seeds[0]]:
        values = [row[name] for row in rows.values()]
        form = ".2%" if max(values) <= 1 and name != "threads" else ",.2f"
        print(f"{name:24}" + "".join(f"{v:>12{form}}" for v in [*values, statistics.mean(values)]))
    first = runs[options.seeds[0]]
    shared = {name: first[name] for name in ("questions", "parameters", "versions")}
    if options.note:
        shared["note"] = options.note
    write_result("demo_seeds", {**shared, "seeds": {str(seed): row for seed, row in rows.items()}})


if __name__ == "__main__":
    main()

# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""What each way of compressing experts costs in accuracy, before and after healing.

    OMP_NUM_THREADS=1 python benchmarks/compression.py --models outputs/demo/model
    OMP_NUM_THREADS=1 python benchmarks/compression.py --headline \\
        --models outputs/demo/model outputs/demo_seed_1/model outputs/demo_seed_2/model
    python benchmarks/compression.py --report_only

The models answer easy-VQA, as `vlmoe demo` and benchmarks/demo_seeds.py train them. Each method is
calibrated on training questions and asked every third test question; `--headline` asks all of them,
on every model, for the rows that the documentation quotes. What a killed run has finished is kept.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
from compression_methods import (
    CRITERIA,
    UNITS,
    WEIGHTS,
    drop,
    narrow,
    rewrite,
    stored_share,
)
from measure import RESULTS, environment
from transformers import PreTrainedModel
from transformers.utils import logging
from upcycling import check_same
from upcycling_training import one_thread

from vlmoe import load_rows
from vlmoe.compression.banks import decoder_banks
from vlmoe.compression.calibration import Calibration, calibrate
from vlmoe.compression.compress_experts import size_of, speed_of
from vlmoe.compression.healing import heal, teacher_logits
from vlmoe.figures.plots import BLUE, GRAY, GREEN, ORANGE, new_figure, save_figure
from vlmoe.hub.atomic_files import write_json
from vlmoe.hub.provenance import saved_json
from vlmoe.hub.saved_model import load_model, read_processor
from vlmoe.training.evaluation import evaluate
from vlmoe.training.paired_bootstrap import paired_bootstrap

ROWS, EVERY, BATCH = 1024, 3, 96
HEAL_STEPS = 50
WIDTHS, COUNTS, SHARES = (64, 32, 16, 8, 4), (6, 5, 4, 3, 2), (0.5, 0.3, 0.1)
RANDOM_DRAWS = 5
HEADLINE = [
    ("none", 0),
    ("surgeon", 16),
    ("surgeon", 4),
    ("fisher", 4),
    ("reap", 4),
    ("random", 4),
]
"""Methods and sizes that are measured on all models and all questions."""
Job = tuple[str, float, int]
"""A method, a size, and the number of the draw."""


def jobs(headline: bool) -> list[Job]:
    """Return what is measured, in its order."""
    if headline:
        return [(method, size, 0) for method, size in HEADLINE]
    grid: list[Job] = [("none", 0, 0)]
    grid += [(f"units, {method}" if method == "random" else method, size, 0)
             for method in UNITS for size in WIDTHS]  # fmt: skip
    for criterion in CRITERIA:
        draws = RANDOM_DRAWS if criterion == "random" else 1
        grid += [(criterion, size, draw) for size in COUNTS for draw in range(draws)]
    for method in WEIGHTS:
        grid += [(method, share, 0) for share in ((0.5,) if method == "2:4" else SHARES)]
    return grid


def apply(model: PreTrainedModel, calibration: Calibration, job: Job) -> None:
    """Compress a model in place by a method."""
    method, size, draw = job
    if method in CRITERIA:
        drop(model, calibration, method, int(size), draw)
    elif method in WEIGHTS:
        rewrite(model, calibration, method, size, draw)
    elif method != "none":
        narrow(model, calibration, method.removeprefix("units, "), int(size), draw)


def run(folder: Path, job: Job, data: "Data", output_dir: Path) -> None:
    """Measure one method on one model, unless that is done."""
    file = (
        output_dir / folder.parent.name / f"{job[0].replace(':', ' of ')}-{job[1]:g}-{job[2]}.json"
    )
    if file.exists():
        return
    model, processor = load_model(folder), read_processor(folder)
    before = size_of(model)
    teacher = teacher_logits(model, data.calibration.batches)
    start = time.process_time()
    apply(model, data.calibration, job)
    seconds = time.process_time() - start
    right: dict[str, Any] = {"before healing": _right(model, processor, data.questions)}
    result = {
        "method": job[0],
        "size": job[1],
        "draw": job[2],
        "seconds": seconds,
        "bytes": size_of(model)["bytes"],
        "original bytes": before["bytes"],
        "parameters": size_of(model)["parameters"],
        "speed": speed_of(model, data.calibration),
    }
    if job[0] in WEIGHTS:
        experts = sum(
            p.nbytes for layer in decoder_banks(model) for p in layer.experts.parameters()
        )
        result["bytes"] -= round(experts * (1 - stored_share(job[0], job[1])))
    if job[0] != "none" and job[0] not in WEIGHTS:
        start = time.process_time()
        heal(model, decoder_banks(model), data.calibration.batches, teacher, HEAL_STEPS)
        result["healing seconds"] = time.process_time() - start
        right["after healing"] = _right(model, processor, data.questions)
    file.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(file.with_suffix(".npz"), **right)
    write_json(file, result | {"exact_match": {k: float(v.mean()) for k, v in right.items()}})


def _right(model: PreTrainedModel, processor: Any, questions: Any) -> np.ndarray:
    found = evaluate(model, processor, questions, batch_size=256, max_new_tokens=4)
    return np.array([each["correct"] for each in found.predictions])


class Data:
    """Calibration rows and questions, the same for all methods of a model."""

    def __init__(self, folder: Path, every: int, limit: int | None):
        model, processor = load_model(folder), read_processor(folder)
        rows = load_rows("easy_vqa", "train", limit=limit or ROWS)
        self.calibration = calibrate(model, processor, rows, batch_size=BATCH)
        test = load_rows("easy_vqa", "test", limit=limit)
        self.questions = [test[i] for i in range(0, len(test), every)]


def report(output_dir: Path, results: Path) -> str:
    """Gather what has run into JSON and a figure; return the table."""
    runs: dict[tuple[str, float], dict[str, list[dict[str, Any]]]] = {}
    for file in sorted(output_dir.glob("*/*.json")):
        found = saved_json(file) | {"file": file}
        key = (found["method"], found["size"])
        runs.setdefault(key, {}).setdefault(file.parent.name, []).append(found)
    rows, lines = (
        [],
        ["| method | size | bytes | exact match | healed | points from none, healed |"],
    )
    lines.append("|---|---:|---:|---:|---:|---:|")
    none = runs.get(("none", 0.0)) or {}
    for (method, size), by_model in runs.items():
        each = [run for found in by_model.values() for run in found]
        row: dict[str, Any] = {"method": method, "size": size, "models": list(by_model)}
        row["bytes"] = float(np.mean([run["bytes"] / run["original bytes"] for run in each]))
        for stage in ("before healing", "after healing"):
            values = [r["exact_match"][stage] for r in each if stage in r["exact_match"]]
            row[stage] = values
        stage = "after healing" if row["after healing"] else "before healing"
        shared = [name for name in by_model if name in none]
        gap = None
        if shared and method != "none":
            arms = [
                np.stack([_flags(found[name][0], s) for name in shared])
                for found, s in ((by_model, stage), (none, "before healing"))
            ]
            gap = row["difference"] = paired_bootstrap(*arms)
        rows.append(row)
        cells = [method, f"{size:g}", f"{row['bytes']:.1%}"]
        cells += [_spread(row[s]) for s in ("before healing", "after healing")]
        cells.append("" if gap is None else "{:+.2f} ({:+.2f} to {:+.2f})".format(
            *(100 * gap[key] for key in ("mean", "low", "high"))))  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    write_json(results, {"environment": environment(), "rows": rows})
    plot(rows, results.with_suffix(".png"))
    return "\n".join(lines)


def _flags(run: dict[str, Any], stage: str) -> np.ndarray:
    return np.load(run["file"].with_suffix(".npz"))[stage].astype(float)


def _spread(values: list[float]) -> str:
    if not values:
        return ""
    mean = f"{np.mean(values):.2%}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.2%} to {max(values):.2%})"


def plot(rows: list[dict[str, Any]], path: Path) -> Path:
    """Plot accuracy before healing against bytes, one line for each method."""
    figure = new_figure(8.0, 4.5)
    axis = figure.subplots()
    colors = {"surgeon": BLUE, "fisher": GREEN, "reap": ORANGE}
    for method in dict.fromkeys(row["method"] for row in rows if row["method"] != "none"):
        own = sorted((r["bytes"], float(np.mean(r["before healing"]))) for r in rows
                     if r["method"] == method)  # fmt: skip
        style = {"color": colors[method]} if method in colors else {"color": GRAY, "alpha": 0.6}
        axis.plot(
            *zip(*[(100 * b, 100 * a) for b, a in own], strict=True), marker="o", ms=3, **style
        )
        axis.annotate(method, (100 * own[0][0], 100 * own[0][1]), fontsize=6)
    axis.set(xlabel="bytes of the model, %", ylabel="exact match before healing, %")
    return save_figure(figure, path)


def main() -> None:
    """Run what is missing, print the table, write the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", type=Path, nargs="+", default=[Path("outputs/demo/model")])
    parser.add_argument("--headline", action="store_true", help="few methods, all questions")
    parser.add_argument("--max_rows", type=int, help="of training and test data, to try it out")
    parser.add_argument("--report_only", action="store_true", help="measure nothing")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/compression"))
    parser.add_argument("--results", type=Path)
    options = parser.parse_args()
    one_thread()
    kind = "headline" if options.headline else "grid"
    output_dir = options.output_dir / kind
    check_same(output_dir / "config.json", {"rows": options.max_rows or ROWS, "batch": BATCH})
    if not options.report_only:
        everything = jobs(options.headline)
        bar = logging.tqdm(total=len(options.models) * len(everything), desc="runs", unit="run")
        with bar:
            for folder in options.models:
                data = Data(folder, 1 if options.headline else EVERY, options.max_rows)
                for job in everything:
                    bar.set_postfix_str(f"{folder.parent.name}, {job[0]} {job[1]:g}")
                    run(folder, job, data, output_dir)
                    bar.update()
    name = "compression_headline.json" if options.headline else "compression.json"
    print(report(output_dir, options.results or RESULTS / name))


if __name__ == "__main__":
    main()

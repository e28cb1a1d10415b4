# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""What the upcycling benchmark has found so far: JSON, a table, and a figure."""

import statistics
from pathlib import Path
from typing import Any

import numpy as np
from measure import environment
from upcycling_arms import ARMS, BASELINE, PLATEAU

from vlmoe.figures.plots import BLUE, GRAY, ORANGE, new_figure, save_figure
from vlmoe.hub.atomic_files import write_json
from vlmoe.hub.provenance import saved_json
from vlmoe.training.paired_bootstrap import LEVEL, RESAMPLES, paired_bootstrap

Runs = dict[str, dict[int, dict[str, Any]]]  # arm, seed
COMPARED = [name for name in ARMS if name not in (PLATEAU, BASELINE, "question_only")]


def report(output_dir: Path, results: Path, config: dict[str, Any]) -> str:
    """Gather the finished runs below `output_dir` into `results` and a PNG beside it.

    Returns the table.
    """
    tasks = {path.parents[2].name for path in output_dir.glob("*/*/*/result.json")}
    found = {task: finished(output_dir / task) for task in sorted(tasks)}
    summaries = {task: summary(runs) for task, runs in found.items()}
    most = config["recipe"]["most_steps"]
    for task in summaries:
        dense = found[task].get(PLATEAU, {})
        cut = [seed for seed, run in dense.items() if run["steps"] >= most]
        summaries[task]["seeds without a plateau"] = cut
        summaries[task]["majority answer"] = saved_json(
            output_dir / "data" / task / "majority.json"
        )
    settings = {"level": LEVEL, "resamples": RESAMPLES, **config}
    write_json(results, {"environment": environment(), **settings, "tasks": summaries})
    if summaries:
        plot(summaries, results.with_suffix(".png"))
    return "\n\n".join(table(task, found[task], each) for task, each in summaries.items())


def finished(folder: Path) -> Runs:
    """Read the results in a task's folder, arms in their order."""
    runs: Runs = {}
    for name in ARMS:
        seeds = sorted(int(file.parts[-3]) for file in folder.glob(f"*/{name}/result.json"))
        if seeds:
            runs[name] = {s: saved_json(folder / str(s) / name / "result.json") for s in seeds}
    return runs


def summary(runs: Runs) -> dict[str, Any]:
    """Per arm its seeds without the single answers, and its difference to the baseline."""
    arms: dict[str, Any] = {}
    for name, seeds in runs.items():
        kept = {
            seed: {key: value for key, value in run.items() if key not in ("right", "images")}
            for seed, run in seeds.items()
        }
        accuracies = [run["accuracy"] for run in seeds.values()]
        arms[name] = {"mean accuracy": statistics.mean(accuracies), "seeds": kept}
        common = [seed for seed in seeds if seed in runs.get(BASELINE, {})]
        if name != BASELINE and common:
            arms[name]["minus baseline"] = difference(
                [seeds[seed] for seed in common], [runs[BASELINE][seed] for seed in common]
            )
    return {"arms": arms, "won": winner(arms)}


def difference(ours: list[dict[str, Any]], peer: list[dict[str, Any]]) -> dict[str, float]:
    """Bootstrap the pairs of two arms' runs, one of each seed in the same order."""
    right = [
        np.array([[int(digit) for digit in run["right"]] for run in arm]) for arm in (ours, peer)
    ]
    return paired_bootstrap(*right, groups=np.array(ours[0]["images"]))


def winner(arms: dict[str, Any]) -> str | None:
    """Find the arm with the best mean difference to the baseline, and whether it is significant.

    None until the baseline and another arm have run.
    """
    gaps = _compared(arms)
    if not gaps:
        return None
    best = max(gaps, key=lambda name: gaps[name]["mean"])
    gap = gaps[best]
    if gap["mean"] > 0:
        won, sure, whose = best, gap["low"] > 0, "its interval"
    else:
        won, sure, whose = BASELINE, gap["high"] < 0, f'the interval of "{ARMS[best].label}"'
    return f'"{ARMS[won].label}" won' + ("" if sure else f", but {whose} holds 0")


def _compared(arms: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Return the differences to the baseline, of the arms that have one."""
    found = {name: arms.get(name, {}).get("minus baseline") for name in COMPARED}
    return {name: gap for name, gap in found.items() if gap is not None}


def table(task: str, runs: Runs, found: dict[str, Any]) -> str:
    """Write the task's arms, one line each, in Markdown."""
    kinds = sorted({kind for seeds in runs.values() for run in seeds.values()
                    for kind in run["accuracy_by_type"]})  # fmt: skip
    head = ["arm", "accuracy", "each seed", f"points above {ARMS[BASELINE].label}", *kinds]
    head += ["in training", "parameters", "active", "MFLOP / token", "ms / step", "CPU min"]
    rows = [head, ["---", *["---:"] * (len(head) - 1)]]
    for name, seeds in runs.items():
        each = list(seeds.values())
        gap = found["arms"][name].get("minus baseline")
        rows.append(
            [
                ARMS[name].label,
                f"{_mean(each, 'accuracy'):.2%}",
                ", ".join(f"{run['accuracy']:.1%}" for run in each),
                "" if gap is None else _points(gap),
                *(f"{_mean([run['accuracy_by_type'] for run in each], k):.1%}" for k in kinds),
                f"{_mean(each, 'accuracy_in_training'):.1%}",
                f"{each[0]['parameters']['total']:,}",
                f"{each[0]['parameters']['text_token']:,}",
                f"{each[0]['flops_per_token'] / 1e6:.3f}",
                f"{_mean(each, 'step_cpu_seconds') * 1e3:.0f}",
                f"{_mean(each, 'cpu_seconds') / 60:.1f}",
            ]
        )
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    won = found["won"] or "no two arms have run yet"
    guess = found["majority answer"]
    blind = f"The most frequent answer to a question is right in {guess['by words']:.1%}."
    cut = found["seeds without a plateau"]
    if cut:
        blind += f" The dense model was cut off before a plateau with the seeds {cut}."
    return f"{task}: {won}. {blind}\n\n" + "\n".join(lines)


def _points(gap: dict[str, float]) -> str:
    mean, low, high = (100 * gap[key] for key in ("mean", "low", "high"))
    return f"{mean:+.2f} ({low:+.2f} to {high:+.2f})"


def _mean(runs: list[dict[str, Any]], key: str) -> float:
    return statistics.mean(run[key] for run in runs)


def _gaps_of_seeds(arm: dict[str, Any], baseline: dict[str, Any]) -> list[float]:
    """Subtract the baseline's accuracy from an arm's, in points, for each seed of both."""
    ours, peer = arm["seeds"], baseline["seeds"]
    return [100 * (ours[s]["accuracy"] - peer[s]["accuracy"]) for s in ours if s in peer]


def plot(summaries: dict[str, dict[str, Any]], path: Path) -> Path:
    """Plot each arm's difference to the baseline in points, with its interval and each seed's.

    There is one panel per task.
    """
    figure = new_figure(5.2 * len(summaries) + 1.5, 3.4)
    panels = figure.subplots(1, len(summaries), squeeze=False, sharey=True)[0]
    for axis, (task, found) in zip(panels, summaries.items(), strict=True):
        axis.axvline(0, color=GRAY, linewidth=1)
        for name, gap in _compared(found["arms"]).items():
            place, color = COMPARED.index(name), ORANGE if ARMS[name].upcycling else BLUE
            ends = [[100 * (gap["mean"] - gap["low"])], [100 * (gap["high"] - gap["mean"])]]
            axis.errorbar(100 * gap["mean"], place, xerr=ends, fmt="o", color=color, capsize=4)
            each = _gaps_of_seeds(found["arms"][name], found["arms"][BASELINE])
            axis.plot(each, [place + 0.28] * len(each), "|", color=color)
        baseline = found["arms"].get(BASELINE)
        share = "" if baseline is None else f" ({baseline['mean accuracy']:.1%})"
        axis.set(title=task, xlabel=f"points above {ARMS[BASELINE].label}{share}")
        axis.set_yticks(range(len(COMPARED)), [ARMS[name].label for name in COMPARED])
        axis.set_ylim(len(COMPARED) - 0.5, -0.5)
    return save_figure(figure, path)

# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""What the capacity benchmark has found so far: JSON, tables, and two figures."""

import statistics
from pathlib import Path
from typing import Any

import numpy as np
from capacity_arms import STUDIES
from capacity_figures import KNOWLEDGE, PERCEPTION, plot_curve, plot_rates
from capacity_training import RATES, best_rate, grid, run_folder
from measure import environment

from vlmoe.data.emblems import ATTRIBUTES, CELLS
from vlmoe.hub.atomic_files import write_json
from vlmoe.hub.provenance import saved_json
from vlmoe.training.paired_bootstrap import LEVEL, RESAMPLES, paired_bootstrap

ROWS_OF_AN_ENTITY = {KNOWLEDGE: len(ATTRIBUTES), PERCEPTION: len(CELLS)}
Run = dict[str, Any]
Summary = dict[str, Any]


def report(output_dir: Path, results: Path, config: dict[str, Any]) -> str:
    """Gather the finished runs below `output_dir` into `results` and PNGs beside it.

    Returns the tables.
    """
    studies = {name: summary(output_dir, name) for name in STUDIES}
    studies = {name: found for name, found in studies.items() if found["arms"]}
    settings = {"level": LEVEL, "resamples": RESAMPLES, **config}
    write_json(results, {"environment": environment(), **settings, "studies": studies})
    if studies:
        plot_rates(studies, results.with_name(f"{results.stem}_rates.png"))
        plot_curve(studies, results.with_suffix(".png"))
    return "\n\n".join(table(name, found) for name, found in studies.items())


def summary(output_dir: Path, study: str) -> Summary:
    """Return each arm's grid, rate and seeds, and the differences of interest with intervals."""
    arms, runs = {}, {}
    for name in STUDIES[study].arms:
        try:
            accuracies = grid(output_dir, study, name)
        except FileNotFoundError:  # it has not run to its end
            continue
        rate = best_rate(accuracies)
        runs[name] = seeds = finished(output_dir, study, name, rate)
        arms[name] = {
            "label": STUDIES[study].arms[name].label,
            "rate": rate,
            "rate is inside the grid": RATES[0] < rate < RATES[-1],
            "grid": {str(each): accuracy for each, accuracy in accuracies.items()},
            "mean": {
                kind: statistics.mean(run["accuracy"][kind] for run in seeds.values())
                for kind in seeds[0]["accuracy"]
            },
            "seeds": {seed: without_answers(run) for seed, run in seeds.items()},
        }
        arms[name]["interval"] = interval(list(seeds.values()), KNOWLEDGE)
    pairs = [pair for pair in STUDIES[study].pairs if set(pair) <= set(runs)]
    return {
        "entities": STUDIES[study].entities,
        "arms": arms,
        "differences": [difference(*pair, runs) for pair in pairs],
    }


def finished(output_dir: Path, study: str, name: str, rate: float) -> dict[int, Run]:
    """Return an arm's runs with a rate, by seed."""
    seeds = sorted(int(each.name) for each in (output_dir / study).iterdir())
    found = {
        seed: saved_json(run_folder(output_dir, study, name, seed, rate) / "result.json")
        for seed in seeds
    }
    return {seed: run for seed, run in found.items() if run is not None}


def without_answers(run: Run) -> Run:
    """Return a run without the single answers."""
    return {key: value for key, value in run.items() if key != "right"}


def difference(ours: str, peer: str, runs: dict[str, dict[int, Run]]) -> Summary:
    """Return the differences of two arms on the seeds of both, paired by seed and question."""
    seeds = [seed for seed in runs[ours] if seed in runs[peer]]
    found: Summary = {"ours": ours, "peer": peer, "seeds": seeds}
    first = {name: runs[name][seeds[0]] for name in (ours, peer)}
    for what in ("flops_per_token", "step_cpu_seconds"):
        found[f"{what} ratio"] = first[ours][what] / first[peer][what]
    for what in ("text_token", "total"):
        counts = [first[name]["parameters"][what] for name in (ours, peer)]
        found[f"{what} parameters ratio"] = counts[0] / counts[1]
    for kind in (KNOWLEDGE, PERCEPTION):
        if all(kind in first[name]["right"] for name in (ours, peer)):
            arms = ([runs[name][seed] for seed in seeds] for name in (ours, peer))
            found[kind] = paired(*arms, kind)
    return found


def paired(ours: list[Run], peer: list[Run], kind: str) -> dict[str, float]:
    """Bootstrap the pairs of two arms' runs, one of each seed in the same order.

    The questions about an entity are drawn together.
    """
    right = [_digits(runs, kind) for runs in (ours, peer)]
    return paired_bootstrap(*right, groups=_entities(right[0], kind))


def interval(runs: list[Run], kind: str) -> dict[str, float]:
    """Bootstrap the accuracy of one arm over seeds and entities."""
    right = _digits(runs, kind)
    return paired_bootstrap(right, np.zeros_like(right), groups=_entities(right, kind))


def _digits(runs: list[Run], kind: str) -> np.ndarray:
    return np.array([[int(digit) for digit in run["right"][kind]] for run in runs])


def _entities(right: np.ndarray, kind: str) -> np.ndarray:
    return np.arange(right.shape[1]) // ROWS_OF_AN_ENTITY[kind]


def table(study: str, found: Summary) -> str:
    """Write the study's arms, one line each, and its differences, in Markdown."""
    head = ["arm", "rate", "knowledge", "each seed", "perception", "parameters", "active"]
    head += ["MFLOP / token", "CPU ms / step", "CPU s", "busiest expert"]
    rows = [head, ["---", *["---:"] * (len(head) - 1)]]
    for arm in found["arms"].values():
        each = list(arm["seeds"].values())
        perception = arm["mean"].get(PERCEPTION)
        rows.append(
            [
                arm["label"],
                f"{arm['rate']:g}" + ("" if arm["rate is inside the grid"] else " (edge)"),
                f"{arm['mean'][KNOWLEDGE]:.1%}",
                ", ".join(f"{run['accuracy'][KNOWLEDGE]:.1%}" for run in each),
                "" if perception is None else f"{perception:.1%}",
                f"{each[0]['parameters']['total']:,}",
                f"{each[0]['parameters']['text_token']:,}",
                f"{each[0]['flops_per_token'] / 1e6:.4f}",
                f"{statistics.mean(run['step_cpu_seconds'] for run in each) * 1e3:.0f}",
                f"{statistics.mean(run['cpu_seconds'] for run in each):.0f}",
                f"{statistics.mean(run['worst_load'] for run in each):.1f}",
            ]
        )
    return f"{study}, {found['entities']} entities\n\n{_lines(rows)}\n\n{_differences(found)}"


def _differences(found: Summary) -> str:
    head = ["difference", "knowledge, points", "perception, points", "active parameters"]
    head += ["FLOPs", "CPU time of a step"]
    rows = [head, ["---", *["---:"] * (len(head) - 1)]]
    labels = {name: arm["label"] for name, arm in found["arms"].items()}
    for each in found["differences"]:
        rows.append(
            [
                f"{labels[each['ours']]} − {labels[each['peer']]}",  # noqa: RUF001 - a minus
                *(_points(each.get(kind)) for kind in (KNOWLEDGE, PERCEPTION)),
                f"{each['text_token parameters ratio'] - 1:+.1%}",
                f"{each['flops_per_token ratio'] - 1:+.1%}",
                f"{each['step_cpu_seconds ratio']:.2f}x",
            ]
        )
    return _lines(rows)


def _points(gap: dict[str, float] | None) -> str:
    if gap is None:
        return ""
    mean, low, high = (100 * gap[key] for key in ("mean", "low", "high"))
    return f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"


def _lines(rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)

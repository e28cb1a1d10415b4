# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Figures of the capacity benchmark: accuracy over capacity, and each arm's grid of rates."""

import math
from pathlib import Path
from typing import Any

from capacity_arms import CONTINUED, COPY, SPARSE, SPLIT, STUDIES, TOTAL, TWIN, WIDE_CONTINUED

from vlmoe.figures.plots import BLUE, GRAY, ORANGE, new_figure, save_figure

BARS = (TWIN, SPARSE, TOTAL, CONTINUED, WIDE_CONTINUED, SPLIT, COPY)
"""Arms of the smaller study that the figure shows, in their order."""
KNOWLEDGE, PERCEPTION = "facts-test", "cells-test"


def plot_curve(studies: dict[str, Any], path: Path) -> Path:
    """Plot knowledge and perception over MLP capacity, and the arms of the smaller study as bars.

    Each seed is a dot, each interval a bar. Lines across are dense models of equal active size.
    """
    figure = new_figure(11.5, 4.4)
    left, right = figure.subplots(1, 2, width_ratios=[1.25, 1])
    if "facts_8192" in studies:
        _curve(left, studies["facts_8192"], STUDIES["facts_8192"].arms)
    if "facts_4096" in studies:
        _bars(right, studies["facts_4096"])
    return save_figure(figure, path)


def _curve(axis: Any, study: dict[str, Any], arms: dict[str, Any]) -> None:
    sparse = [name for name in study["arms"] if arms[name].experts]
    shown = [n for n in (TWIN, *sparse) if n in study["arms"] and n != "experts_2"]  # a control
    places = [math.log2(arms[name].capacity) for name in shown]
    for kind, color, label in ((KNOWLEDGE, BLUE, "knowledge"), (PERCEPTION, ORANGE, "perception")):
        means = [100 * study["arms"][name]["mean"][kind] for name in shown]
        axis.plot(places, means, "-", color=color, label=label)
        for place, name in zip(places, shown, strict=True):
            each = [100 * run["accuracy"][kind] for run in study["arms"][name]["seeds"].values()]
            axis.plot([place] * len(each), each, "o", color=color, markersize=4)
    for place, name in zip(places, shown, strict=True):
        ends = study["arms"][name]["interval"]
        axis.vlines(
            place, 100 * ends["low"], 100 * ends["high"], color=BLUE, linewidth=3, alpha=0.4
        )
    for name, each in study["arms"].items():
        if not arms[name].experts:
            axis.axhline(100 * each["mean"][KNOWLEDGE], color=GRAY, linewidth=0.8, linestyle="--")
    ticks = [
        f"{arms[name].capacity:g}x\n{_size(study['arms'][name])}"
        + (f"\n{arms[name].experts} experts" if arms[name].experts else "\ndense")
        for name in shown
    ]
    axis.set_xticks(places, ticks, fontsize=8)
    axis.set(ylim=(0, 101), ylabel="right answers, %")
    axis.set_xlabel("MLP capacity over active MLP, all parameters, experts (2 of them active)")
    facts = 8 * study["entities"]
    axis.set_title(f"{facts:,} facts, equal FLOPs a token; dashes: dense", fontsize=10)
    axis.legend(loc="center left", fontsize=8)


def _size(arm: dict[str, Any]) -> str:
    total = next(iter(arm["seeds"].values()))["parameters"]["total"]
    return f"{total / 1e3:.0f}k"


def _bars(axis: Any, study: dict[str, Any]) -> None:
    names = [name for name in BARS if name in study["arms"]]
    for place, name in enumerate(names):
        arm = study["arms"][name]
        color = BLUE if STUDIES["facts_4096"].arms[name].experts else GRAY
        axis.barh(place, 100 * arm["mean"][KNOWLEDGE], color=color, height=0.6)
        each = [100 * run["accuracy"][KNOWLEDGE] for run in arm["seeds"].values()]
        axis.plot(each, [place] * len(each), "|", color="black", markersize=8)
        flops = next(iter(arm["seeds"].values()))["flops_per_token"] / 1e6
        axis.text(2, place, f"{flops:.3f} MFLOP", color="white", va="center", fontsize=8)
    axis.set_yticks(range(len(names)), [study["arms"][name]["label"] for name in names], fontsize=8)
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.set(xlim=(0, 101), xlabel="right answers, %")
    axis.set_title(f"{8 * study['entities']:,} facts", fontsize=10)


def plot_rates(studies: dict[str, Any], path: Path) -> Path:
    """Plot each arm's validation accuracy over the grid of learning rates, on seed 0."""
    figure = new_figure(6.0 * len(studies), 5.0)
    panels = figure.subplots(1, len(studies), squeeze=False)[0]
    styles = ("-", "--", ":", "-.")
    for axis, (study, found) in zip(panels, studies.items(), strict=True):
        for number, arm in enumerate(found["arms"].values()):
            rates, accuracies = zip(*arm["grid"].items(), strict=True)
            points = [float(rate) for rate in rates], [100 * each for each in accuracies]
            style, color = styles[number // 10 % len(styles)], f"C{number % 10}"
            axis.plot(*points, style, marker="o", markersize=3, color=color, label=arm["label"])
        axis.set_xscale("log", base=2)
        axis.set_xticks(points[0], [f"{rate:g}" for rate in points[0]])
        axis.set(xlabel="learning rate", ylabel="validation accuracy, %", title=study)
        axis.legend(fontsize=6)
    return save_figure(figure, path)

# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""What benchmarks share: where they ran, alternating runs, a paired interval, a result file."""

import math
import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch

from vlmoe.hub.atomic_files import write_json

RESULTS = Path(__file__).parent / "results"
STUDENT_T_975 = {9: 2.262, 19: 2.093, 29: 2.045}  # two-sided 95%, by degrees of freedom


def environment() -> dict[str, str | int]:
    """Hardware and versions of this run."""
    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        cpu = lines[0].split(":")[1].strip() if lines else cpu
    packages = {name: version(name) for name in ("torch", "transformers", "vlmoe")}
    return {
        "cpu": cpu,
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **packages,
    }


def alternate(
    steps: dict[str, Callable[[], None]], runs: int, steps_per_run: int, warmup: int = 1
) -> dict[str, list[float]]:
    """Process CPU seconds of a step, one value per run: the median of the run's steps.

    The steps of a run are taken in turn, so that drift and other processes hit all alike.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for run in range(-warmup, runs):
        times: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(steps_per_run):
            for name, step in steps.items():
                start = time.process_time()
                step()
                times[name].append(time.process_time() - start)
        if run >= 0:
            for name, values in times.items():
                seconds[name].append(statistics.median(values))
    return seconds


def paired_ratio(ours: list[float], peer: list[float]) -> dict[str, float]:
    """Ratio ours / peer of paired runs: median, mean and its 95% interval (Student's t on logs)."""
    logs = [math.log(a / b) for a, b in zip(ours, peer, strict=True)]
    mean, half = statistics.mean(logs), 0.0
    half = STUDENT_T_975[len(logs) - 1] * statistics.stdev(logs) / math.sqrt(len(logs))
    ratios = {
        "mean": mean,
        "low": mean - half,
        "high": mean + half,
        "median": statistics.median(logs),
    }
    return {name: round(math.exp(value), 4) for name, value in ratios.items()}


def write_result(name: str, result: dict) -> None:
    """Write `results/<name>.json`, atomically, with the environment beside the numbers."""
    path = RESULTS / f"{name}.json"
    write_json(path, {"environment": environment(), **result})
    print(f"Wrote {path}")

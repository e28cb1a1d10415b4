# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""`experts_implementation="auto"` beside eager, batched_mm and grouped_mm, forward and backward.

    OMP_NUM_THREADS=1 python benchmarks/experts_dispatch.py                    # about 10 minutes
    OMP_NUM_THREADS=1 python benchmarks/experts_dispatch.py --only "float32 A forward"

One bank of experts; with a backward pass weights, tokens and routing weights get gradients. Every
run of a cell is a fresh process in which the implementations take turns, in changing order, on
tokens that choose other experts each time. Time is process CPU time on one thread: the median over
a run's steps. The table gives the best peer's time divided by auto's: the median over the runs.
A peer that took more than 3 times the fastest one's time in the first run is left out of the
others, and batched_mm where it would copy more than 1 GiB of weights. `read` is the time to sum the
weights that one token needs: no implementation can be faster than memory.
"""

import argparse
import copy
import multiprocessing
import random
import statistics
import time
from collections.abc import Callable, Collection
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from measure import write_result

from vlmoe.modeling_vlmoe.sparse_moe import VLMoEExperts

SHAPES = {  # experts, k, hidden, intermediate
    "A": (8, 2, 576, 1536),
    "B": (16, 4, 512, 512),
    "C": (64, 6, 1024, 512),
}
TOKENS = (1, 8, 64, 512, 2048)
PEERS = ("eager", "batched_mm", "grouped_mm")
INPUTS = 16  # different ones of a run
STEP_SECONDS = 0.4  # of CPU time, about, that a run spends on each implementation
LEFT_OUT = 3.0  # times as slow as the fastest peer
COPIED_BYTES = 2**30

Cell = tuple[str, str, str, int]  # dtype, shape, pass, tokens


@cache
def make_bank(dtype: str, shape: str) -> Any:
    """Made once: the runs start as copies of this process."""
    experts, _, hidden, intermediate = SHAPES[shape]
    config = SimpleNamespace(
        num_experts=experts,
        hidden_size=hidden,
        moe_intermediate_size=intermediate,
        hidden_act="silu",
    )
    bank: Any = VLMoEExperts(config)
    for parameter in bank.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return bank.to(getattr(torch, dtype))


def make_steps(cell: Cell, names: Collection[str]) -> dict[str, Callable[[int], None]]:
    """By implementation, one step on the input of that number."""
    dtype, shape, which, tokens = cell
    experts, k, hidden, _ = SHAPES[shape]
    bank = make_bank(dtype, shape)
    backward = which == "backward"
    inputs = []
    for _ in range(INPUTS):
        x = torch.randn(tokens, hidden, dtype=bank.down_proj.dtype, requires_grad=backward)
        weights, choice = torch.rand(tokens, experts).topk(k, -1)
        weights = (weights / weights.sum(-1, keepdim=True)).to(x.dtype).requires_grad_(backward)
        inputs.append((x, choice, weights))

    def run(module: Any, number: int) -> None:
        x, _, weights = arguments = inputs[number % INPUTS]
        with torch.set_grad_enabled(backward):
            output = module(*arguments)
        if backward:
            output.backward(x.detach())
            module.zero_grad()
            x.grad = weights.grad = None

    def read(number: int) -> None:
        for expert in inputs[number % INPUTS][1][0].tolist():
            bank.gate_up_proj[expert].detach().sum(), bank.down_proj[expert].detach().sum()

    steps: dict[str, Callable[[int], None]] = {}
    for name in names:
        module = copy.copy(bank)
        module.config = copy.copy(bank.config)
        module.config._experts_implementation = name
        steps[name] = lambda number, module=module: run(module, number)
    if tokens == 1 and not backward:
        steps["read"] = read
    return steps


def run_cell(task: tuple[Cell, tuple[str, ...], int]) -> dict[str, float]:
    """CPU seconds of a step, by implementation; one too slow is timed once."""
    cell, names, seed = task
    torch.manual_seed(seed)
    random.seed(seed)
    steps = make_steps(cell, names)

    def timed(name: str, number: int) -> float:
        start = time.process_time()
        steps[name](number)
        return time.process_time() - start

    seconds = {name: [timed(name, 0)] for name in steps}
    fastest = min(seconds[name][0] for name in names)
    taking_turns = [name for name in steps if seconds[name][0] <= LEFT_OUT * fastest]
    rounds = max(3, min(100, int(STEP_SECONDS / fastest)))
    for name in taking_turns:
        seconds[name].clear()  # the first step warms up
    for number in range(rounds):
        random.shuffle(taking_turns)
        for place, name in enumerate(taking_turns):
            seconds[name].append(timed(name, number + 3 * place))
    return {name: statistics.median(values) for name, values in seconds.items()}


def measure(cells: list[Cell], runs: int) -> dict[str, dict[str, list[float]]]:
    """Of each cell and implementation the CPU seconds of all runs."""
    results: dict[str, dict[str, list[float]]] = {}
    names = {cell: tuple(name for name in (*PEERS, "auto") if fits(cell, name)) for cell in cells}
    context = multiprocessing.get_context("fork")
    for run in range(runs):
        for cell in cells:
            make_bank(*cell[:2])
            with context.Pool(1, maxtasksperchild=1) as pool:
                seconds = pool.apply(run_cell, ((cell, names[cell], run),))
            by_name = results.setdefault(" ".join(map(str, cell)), {})
            for name, value in seconds.items():
                by_name.setdefault(name, []).append(value)
            slowest = LEFT_OUT * min(seconds.values())
            if run == 0 and "read" not in seconds:
                names[cell] = tuple(n for n in names[cell] if n == "auto" or seconds[n] <= slowest)
    return results


def fits(cell: Cell, name: str) -> bool:
    """Whether the copies of weights that batched_mm makes are of a size to be tried."""
    dtype, shape, _, tokens = cell
    _, k, hidden, intermediate = SHAPES[shape]
    copied = tokens * k * 3 * hidden * intermediate * getattr(torch, dtype).itemsize
    return name != "batched_mm" or copied <= COPIED_BYTES


def ratios(seconds: dict[str, list[float]]) -> dict[str, float | str]:
    """Divide the best peer's time by auto's, run by run: median and extremes.

    The best is the one of the lowest median, for all runs: the lowest of each run would be that
    of the luckiest.
    """
    ours = seconds["auto"]
    peers = [name for name in PEERS if len(seconds.get(name, ())) == len(ours)]
    best = min(peers, key=lambda name: statistics.median(seconds[name]))
    values = [peer / auto for peer, auto in zip(seconds[best], ours, strict=True)]
    names = {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}
    return {"best": best} | {name: round(value, 3) for name, value in names.items()}


def main() -> None:
    """Measure, print the table, write the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--only", help="cells that start with this, nothing is written")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cells: list[Cell] = [
        (dtype, shape, which, tokens)
        for dtype in ("float32", "bfloat16")
        for shape in SHAPES
        for which in ("forward", "backward")
        for tokens in TOKENS
    ]
    if options.only:
        cells = [cell for cell in cells if " ".join(map(str, cell)).startswith(options.only)]
    results = measure(cells, options.runs)
    columns = (*PEERS, "auto", "read")
    print(f"{'milliseconds':24}", *(f"{name:>11}" for name in columns), "  best/auto  lowest")
    summary = {key: ratios(seconds) for key, seconds in results.items()}
    for key, seconds in results.items():
        each = [statistics.median(seconds[n]) * 1e3 if n in seconds else None for n in columns]
        cell = [f"{'':>11}" if value is None else f"{value:11.3f}" for value in each]
        print(f"{key:24}", *cell, f"{summary[key]['median']:10.2f} {summary[key]['lowest']:7.2f}")
    if not options.only:
        settings = {"shapes": SHAPES, "runs": options.runs, "left_out_above": LEFT_OUT}
        write_result("experts_dispatch", {**settings, "best_over_auto": summary, "cells": results})


if __name__ == "__main__":
    main()

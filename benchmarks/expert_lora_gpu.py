# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""LoRA on experts on a GPU: the routed path beside PEFT's own path on transformers' grouped_mm.

    python benchmarks/expert_lora_gpu.py

One bank in bf16, 128 experts, top-8, hidden 2048, intermediate 768, rank 16 on both parameters;
forward and backward of 4096 tokens. Both paths in one process, step by step in turn. Time is the
median over the steps; memory is the most allocated minus what was allocated before the step.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import expert_lora
import torch
from measure import write_result

RANK, SHAPE, TOKENS = 16, (128, 8, 2048, 768), 4096
DRY_RUN = (4, 2, 16, 8), 10  # shape and tokens


def timed_step(step: Callable[[], None], device: str) -> tuple[float, float]:
    """Seconds of a step, and MiB that it allocated at its peak (0 on a CPU)."""
    if device == "cpu":
        start = time.perf_counter()
        step()
        return time.perf_counter() - start, 0.0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, start = torch.cuda.memory_allocated(), time.perf_counter()
    step()
    torch.cuda.synchronize()
    return time.perf_counter() - start, (torch.cuda.max_memory_allocated() - before) / 2**20


def main() -> None:
    """Measure, print the table, write the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--dry_run", action="store_true", help=argparse.SUPPRESS)  # on a CPU
    options = parser.parse_args()
    if not (options.dry_run or torch.cuda.is_available()):
        sys.exit("This needs a CUDA GPU, and torch sees none.")
    device, (shape, tokens) = ("cpu", DRY_RUN) if options.dry_run else ("cuda", (SHAPE, TOKENS))
    expert_lora.RANK, expert_lora.SHAPES["GPU"] = RANK, shape
    with torch.device(device):
        steps = {
            path: expert_lora.bank_step("GPU", tokens, torch.bfloat16, path)
            for path in ("peft", "routed")
        }
    measured: dict[str, list[tuple[float, float]]] = {path: [] for path in steps}
    for number in range(-3, options.steps):  # three steps to warm up
        for path, step in steps.items():
            result = timed_step(step, device)
            if number >= 0:
                measured[path].append(result)
    medians = {
        path: [statistics.median(values) for values in zip(*results, strict=True)]
        for path, results in measured.items()
    }
    for path, (seconds, mib) in medians.items():
        print(f"{path:8} {seconds * 1e3:10.2f} ms {mib:10.1f} MiB")
    if not options.dry_run:
        settings = {"gpu": torch.cuda.get_device_name(), "shape": SHAPE, "rank": RANK}
        settings |= {"tokens": TOKENS, "dtype": "bfloat16", "steps": options.steps}
        write_result("expert_lora_gpu", {**settings, "median_seconds_and_mib": medians})


if __name__ == "__main__":
    main()

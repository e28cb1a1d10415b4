# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Step time and peak memory of training the `tiny` preset, for each way to run it.

    OMP_NUM_THREADS=1 python benchmarks/train_step.py

One step is forward, backward and AdamW on 16 images with 10 questions each, one row per question,
as in the demo. Every case runs in a fresh process: memory is the peak resident size above the size
before the first step; time is process CPU time on one thread, the median over the steps. The first
case is the demo's.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

import torch
from measure import write_result

from vlmoe import VLMoEConfig, VLMoEForConditionalGeneration

IMAGES, QUESTIONS, TEXT_LENGTH = 16, 10, 16
CASES: dict[str, dict] = {
    "grouped_mm, shared images": {},
    "batched_mm, shared images": {"experts": "batched_mm"},
    "eager, shared images": {"experts": "eager"},
    "grouped_mm, repeated images": {"share": False},
    "grouped_mm, shared, checkpointing": {"checkpointing": True},
    "grouped_mm, shared, bf16 autocast": {"bf16": True},
}


def make_batch(config: VLMoEConfig, share: bool) -> dict[str, torch.Tensor]:
    """Random images and text in the demo's shapes, with labels on the last two tokens."""
    rows = IMAGES * QUESTIONS
    vision = config.vision_config
    image_tokens = (vision.image_size // vision.patch_size // config.pixel_shuffle_factor) ** 2
    input_ids = torch.randint(6, config.text_config.vocab_size, (rows, image_tokens + TEXT_LENGTH))
    input_ids[:, 1 : 1 + image_tokens] = config.image_token_id
    labels = torch.full_like(input_ids, -100)
    labels[:, -2:] = input_ids[:, -2:]
    pixel_values = torch.randn(IMAGES, 3, vision.image_size, vision.image_size)
    image_index = torch.arange(IMAGES).repeat_interleave(QUESTIONS)
    batch = {"input_ids": input_ids, "labels": labels, "attention_mask": torch.ones_like(input_ids)}
    if share:
        return batch | {"pixel_values": pixel_values, "image_index": image_index[:, None]}
    return batch | {"pixel_values": pixel_values[image_index]}


def resident_mib(peak: bool) -> float:
    """Resident size of this process, now or at its highest."""
    if peak:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20


def measure_case(
    steps: int,
    experts: str = "grouped_mm",
    share: bool = True,
    checkpointing: bool = False,
    bf16: bool = False,
) -> dict[str, float]:
    """Train for `steps` steps after two to warm up."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = VLMoEConfig.from_preset("tiny")
    model = VLMoEForConditionalGeneration(config).train()
    model.set_experts_implementation(experts)
    if checkpointing:
        model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(model.parameters())
    batch = make_batch(config, share)
    before, seconds = resident_mib(peak=False), []
    for _ in range(steps + 2):
        start = time.process_time()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.process_time() - start)
    tokens = batch["input_ids"].numel()
    median = statistics.median(seconds[2:])
    return {
        "step_cpu_seconds": round(median, 4),
        "tokens_per_cpu_second": round(tokens / median),
        "peak_mib_above_start": round(resident_mib(peak=True) - before, 1),
    }


def main() -> None:
    """Run every case in its own process, print the table, write the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--case", choices=CASES, help="run one case in this process and print JSON")
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure_case(options.steps, **CASES[options.case])))
        return
    result: dict = {
        "images": IMAGES,
        "questions_per_image": QUESTIONS,
        "steps": options.steps,
        "cases": {},
    }
    print(f"{'case':36} {'CPU s/step':>10} {'tokens/s':>9} {'peak MiB':>9}")
    for case in CASES:
        command = [sys.executable, __file__, "--steps", str(options.steps), "--case", case]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        row = result["cases"][case] = json.loads(output.splitlines()[-1])
        values = row.values()
        print("{:36} {:10.3f} {:9d} {:9.0f}".format(case, *values), flush=True)
    write_result("train_step", result)


if __name__ == "__main__":
    main()

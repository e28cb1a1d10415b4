# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""CPU time that recording the routing adds to a training step of a tiny model.

    OMP_NUM_THREADS=1 python benchmarks/telemetry_cost.py

One step is forward, backward and AdamW, as in train_step.py: 16 images with 10 questions each, as
in the demo, and, where a fixed cost weighs more, 1 image with 4. The models are the `tiny` preset,
and a Qwen3-VL-MoE of its sizes, each of whose rows has its own image. Two figures each:
- paired: process CPU time of single steps with and without, taken in turn, on two equal models
- hooks: share of a step's CPU time that passes inside the recorder's hooks, by the thread's clock;
  torch's profiler has the clock on the wall, which other processes disturb
Beside them, what reading the counters costs, once per logged loss.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from unittest import mock

import torch
import train_step
from measure import alternate, paired_ratio, write_result
from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

from vlmoe import VLMoEConfig, VLMoEForConditionalGeneration
from vlmoe.routing.load import record_expert_load
from vlmoe.routing.record import Listener

Case = tuple[str, int, int]
CASES: dict[str, Case] = {
    "16 images, 10 questions each": ("vlmoe", 16, 10),
    "1 image, 4 questions": ("vlmoe", 1, 4),
    "Qwen3-VL-MoE, 160 rows": ("qwen3_vl_moe", 16, 10),
    "Qwen3-VL-MoE, 4 rows": ("qwen3_vl_moe", 1, 4),
}
HOOKS = ("_begin", "_keep_logits", "_read", "_end")
BUDGET = 0.02
MARKS = {"image_token_id": 2, "video_token_id": 3, "vision_start_token_id": 4}


def vlmoe_and_batch(images: int, questions: int) -> tuple[torch.nn.Module, dict]:
    """Make the `tiny` preset and a batch; the questions about an image share it."""
    config = VLMoEConfig.from_preset("tiny")
    model = VLMoEForConditionalGeneration(config)
    with mock.patch.multiple(train_step, IMAGES=images, QUESTIONS=questions):
        return model, train_step.make_batch(config, share=True)


def qwen_and_batch(images: int, questions: int) -> tuple[torch.nn.Module, dict]:
    """Make a Qwen3-VL-MoE of the sizes of `tiny`, and the same rows with 16 image tokens each."""
    tiny = VLMoEConfig.from_preset("tiny")
    text, vision, rows = tiny.text_config, tiny.vision_config, images * questions
    names = """vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
        num_key_value_heads head_dim num_experts num_experts_per_tok moe_intermediate_size"""
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [6, 5, 5]}
    config = Qwen3VLMoeConfig(
        text_config={name: getattr(text, name) for name in names.split()}
        | {"rope_parameters": rope, "tie_word_embeddings": True},
        vision_config={
            "depth": vision.num_hidden_layers,
            "hidden_size": vision.hidden_size,
            "intermediate_size": vision.intermediate_size,
            "num_heads": vision.num_attention_heads,
            "out_hidden_size": text.hidden_size,
            "patch_size": vision.patch_size,
            "num_position_embeddings": (vision.image_size // vision.patch_size) ** 2,
            "deepstack_visual_indexes": [1],
        },
        tie_word_embeddings=True,
        **MARKS,
    )
    side = vision.image_size // vision.patch_size
    image_tokens = (side // config.vision_config.spatial_merge_size) ** 2
    ids = torch.randint(6, text.vocab_size, (rows, image_tokens + train_step.TEXT_LENGTH))
    ids[:, 0], ids[:, 1 : 1 + image_tokens] = MARKS["vision_start_token_id"], config.image_token_id
    labels = torch.full_like(ids, -100)
    labels[:, -2:] = ids[:, -2:]
    frames = config.vision_config.temporal_patch_size
    batch = {
        "input_ids": ids,
        "labels": labels,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == config.image_token_id).long(),
        "pixel_values": torch.randn(rows * side**2, 3 * frames * vision.patch_size**2),
        "image_grid_thw": torch.tensor([[1, side, side]] * rows),
    }
    return Qwen3VLMoeForConditionalGeneration(config), batch


MODELS = {"vlmoe": vlmoe_and_batch, "qwen3_vl_moe": qwen_and_batch}


def make_step(kind: str, images: int, questions: int) -> tuple[torch.nn.Module, Callable[[], None]]:
    """Return the model and one training step of it."""
    torch.manual_seed(0)
    model, batch = MODELS[kind](images, questions)
    model.train().set_experts_implementation("grouped_mm")
    optimizer = torch.optim.AdamW(model.parameters())

    def step() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return model, step


def paired(case: Case, runs: int, steps: int) -> dict[str, list[float]]:
    """CPU seconds of steps with and without, see `measure.alternate`, and of `reading`."""
    model, step = make_step(*case)
    _, peer = make_step(*case)
    with record_expert_load(model, training_only=True) as load:
        seconds = alternate({"with": step, "without": peer}, runs, steps)
        reading = [_seconds(lambda: load.summed_over_ranks().as_dict()) for _ in range(runs)]
    return seconds | {"reading": reading}


def _seconds(call: Callable[[], object]) -> float:
    """Process CPU seconds of one call."""
    start = time.process_time()
    call()
    return time.process_time() - start


def share_of_hooks(model: torch.nn.Module, step: Callable[[], None], steps: int) -> float:
    """Share of a step's CPU time that passes inside the hooks, the median over steps."""
    inside = 0.0

    def timed(hook: Callable) -> Callable:
        def call(*args: object, **kwargs: object) -> object:
            nonlocal inside
            start = time.thread_time()
            try:
                return hook(*args, **kwargs)
            finally:
                inside += time.thread_time() - start

        return call

    shares = []
    hooks = {name: timed(getattr(Listener, name)) for name in HOOKS}
    with mock.patch.multiple(Listener, **hooks), record_expert_load(model, training_only=True):
        step()
        for _ in range(steps):
            inside, start = 0.0, time.thread_time()
            step()
            shares.append(inside / (time.thread_time() - start))
    return statistics.median(shares)


def main() -> None:
    """Measure each case, print the table, write the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=10, choices=(10, 20, 30))
    parser.add_argument("--steps", type=int, default=10, help="steps per run")
    options = parser.parse_args()
    torch.set_num_threads(1)
    result: dict = {"budget": BUDGET, "runs": options.runs, "steps": options.steps, "cases": {}}
    print(f"{'case':30} {'ms/step':>8} {'with / without [95%]':>26} {'hooks':>9} {'read ms':>8}")
    for case, size in CASES.items():
        seconds = paired(size, options.runs, options.steps)
        ratio = paired_ratio(seconds["with"], seconds["without"])
        share = round(share_of_hooks(*make_step(*size), max(options.steps, 5)), 5)
        reading = 1000 * statistics.median(seconds["reading"])
        milliseconds = 1000 * sum(seconds["without"]) / options.runs
        result["cases"][case] = {
            "step_cpu_ms": round(milliseconds, 2),
            "ratio_with_without": ratio,
            "share_of_hooks": share,
            "reading_cpu_ms": round(reading, 3),
        }
        interval = f"{ratio['median']:.4f} [{ratio['low']:.4f}, {ratio['high']:.4f}]"
        print(
            f"{case:30} {milliseconds:8.1f} {interval:>26} {share:9.2%} {reading:8.2f}", flush=True
        )
    write_result("telemetry_cost", result)


if __name__ == "__main__":
    main()

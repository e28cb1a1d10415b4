# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""LoRA on experts: the routed path beside PEFT's own path on transformers' grouped_mm.

    OMP_NUM_THREADS=1 python benchmarks/expert_lora.py
    OMP_NUM_THREADS=1 python benchmarks/expert_lora.py --int8

One bank of experts with rank 8 on both parameters, forward and backward; and a whole training step
(forward, backward and AdamW on text) of a small model: VLMoE with two layers of shape B. Every run
of a case is a fresh process, the two paths in turn. Time is process CPU time on one thread, the
median over a run's steps; memory is the peak resident size of the first step above the size after
building. The table gives PEFT's figure divided by ours: the median over the runs. With `--int8` the
two paths are the routed one on plain and on int8 experts, and the bytes of the experts are added to
the memory.
"""

import argparse
import ctypes
import multiprocessing
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from measure import write_result
from peft import LoraConfig, get_peft_model
from torch import nn
from torchao.quantization import quantize_
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

import vlmoe
from vlmoe.lora import wrappers as expert_lora  # before the runs, which start as copies of this one

RANK = 8
SHAPES = {  # experts, k, hidden, intermediate
    "A": (8, 2, 576, 1536),
    "B": (16, 4, 512, 512),
    "C": (64, 6, 1024, 512),
}
TOKENS = (64, 512, 2048)
MODEL_TOKENS = (64, 1024)
PATHS = ("peft", "routed")
INT8_PATHS = ("routed", "int8")
TARGETS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
STEP_SECONDS = 2.0  # of CPU time, about, that a run spends on timed steps


class Bank(nn.Module):
    """One bank of experts, where PEFT finds it."""

    def __init__(self, num_experts: int, hidden: int, intermediate: int):
        super().__init__()
        config = SimpleNamespace(
            num_experts=num_experts,
            hidden_size=hidden,
            moe_intermediate_size=intermediate,
            hidden_act="silu",
            _experts_implementation="grouped_mm",
        )
        self.mlp = nn.Module()
        self.mlp.experts = Qwen3MoeExperts(config)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.02)

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        """As the experts."""
        return self.mlp.experts(*inputs)


def with_adapters(model: nn.Module, path: str) -> nn.Module:
    if path == "int8":
        model.mlp.experts.config._experts_implementation = "eager"
        quantize_(model, vlmoe.expert_int8_config().quant_type, filter_fn=None)
    config = LoraConfig(r=RANK, target_modules=[], target_parameters=TARGETS)
    model = get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    if path != "peft":
        expert_lora.enable_routed_lora(model)
    return model


def bank_step(shape: str, tokens: int, dtype: torch.dtype, path: str) -> Callable[[], None]:
    """Forward and backward of one bank; tokens and routing weights get gradients too."""
    experts, k, hidden, intermediate = SHAPES[shape]
    model = with_adapters(Bank(experts, hidden, intermediate).to(dtype), path)
    x = torch.randn(tokens, hidden, dtype=dtype, requires_grad=True)
    weights, choice = torch.rand(tokens, experts).topk(k, -1)
    weights = (weights / weights.sum(-1, keepdim=True)).to(dtype).requires_grad_()
    grad = torch.randn_like(x)

    def step() -> None:
        model.zero_grad()
        x.grad = weights.grad = None
        model(x, choice, weights).backward(grad)

    return step


def model_step(tokens: int, path: str) -> Callable[[], None]:
    """One optimizer step of a model with two layers of shape B on rows of 32 text tokens."""
    experts, k, hidden, intermediate = SHAPES["B"]
    config = vlmoe.VLMoEConfig.from_preset("tiny").to_dict()
    config["text_config"] |= {
        "num_experts": experts,
        "num_experts_per_tok": k,
        "hidden_size": hidden,
        "moe_intermediate_size": intermediate,
        "head_dim": hidden // config["text_config"]["num_attention_heads"],
        "router_aux_loss_coef": 0.0,
    }
    model = vlmoe.VLMoEForConditionalGeneration(vlmoe.VLMoEConfig(**config))
    model.set_experts_implementation("grouped_mm")
    model = with_adapters(model, path)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-4)
    ids = torch.randint(6, model.config.text_config.vocab_size, (tokens // 32, 32))

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def resident(field: str) -> float:
    """MiB of `VmRSS` (now) or `VmHWM` (the peak)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def run_case(case: tuple[str, int, str, str]) -> dict[str, float]:
    """Build, one step for the memory, then timed steps."""
    shape, tokens, dtype, path = case
    torch.manual_seed(0)
    if shape == "model":
        step = model_step(tokens, path)
    else:
        step = bank_step(shape, tokens, getattr(torch, dtype), path)
    warm = torch.randn(256, 256, requires_grad=True)
    (warm @ warm).sum().backward()  # what torch itself takes once: buffers, threads
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident("VmRSS")
    start = time.process_time()
    step()
    steps = max(3, min(200, int(STEP_SECONDS / (time.process_time() - start))))
    memory = resident("VmHWM") - before
    seconds = []
    for _ in range(steps):
        start = time.process_time()
        step()
        seconds.append(time.process_time() - start)
    return {"cpu_seconds": statistics.median(seconds), "peak_mib": memory}


def stored_mib(case: tuple[str, int, str, str]) -> float:
    """MiB of the experts' weights: of int8 a byte each, and five for each row."""
    experts, _, hidden, intermediate = SHAPES[case[0]]
    rows, numbers = experts * (2 * intermediate + hidden), experts * 3 * hidden * intermediate
    size = getattr(torch, case[2]).itemsize
    return (numbers + 5 * rows if case[3] == "int8" else numbers * size) / 2**20


def measure(
    cases: list[tuple[str, int, str]], runs: int, paths: tuple[str, str] = PATHS
) -> dict[str, dict[str, list]]:
    """Of each case and path, the figures of all runs."""
    results: dict[str, dict[str, list]] = {}
    context = multiprocessing.get_context("fork")
    for _ in range(runs):
        for case in cases:
            for path in paths:
                with context.Pool(1, maxtasksperchild=1) as pool:
                    result = pool.apply(run_case, ((*case, path),))
                if paths == INT8_PATHS:
                    result["peak_mib"] += stored_mib((*case, path))
                key = " ".join(map(str, case))
                results.setdefault(key, {}).setdefault(path, []).append(result)
    return results


def ratios(paths: dict[str, list]) -> dict[str, float]:
    """Divide the first path's figures by the second's, run by run: medians, times' extremes."""
    pairs = list(zip(*paths.values(), strict=True))
    time_ratios = [peer["cpu_seconds"] / ours["cpu_seconds"] for peer, ours in pairs]
    memory = [peer["peak_mib"] / max(ours["peak_mib"], 0.1) for peer, ours in pairs]
    return {
        "time": round(statistics.median(time_ratios), 3),
        "time_lowest": round(min(time_ratios), 3),
        "time_highest": round(max(time_ratios), 3),
        "memory": round(statistics.median(memory), 2),
    }


def main() -> None:
    """Measure, print the table, write the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--only", help="cases that start with this, nothing is written")
    parser.add_argument("--int8", action="store_true", help="plain experts beside int8 experts")
    options = parser.parse_args()
    paths = INT8_PATHS if options.int8 else PATHS
    torch.set_num_threads(1)
    cases = [(s, t, d) for d in ("float32", "bfloat16") for s in SHAPES for t in TOKENS]
    if not options.int8:
        cases += [("model", tokens, "float32") for tokens in MODEL_TOKENS]
    if options.only:
        cases = [case for case in cases if " ".join(map(str, case)).startswith(options.only)]
    results = measure(cases, options.runs, paths)
    names = [f"{path} s" for path in paths]
    print(f"{'case':22} {names[0]:>9} {names[1]:>9} {'time':>6} {'lowest':>7} {'memory':>7}")
    summary = {key: ratios(runs) for key, runs in results.items()}
    for key, runs in results.items():
        seconds = [statistics.median(r["cpu_seconds"] for r in each) for each in runs.values()]
        ratio = summary[key]
        print(
            f"{key:22} {seconds[0]:9.4f} {seconds[1]:9.4f} {ratio['time']:6.2f} "
            f"{ratio['time_lowest']:7.2f} {ratio['memory']:7.1f}"
        )
    if not options.only:
        shapes = {"shapes": SHAPES, "rank": RANK, "runs": options.runs}
        name = "expert_lora_int8" if options.int8 else "expert_lora"
        write_result(name, {**shapes, "_over_".join(paths): summary, "cases": results})


if __name__ == "__main__":
    main()

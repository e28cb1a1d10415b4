# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Forward and backward of the language part beside transformers' Qwen3-VL-MoE, at equal sizes.

    OMP_NUM_THREADS=1 python benchmarks/language_part.py

Both get the same `inputs_embeds` and labels, hold the same number of decoder parameters and run the
same experts implementation. "bare" has cross-entropy only, "balanced" also each model's own load
balancing loss. One thread, process CPU time; a run alternates single steps of both and keeps each
one's median.
"""

import argparse
from collections.abc import Callable

import torch
from measure import alternate, paired_ratio, write_result
from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

from vlmoe import VLMoEConfig, VLMoEForConditionalGeneration

SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 1000,
}
BATCH, LENGTH = 8, 64


def build(aux_coef: float) -> dict[str, torch.nn.Module]:
    """Both models with random weights of equal shapes."""
    vision = {
        "depth": 1,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_heads": 2,
        "out_hidden_size": 256,
    }
    peer_text = SHAPE | {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 4, 4]}
    }
    peer_text |= {"router_aux_loss_coef": aux_coef, "norm_topk_prob": True, "mlp_only_layers": []}
    peer_config = Qwen3VLMoeConfig(
        text_config=peer_text,
        vision_config=vision | {"deepstack_visual_indexes": [0]},
        image_token_id=5,
    )
    peer_config.text_config.output_router_logits = aux_coef > 0
    our_vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 32,
        "image_size": 32,
    }
    our_vision |= {
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "patch_size": 16,
        "vision_use_head": False,
    }
    our_text = SHAPE | {"qk_norm": True, "router_aux_loss_coef": aux_coef}
    our_config = VLMoEConfig(text_config=our_text, vision_config=our_vision, image_token_id=5)
    models = {
        "vlmoe": VLMoEForConditionalGeneration(our_config),
        "qwen3_vl_moe": Qwen3VLMoeForConditionalGeneration(peer_config),
    }
    for model in models.values():
        model.set_experts_implementation("grouped_mm")
    return models


def step(
    model: torch.nn.Module, inputs_embeds: torch.Tensor, labels: torch.Tensor
) -> Callable[[], None]:
    """One forward and backward; in eval mode, where no dropout and no dummy image add to it."""
    model.eval()
    mask = torch.ones_like(labels)
    positions = torch.arange(LENGTH).expand(BATCH, -1)
    if "Qwen3" in type(model).__name__:
        positions = positions.expand(3, -1, -1)

    def run() -> None:
        model.zero_grad()
        model(
            inputs_embeds=inputs_embeds, attention_mask=mask, position_ids=positions, labels=labels
        ).loss.backward()

    return run


def main() -> None:
    """Measure, print the table, write the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=10, choices=(10, 20, 30))
    parser.add_argument("--steps-per-run", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    inputs_embeds = torch.randn(BATCH, LENGTH, SHAPE["hidden_size"])
    labels = torch.randint(0, SHAPE["vocab_size"], (BATCH, LENGTH))

    result: dict = {
        "shape": SHAPE,
        "batch": BATCH,
        "length": LENGTH,
        "steps_per_run": options.steps_per_run,
        "cases": {},
    }
    print(f"{'case':10} {'ours s':>9} {'peer s':>9} {'ratio':>7}  95% interval")
    for case, aux_coef in (("bare", 0.0), ("balanced", 0.001)):
        models = build(aux_coef)
        decoders = [
            sum(p.numel() for p in model.model.language_model.parameters())
            for model in models.values()
        ]
        assert decoders[0] == decoders[1], f"decoders of different sizes: {decoders}"

        steps = {name: step(model, inputs_embeds, labels) for name, model in models.items()}
        seconds = alternate(steps, options.runs, options.steps_per_run)
        ratio = paired_ratio(seconds["vlmoe"], seconds["qwen3_vl_moe"])
        result["cases"][case] = {
            "cpu_seconds_per_step": seconds,
            "ratio": ratio,
            "decoder_parameters": decoders[0],
        }
        ours, peer = (sorted(values)[len(values) // 2] for values in seconds.values())
        print(
            f"{case:10} {ours:9.4f} {peer:9.4f} {ratio['median']:7.3f}  "
            f"{ratio['low']:.3f} to {ratio['high']:.3f}"
        )
    write_result("language_part", result)


if __name__ == "__main__":
    main()

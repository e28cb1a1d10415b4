# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""How far one step of `transformers.Trainer` moves when its batch is split, beside the peers.

    OMP_NUM_THREADS=1 python benchmarks/split_invariance.py

The same eight rows (unequal lengths and label counts, one without a label, text only, two images)
go through Trainer as it is: whole, by accumulation, on two gloo ranks, with gradient checkpointing.
Each gradient, before clipping, is compared with the model's own for the whole batch.
"cross-entropy" has no router loss, "balanced" the model's own load balancing loss (in VLMoE the
z-loss too) with coefficient 1, "SparseLoss" ours in its place. VLMoE is measured with each scope of
its balance loss. Language models get the same token ids without the images. Gemma 4's class has no
balancing loss, and its own cross-entropy is the mean over micro-batches.
"""

import argparse
import itertools
import os
import socket
import tempfile
from pathlib import Path
from typing import Any

import torch
from measure import write_result
from native_models import (
    BALANCED_BY_CLASS,
    IMAGE_TOKEN,
    LANGUAGE_MODELS,
    TEXT_FIELDS,
    native_images,
    native_model,
)
from transformers import Trainer, TrainerCallback, TrainingArguments

from vlmoe import SparseLoss, VLMoEConfig, VLMoEForConditionalGeneration

Gradients = dict[str, torch.Tensor]

IMAGE_LENGTH, VOCABULARY = 4, 200
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": VOCABULARY,
    "initializer_range": 0.1,
}
SCOPES = {"vlmoe": "sequence", "vlmoe_batch": "batch", "vlmoe_global": "global"}
CASES = {
    **dict.fromkeys(SCOPES, ("cross-entropy", "balanced")),
    **{
        name: ("cross-entropy", *["balanced"] * (name in BALANCED_BY_CLASS), "SparseLoss")
        for name in TEXT_FIELDS
    },
}
"""The losses of each model."""
ROWS = ((1, 9, 3), (2, 6, 1), (0, 20, 15), (1, 12, 2), (1, 7, 0), (0, 9, 8), (1, 25, 20), (1, 5, 1))
"""(images, text tokens, of these at the end with a label) of each row."""
ROUTERS = ("mlp.router.weight", "mlp.gate.weight", "router.proj.weight")
WHOLE = (1, 1, False)
WAYS = (
    WHOLE,
    (1, 1, True),
    *((1, n, False) for n in (2, 4, 8)),
    (1, 8, True),
    *((2, n, False) for n in (1, 2, 4)),
)
"""(ranks, accumulation, checkpointing): the whole batch, then the ways to split it."""


def build(name: str, coefficient: float) -> torch.nn.Module:
    """One of `CASES` with random weights, the same ones in every process."""
    torch.manual_seed(0)
    if name in TEXT_FIELDS:
        return native_model(name, SHAPE, coefficient)
    text = SHAPE | {"router_aux_loss_coef": coefficient, "router_z_loss_coef": coefficient}
    text |= {"qk_norm": True, "pad_token_id": 0, "router_aux_loss_scope": SCOPES[name]}
    vision = {"hidden_size": 32, "intermediate_size": 64}
    vision |= {"model_type": "siglip_vision_model", "num_hidden_layers": 2, "patch_size": 4}
    vision |= {"num_attention_heads": 4, "image_size": 16, "vision_use_head": False}
    top = {"text_config": text, "vision_config": vision}
    top |= {"image_token_id": IMAGE_TOKEN, "pixel_shuffle_factor": 2}
    return VLMoEForConditionalGeneration(VLMoEConfig(**top))


def make_rows() -> list[dict[str, Any]]:
    """`ROWS` as token ids, labels and images (3, 16, 16)."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for images, length, labelled in ROWS:
        image = torch.full((IMAGE_LENGTH,), IMAGE_TOKEN)
        text = torch.randint(IMAGE_TOKEN + 1, VOCABULARY, (length,), generator=generator)
        before = [part for i in range(images) for part in (text[i : i + 1], image)]
        ids = torch.cat([*before, text[images:]])
        labels = torch.full_like(ids, -100)
        labels[len(ids) - labelled :] = ids[len(ids) - labelled :]
        pixels = torch.randn(images, 3, 16, 16, generator=generator)
        rows.append({"ids": ids, "labels": labels, "pixels": pixels})
    return rows


class Collator:
    """Rows to the inputs of one model, padded on the right."""

    def __init__(self, name: str):
        self.name = name

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Token ids, mask, labels (batch, length), and the images as the model takes them."""
        pad = torch.nn.utils.rnn.pad_sequence
        ids = pad([row["ids"] for row in rows], True, 0)
        batch = {
            "input_ids": ids,
            "attention_mask": (ids != 0).long(),
            "labels": pad([row["labels"] for row in rows], True, -100),
        }
        if self.name in LANGUAGE_MODELS:
            return batch
        batch["mm_token_type_ids"] = (ids == IMAGE_TOKEN).long()
        pixels = torch.cat([row["pixels"] for row in rows])  # (images, 3, 16, 16)
        if not len(pixels):
            return batch
        if self.name in SCOPES:
            return batch | {"pixel_values": pixels}
        return batch | native_images(self.name, pixels)


class Recorder(TrainerCallback):
    """Keeps the gradients of the step."""

    def on_pre_optimizer_step(self, *args: Any, model: torch.nn.Module, **kwargs: Any) -> None:
        """Before the step; nothing was clipped."""
        gradients = {name: p.grad for name, p in model.named_parameters()}
        self.gradients = {n: g.clone() for n, g in gradients.items() if g is not None}


def gradients(
    name: str, case: str, accumulation: int, checkpointing: bool, folder: str
) -> Gradients:
    """Compute the gradients of one step of Trainer, in as many processes as it finds."""
    arguments = TrainingArguments(
        output_dir=folder,
        gradient_accumulation_steps=accumulation,
        activation_checkpointing=checkpointing,
        max_steps=1,
        optim="sgd",
        max_grad_norm=0.0,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    arguments.per_device_train_batch_size = len(ROWS) // (accumulation * arguments.world_size)
    recorder = Recorder()
    model = build(name, float(case == "balanced"))
    Trainer(
        model,
        arguments,
        Collator(name),
        train_dataset=make_rows(),
        callbacks=[recorder],
        compute_loss_func=SparseLoss(model, balance=1.0) if case == "SparseLoss" else None,
    ).train()
    return recorder.gradients


def every_gradient(ranks: int, folder: str) -> dict[tuple[Any, ...], Gradients]:
    """Compute the gradients of every model, case and way to split the rows over that many ranks."""
    return {
        (name, case, way): gradients(name, case, *way[1:], folder)
        for name, cases in CASES.items()
        for case in cases
        for way in WAYS
        if way[0] == ranks
    }


def on_rank(rank: int, ranks: int, port: int, folder: str) -> None:
    """One process of the group; the first one writes its gradients."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank)}
    os.environ |= {"LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    found = every_gradient(ranks, folder)
    if rank == 0:
        torch.save(found, Path(folder, "gradients.pt"))


def distance(ours: Gradients, whole: Gradients) -> dict[str, float]:
    """Relative L2 distance of all parameters as one, of the worst one, and of the worst router.

    Biases of keys, whose gradient is zero in exact arithmetic, are taken relative to the queries'.
    """
    each = {
        name: ((ours[name] - g).norm() / whole[name.replace("k_proj.b", "q_proj.b")].norm()).item()
        for name, g in whole.items()
    }
    routers = [name for name in each if name.endswith(ROUTERS)]
    assert len(routers) == SHAPE["num_hidden_layers"], routers
    together, reference = (torch.cat([g[n].flatten() for n in whole]) for g in (ours, whole))
    return {
        "all": ((together - reference).norm() / reference.norm()).item(),
        "worst": max(each.values()),
        "router": max(each[name] for name in routers),
    }


def main() -> None:
    """Measure, print the table, write the result."""
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        found = every_gradient(1, folder)
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        torch.multiprocessing.start_processes(on_rank, (2, port, folder), 2, start_method="spawn")
        found |= torch.load(Path(folder, "gradients.pt"))
    cases = []
    print(f"{'model':13} {'loss':14} ranks accumulation ckpt {'all':>8} {'worst':>8} {'router':>8}")
    pairs = [(name, case) for name, losses in CASES.items() for case in losses]
    for (name, case), way in itertools.product(pairs, WAYS[1:]):
        far = distance(found[name, case, way], found[name, case, WHOLE])
        ranks, accumulation, checkpointing = way
        split = {"ranks": ranks, "accumulation": accumulation, "checkpointing": checkpointing}
        cases.append({"model": name, "loss": case} | split | far)
        ckpt = "on" if checkpointing else "off"
        print(f"{name:13} {case:14} {ranks:5} {accumulation:12} {ckpt:4}", end="")
        print("".join(f" {value:8.1e}" for value in far.values()))
    write_result("split_invariance", {"shape": SHAPE, "rows": ROWS, "cases": cases})


if __name__ == "__main__":
    main()

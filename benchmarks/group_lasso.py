# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""How many neurons of experts can be zero? A model that reads digits is trained on, ever sparser.

    pip install scikit-learn
    OMP_NUM_THREADS=1 python benchmarks/group_lasso.py
    OMP_NUM_THREADS=1 python benchmarks/group_lasso.py --shares 1.2 --base_steps 20 --steps 10 \\
        --output_dir outputs/try --results outputs/try/group_lasso.json

The data are scikit-learn's 1,797 digits of 8 x 8 pixels, the last 360 held out, and each training
picture once more, shifted by a pixel. A `tiny` model learns to answer with the digit. From it every
arm trains on with the same schedule, with a share of the group lasso each; its zero neurons are cut
off, and the held-out digits are answered by the model before and after the cut. As a control, as
many neurons, those of the smallest norm, are removed from the arm without group lasso.

What a killed run has finished is kept.
"""

import argparse
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import RESULTS, environment
from PIL import Image
from sklearn.datasets import load_digits

import vlmoe
from vlmoe.hub.atomic_files import write_json
from vlmoe.hub.provenance import saved_json
from vlmoe.hub.saved_model import load_model, read_processor
from vlmoe.routing.neuron_banks import neuron_banks
from vlmoe.training.group_lasso import GroupLasso

HELD_OUT = 360
BATCH = 32
RATE = 1e-3
SIZES = {
    "vision_config": {"image_size": 16, "patch_size": 4},
    "pixel_shuffle_factor": 2,
}
Rows = list[dict[str, Any]]


def digits() -> tuple[Rows, Rows]:
    """Return rows to train on, with a shifted copy of each, and rows that are held out."""
    data = load_digits()
    pixels = (data.images * (255 / 16)).astype(np.uint8)  # (1797, 8, 8)
    generator = np.random.default_rng(0)
    train, held_out = [], []
    for number, (image, label) in enumerate(zip(pixels, data.target, strict=True)):
        if number >= len(pixels) - HELD_OUT:
            held_out.append(row(image, label))
            continue
        shifted = np.roll(image, generator.choice([-1, 1]), axis=generator.integers(2))
        train += [row(image, label), row(shifted, label)]
    return train, held_out


def row(image: np.ndarray, label: int) -> dict[str, Any]:
    """Return a question about a picture."""
    picture = Image.fromarray(image).convert("RGB").resize((16, 16), Image.Resampling.BILINEAR)
    return {"image": picture, "question": "which digit?", "answer": str(label)}


def train(model: Any, processor: Any, rows: Rows, folder: Path, steps: int, share: float) -> Any:
    """Train with a linear schedule and save; return the trainer."""
    arguments = {
        "output_dir": str(folder),
        "max_steps": steps,
        "per_device_train_batch_size": BATCH,
        "learning_rate": RATE,
        "lr_scheduler_type": "linear",
        "save_strategy": "no",
        "eval_strategy": "no",
        "logging_steps": 50,
        "report_to": "none",
        "seed": 0,
        "use_cpu": True,
    }
    overrides = {"model_overrides": SIZES} if isinstance(model, str) else {}
    trainer = vlmoe.VLMoETrainer(
        model,
        arguments,
        train_dataset=rows,
        processing_class=processor,
        callbacks=[GroupLasso(share=share)] if share else [],
        **overrides,
    )
    trainer.train()
    trainer.save_model(str(folder))
    return trainer


def accuracy(folder: Path, held_out: Rows) -> float:
    """Let the model of a folder answer."""
    model, processor = load_model(folder).eval(), read_processor(folder)
    return vlmoe.evaluate(model, processor, held_out, batch_size=HELD_OUT).exact_match


def run_arm(share: float, train_rows: Rows, held_out: Rows, options: Any) -> dict[str, Any]:
    """Train on with a share, cut and measure, unless that is done."""
    folder = options.output_dir / f"share_{share:g}"
    done = saved_json(folder / "result.json")
    if done is not None:
        return done
    base, cut = options.output_dir / "base", folder / "cut"
    start = time.process_time()
    train(load_model(base), read_processor(base), train_rows, folder, options.steps, share)
    result: dict[str, Any] = {"share": share, "cpu_seconds": time.process_time() - start}
    banks = neuron_banks(load_model(folder))[0]
    alive = torch.stack([bank.alive().sum(1) for bank in banks])  # (layers, experts)
    neurons = alive.numel() * banks[0].width
    result |= {
        "accuracy": accuracy(folder, held_out),
        "zero_share": 1 - alive.sum().item() / neurons,
        "neurons": alive.tolist(),
    }
    if result["zero_share"] > 0:
        shutil.rmtree(cut, ignore_errors=True)
        report = vlmoe.prune(folder, cut)
        result |= {
            "width": report.width,
            "error": report.error,
            "parameters": {name: each["total"] for name, each in report.parameters.items()},
            "accuracy_cut": accuracy(cut, held_out),
        }
        result["accuracy_by_magnitude"] = by_magnitude(result["zero_share"], held_out, options)
    write_json(folder / "result.json", result)
    return result


def by_magnitude(zero_share: float, held_out: Rows, options: Any) -> float | None:
    """Remove the neurons of the smallest norm from the arm without group lasso, and measure."""
    folder = options.output_dir / "share_0"
    if not folder.is_dir():
        return None
    model = load_model(folder).eval()
    banks = neuron_banks(model)[0]
    limit = torch.cat([bank.norms().flatten() for bank in banks]).quantile(zero_share)
    with torch.no_grad():
        for bank in banks:
            kept = (bank.norms() > limit).float()
            bank.gate_and_up.mul_(kept[:, None, :, None])
            bank.down.mul_(kept[:, None])
    return vlmoe.evaluate(model, read_processor(folder), held_out, batch_size=HELD_OUT).exact_match


def main() -> None:
    """Run what is missing, print the table, write the result."""
    options = parse_options()
    torch.set_num_threads(1)
    train_rows, held_out = digits()
    base = options.output_dir / "base"
    if not (base / "config.json").is_file():
        train("tiny", None, train_rows, base, options.base_steps, 0)
    config = {"base_steps": options.base_steps, "steps": options.steps, "batch": BATCH}
    result = {
        "base_accuracy": accuracy(base, held_out),
        "arms": [run_arm(share, train_rows, held_out, options) for share in options.shares],
        "config": config | {"learning_rate": RATE, "sizes": SIZES, "seed": 0},
        "environment": environment(),
    }
    write_json(options.results, result)
    print(f"before: {result['base_accuracy']:.2%}")
    for arm in result["arms"]:
        line = f"share {arm['share']:g}: {arm['accuracy']:.2%}, {arm['zero_share']:.1%} zero"
        if "width" in arm:
            line += f", width {arm['width']['after']}, cut {arm['accuracy_cut']:.2%}"
            line += f", error {arm['error']:.1e}, by magnitude {arm['accuracy_by_magnitude']:.2%}"
        print(line)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shares", type=float, nargs="+", default=[0, 0.6, 1.2])
    parser.add_argument("--base_steps", type=int, default=1080)
    parser.add_argument("--steps", type=int, default=180)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/group_lasso"))
    parser.add_argument("--results", type=Path, default=RESULTS / "group_lasso.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()

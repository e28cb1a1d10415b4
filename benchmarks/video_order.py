# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""The order of events in videos: a tiny model watches three emoji and names them in their order.

    python benchmarks/video_order.py --output_dir outputs/video_order

- A clip has three frames, one emoji each, of twelve, shifted, scaled and recolored anew. The
  question is "in which order do they appear?". Only the frames' order tells that of the names.
- A fifth of the sets of three emoji is held out: neither a test clip nor any other order of it was
  trained on. The drawings of the test are new, too.
- Controls: the same frames reversed, against the reversed and against the original answer; the same
  clips as MP4 files, which the model was not trained on; a model that was never shown a picture.
- A run goes on where it was stopped: training from its last checkpoint, evaluation after it.

Needs the extras `emoji` and `video`. Writes results/video_order.json.
"""

import argparse
import hashlib
import io
import itertools
import json
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import write_result
from PIL import Image

from vlmoe import VLMoETrainer, evaluate
from vlmoe.data.emoji import draw, emoji_table
from vlmoe.data.scenes import EMOJI as EMOJI_OF_SCENES
from vlmoe.hub.atomic_files import write_json
from vlmoe.training.checkpoints import find_checkpoint

EMOJI = EMOJI_OF_SCENES[::2]
QUESTION = "in which order do they appear?"
FRAMES, HELD_OUT = 3, 5
SEED = 0
MODEL = {
    "pixel_shuffle_factor": 2,
    "vision_config": {"image_size": 32, "patch_size": 8},
}
TRAINING = {
    "per_device_train_batch_size": 16,
    "learning_rate": 2e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 50,
    "adam_beta2": 0.95,
    "weight_decay": 0.1,
}
DRAWINGS = {"train": 300, "test": 20}
"""Drawings of each emoji in a split."""

Clip = tuple[str, ...]
Pool = dict[str, list[Image.Image]]


def clips(split: str, count: int) -> list[Clip]:
    """Draw names in an order, from the sets of a split."""
    sets = [
        each for each in itertools.combinations(EMOJI, FRAMES) if is_test(each) == (split == "test")
    ]
    rng = random.Random(f"{SEED} {split}")
    return [tuple(rng.sample(rng.choice(sets), FRAMES)) for _ in range(count)]


def is_test(names: Clip) -> bool:
    """Whether a set of names is held out, which follows from the names alone."""
    digest = hashlib.blake2b("".join(sorted(names)).encode(), digest_size=1).digest()
    return digest[0] % HELD_OUT == 0


def drawings(split: str) -> Pool:
    """Draw each emoji of the clips several times."""
    rng = np.random.default_rng([SEED, len(split)])
    by_name = {each.names["en"]: each for each in emoji_table()}
    return {name: [draw(by_name[name], rng) for _ in range(DRAWINGS[split])] for name in EMOJI}


def rows(split: str, count: int, pool: Pool) -> list[dict[str, Any]]:
    """Make rows of clips: frames at one a second, and the names in their order."""
    rng = random.Random(f"{SEED} {split} frames")
    return [
        row([rng.choice(pool[name]) for name in clip], clip, f"{split}[{number}]", fps=1)
        for number, clip in enumerate(clips(split, count))
    ]


def row(video: Any, names: Clip, name: str, **sampling: float) -> dict[str, Any]:
    """Make one row."""
    asked = [{"type": "video", **sampling}, {"type": "text", "text": QUESTION}]
    messages = [
        {"role": "user", "content": asked},
        {"role": "assistant", "content": ", ".join(names)},
    ]
    return {"id": name, "messages": messages, "videos": [video]}


def blind(given: dict[str, Any]) -> dict[str, Any]:
    """Return a row without its video."""
    asked, answer = given["messages"]
    return {"id": given["id"], "messages": [{**asked, "content": QUESTION}, answer]}


def reversed_frames(given: dict[str, Any]) -> dict[str, Any]:
    """Return a row with its frames in reverse, and the answer of before."""
    return {**given, "videos": [frames[::-1] for frames in given["videos"]]}


def as_file(given: dict[str, Any], rate: int = 4) -> dict[str, Any]:
    """Return a row with its frames as an MP4 file, in which each stays for a second."""
    import av

    file = io.BytesIO()
    [frames] = given["videos"]
    with av.open(file, "w", format="mp4") as container:
        stream: Any = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height = frames[0].size
        stream.bit_rate, stream.pix_fmt = 2_000_000, "yuv420p"
        for frame in frames:
            for _ in range(rate):
                container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())
    names = tuple(given["messages"][1]["content"].split(", "))
    return row(file.getvalue(), names, given["id"], num_frames=FRAMES)


def train(folder: Path, training_rows: list[dict[str, Any]], steps: int) -> VLMoETrainer:
    """Train a new model for `steps`, or go on."""
    arguments = {
        **TRAINING,
        "output_dir": str(folder),
        "max_steps": steps,
        "save_strategy": "steps",
        "save_steps": 200,
        "save_total_limit": 1,
        "logging_steps": 50,
        "seed": SEED,
        "use_cpu": True,
        "report_to": "none",
    }
    trainer = VLMoETrainer("tiny", arguments, train_dataset=training_rows, model_overrides=MODEL)
    checkpoint = find_checkpoint("last", folder) if folder.exists() else None
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    return trainer


def figures(trainer: VLMoETrainer, test: list[dict[str, Any]]) -> dict[str, float]:
    """Count the answers that are right, in reverse, and right but for the order."""
    found = evaluate(trainer.model, trainer.processing_class, test, max_new_tokens=48)
    pairs = [
        (each["prediction"].split(", "), each["reference"].split(", "))
        for each in found.predictions
    ]
    counts = {
        "original": sum(said == names for said, names in pairs),
        "reversed": sum(said == names[::-1] for said, names in pairs),
        "any_order": sum(sorted(said) == sorted(names) for said, names in pairs),
    }
    return {name: round(count / len(pairs), 4) for name, count in counts.items()}


def main() -> None:
    """Train and evaluate what is not done yet, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/video_order"))
    parser.add_argument("--steps", type=int, default=400, help="optimizer steps")
    parser.add_argument("--blind_steps", type=int, default=100, help="of the model without frames")
    parser.add_argument("--train", type=int, default=8000, help="clips")
    parser.add_argument("--test", type=int, default=300, help="clips")
    args = parser.parse_args()
    torch.set_num_threads(1)
    done_file = args.output_dir / "figures.json"
    done = json.loads(done_file.read_text()) if done_file.exists() else {}
    test = rows("test", args.test, drawings("test"))
    controls = {
        "frames": test,
        "reversed frames": [reversed_frames(each) for each in test],
        "MP4 files": [as_file(each) for each in test],
    }
    sides = {"watching": (args.steps, controls)}
    sides["blind"] = (args.blind_steps, {"no frames": [blind(each) for each in test]})
    for side, (steps, tests) in sides.items():
        if side in done:
            continue
        start = time.process_time()
        given = rows("train", args.train, drawings("train"))
        trained = train(
            args.output_dir / side, given if side == "watching" else list(map(blind, given)), steps
        )
        seconds = round(time.process_time() - start)
        found = {name: figures(trained, each) for name, each in tests.items()}
        done[side] = {"steps": steps, "cpu_seconds_of_this_session": seconds, "answers": found}
        write_json(done_file, done)
    for side, part in done.items():
        for name, shares in part["answers"].items():
            print(f"{side:<9} {name:<16} " + "  ".join(f"{k} {v:.1%}" for k, v in shares.items()))
    orders = len(EMOJI) * (len(EMOJI) - 1) * (len(EMOJI) - 2)
    config = {"seed": SEED, "model": MODEL, "training": TRAINING, "clips": vars(args)["train"]}
    result = {"config": config, "test_clips": args.test, "chance": 1 / orders, "runs": done}
    write_result("video_order", result)


if __name__ == "__main__":
    main()

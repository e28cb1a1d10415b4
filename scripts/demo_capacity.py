# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""The last part of the demo: what experts are for, on facts that only the parameters can hold.

1. The vision tower learns to see: what the cells of drawn emblems show (vlmoe/data/emblems.py).
2. A dense model and one with 16 experts, of which a token uses two, learn 2,048 facts about 256
   emblems: the same tower, steps, active parameters and FLOPs for a token.
3. Both are asked the facts in a phrasing that was never trained, on drawings never seen.

`benchmarks/capacity.py` is the whole comparison, with larger models, a grid of learning rates for
each of them, and three seeds.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch.utils.data import Dataset

if TYPE_CHECKING:
    import torch

    from vlmoe import VLMoEForConditionalGeneration, VLMoEProcessor
    from vlmoe.data.row_fields import AnyRow, Rows
    from vlmoe.hub.json_files import JsonObject

    Batch = dict[str, torch.Tensor]

ROWS = 64
"""Rows of a batch."""
SEES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 37, "mlp_only_layers": [0]}
"""Fields of the decoder beside which the tower learns to see; a narrow one takes it longer."""
SEE_RATE = 4e-3
ARMS: dict[str, tuple[dict[str, Any], float]] = {
    "dense": ({"hidden_size": 32, "intermediate_size": 21, "mlp_only_layers": [0]}, 0.048),
    "16 experts": (
        {
            "hidden_size": 32,
            "num_experts": 16,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 8,
            "router_aux_loss_scope": "batch",
            "router_aux_loss_coef": 0.01,
        },
        0.024,
    ),
}
"""Fields of the decoder, and the learning rate. The dense MLP is as wide as two experts and the
router together."""


@dataclass(frozen=True)
class Sizes:
    """How much is drawn and trained.

    Attributes:
        entities: emblems, with 8 facts each.
        see_batches: conversations for the vision tower to learn to see, in batches.
        see_epochs: over them.
        wordings: conversations about each entity.
        epochs: over them.
        asked: one of so many facts, at the end.
    """

    entities: int = 256
    see_batches: int = 80
    see_epochs: int = 10
    wordings: int = 8
    epochs: int = 12
    asked: int = 2


class FreshDrawings(Dataset):
    """Batches of rows, each one item, with new drawings whenever one is taken.

    The words are encoded once: to draw for a whole batch takes a fiftieth of the time that the
    processor needs for new rows.
    """

    def __init__(self, rows: "list[AnyRow]", seed: int, processor: "VLMoEProcessor"):
        import numpy as np

        from vlmoe.data.collator import VLMoECollator
        from vlmoe.data.emblems import symbol_bank

        collate = VLMoECollator(processor, share_images=False)
        # One picture stands for all of them here, so that it is processed once.
        blank = {"images": rows[0]["images"]}
        batches = [rows[i : i + ROWS] for i in range(0, len(rows), ROWS)]
        self.encoded = [collate([{**row, **blank} for row in batch]) for batch in batches]
        self.symbols = [np.stack([row["symbols"] for row in batch]) for batch in batches]
        self.bank = symbol_bank(seed, "train")
        self.rng = np.random.default_rng(seed)

    def __len__(self) -> int:
        """Return the number of batches."""
        return len(self.encoded)

    def __getitem__(self, number: int) -> "Batch":
        """Return a batch with new drawings in the place of its old ones."""
        import torch

        from vlmoe.data.emblems import draw_emblems

        drawn = torch.from_numpy(draw_emblems(self.bank, self.symbols[number], self.rng))
        pixels = drawn.movedim(-1, 1)[:, None] / 127.5 - 1  # (rows, 1, 3, height, width)
        return self.encoded[number] | {"pixel_values": pixels}


def run_capacity(output_dir: Path, seed: int, sizes: Sizes = Sizes()) -> "JsonObject":
    """Train both models and ask them; write capacity.json and draw capacity.png.

    Args:
        output_dir: of the demo.
        seed: of facts, drawings and weights.
        sizes: of the task and the training.

    Returns:
        The seed, the number of facts and of questions, and of each model its `accuracy` in 0..1 and
        its `parameters`.
    """
    from vlmoe.figures.plots import plot_accuracies
    from vlmoe.hub.atomic_files import write_json

    with _one_thread(), tempfile.TemporaryDirectory() as folder:
        found = _compare(folder, seed, sizes)
    write_json(output_dir / "capacity.json", found)
    plot_accuracies(
        {name: arm["accuracy"] for name, arm in found["models"].items()},
        output_dir / "capacity.png",
        title=f"{found['facts']:,} facts at equal active size",
    )
    return found


def capacity_table(found: "JsonObject") -> str:
    """Return a table of the models, one line each."""
    lines = [f"{found['facts']:,} facts about drawn emblems: new phrasings, new drawings"]
    lines.append(f"{'':<16}{'right':>9}{'parameters':>12}{'active':>9}")
    for name, arm in found["models"].items():
        total, active = (arm["parameters"][kind] for kind in ("total", "text_token"))
        lines.append(f"{name:<16}{arm['accuracy']:>9.2%}{total:>12,}{active:>9,}")
    return "\n".join(lines)


def _compare(folder: str, seed: int, sizes: Sizes) -> "JsonObject":
    from vlmoe import VLMoEProcessor
    from vlmoe.data.emblems import Emblems, emblem_config, emblem_tokenizer, perception_rows
    from vlmoe.training.evaluation import evaluate

    processor = VLMoEProcessor.for_config(emblem_config(), emblem_tokenizer())
    seeing = _new_model(SEES, seed)
    rows = list(perception_rows(sizes.see_batches * ROWS, seed))
    drawings = FreshDrawings(rows, seed, processor)
    _train(seeing, drawings, processor, SEE_RATE, sizes.see_epochs, seed, folder)
    tower = seeing.model.vision_tower.state_dict()
    task = Emblems(sizes.entities, seed)
    rows, questions = list(task.training_rows(sizes.wordings)), list(task.fact_rows("test"))
    questions = questions[:: sizes.asked]
    models = {}
    for name, (fields, rate) in ARMS.items():
        model = _new_model(fields, seed)
        model.model.vision_tower.load_state_dict(tower)
        model.model.vision_tower.requires_grad_(False)
        drawings = FreshDrawings(rows, seed, processor)
        _train(model, drawings, processor, rate, sizes.epochs, seed, folder)
        answers = evaluate(model, processor, questions, batch_size=256, max_new_tokens=1)
        accuracy = answers.exact_match
        models[name] = {"accuracy": accuracy, "parameters": model.active_parameters()}
    facts = task.values.size
    return {"seed": seed, "facts": facts, "questions": len(questions), "models": models}


def _new_model(fields: dict[str, Any], seed: int) -> "VLMoEForConditionalGeneration":
    from transformers import set_seed

    from vlmoe import VLMoEForConditionalGeneration
    from vlmoe.data.emblems import emblem_config

    set_seed(seed)
    return VLMoEForConditionalGeneration(emblem_config(**fields))


def _train(
    model: "VLMoEForConditionalGeneration",
    batches: FreshDrawings,
    processor: "VLMoEProcessor",
    rate: float,
    epochs: int,
    seed: int,
    folder: str,
) -> None:
    """Train over the batches; the rate rises over 100 steps at most, and falls to zero."""
    from vlmoe import VLMoETrainer

    steps = epochs * len(batches)
    arguments = {
        "output_dir": folder,
        "num_train_epochs": epochs,
        "per_device_train_batch_size": 1,
        "learning_rate": rate,
        "lr_scheduler_type": "linear",
        "warmup_steps": min(100, steps // 4),
        "adam_beta2": 0.98,
        "weight_decay": 0.0,
        "logging_steps": max(1, steps // 4),
        "save_strategy": "no",
        "report_to": "none",
        "seed": seed,
        "use_cpu": True,
    }
    VLMoETrainer(
        model,
        arguments,
        train_dataset=cast("Rows", batches),  # batches in the place of rows
        data_collator=_single,
        processing_class=processor,
    ).train()


def _single(items: "list[Batch]") -> "Batch":
    (batch,) = items
    return batch


@contextmanager
def _one_thread() -> Iterator[None]:
    """Let torch use one thread: with such small tensors more of them only wait for each other."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)

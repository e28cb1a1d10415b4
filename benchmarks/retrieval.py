# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Image-text retrieval of scenes: experts with and without router losses, beside the dense twin.

    OMP_NUM_THREADS=1 python benchmarks/retrieval.py
    OMP_NUM_THREADS=1 python benchmarks/retrieval.py --arms experts --seeds 0 --max_steps 400 \\
        --output_dir outputs/try --results outputs/try/retrieval.json

The preset `tiny` with 16 tokens an image learns from nothing by InfoNCE both ways, with
`VLMoESentenceTransformerTrainer`. Scenes hold two or three shapes; their captions name them from
left to right and are all different, those of the 500 test pairs from all that are trained. Chance
is a Recall@1 of 0.2%. What a killed run has finished is kept.
"""

import argparse
import io
import itertools
import statistics
import time
from pathlib import Path
from typing import Any

from datasets import Dataset
from datasets import Image as ImageColumn
from measure import RESULTS, environment
from PIL import Image
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from transformers import set_seed
from upcycling import check_same
from upcycling_training import one_thread

from vlmoe.data.scenes import scene
from vlmoe.hub.atomic_files import write_json
from vlmoe.hub.provenance import saved_json
from vlmoe.routing.load import record_expert_load
from vlmoe.training.build import build_model
from vlmoe.training.embedding import (
    VLMoESentenceTransformerTrainer,
    embedding_model,
    evaluate_retrieval,
)

ROUTER_LOSSES = {"router_aux_loss_coef": 0.01, "router_z_loss_coef": 0.001}
NO_LOSSES = {"router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.0}
TWIN_WIDTH = 259
"""Of a dense MLP as large as 2 experts of width 128 and a router of 8 experts."""
ARMS: dict[str, dict[str, Any]] = {  # fields of the text config
    "experts": ROUTER_LOSSES,
    "experts, no router losses": NO_LOSSES,
    "dense twin": NO_LOSSES | {"mlp_only_layers": [0, 1], "intermediate_size": TWIN_WIDTH},
}
RECIPE: dict[str, Any] = {
    "train_pairs": 8000,
    "test_pairs": 500,
    "steps": 1500,
    "batch_size": 64,
    "learning_rate": 2e-3,
    "warmup_steps": 50,
    "pixel_shuffle_factor": 2,
}
GOAL = 0.4
"""Of Recall@1, both ways."""
Pair = dict[str, Any]


def make_pairs(split: str, count: int, taken: set[str]) -> list[Pair]:
    """Return pairs of two or three shapes whose captions are not `taken`, and add them there."""
    pairs: list[Pair] = []
    for number in itertools.count():
        if len(pairs) == count:
            return pairs
        row = scene(split, number)
        if len(row["objects"]["category"]) > 1 and row["caption"] not in taken:
            taken.add(row["caption"])
            pairs.append({"image": row["image"], "text": row["caption"]})
    raise AssertionError("there are scenes without end")


def train_arm(fields: dict[str, Any], seed: int, recipe: dict[str, Any], folder: Path) -> Pair:
    """Train one arm from one seed and measure it, unless that is done."""
    done = saved_json(folder / "result.json")
    if done is not None:
        return done
    taken: set[str] = set()
    test = make_pairs("test", recipe["test_pairs"], taken)
    pairs = make_pairs("train", recipe["train_pairs"], taken)
    set_seed(seed)
    overrides = {"pixel_shuffle_factor": recipe["pixel_shuffle_factor"], "text_config": fields}
    texts = [pair["text"] for pair in pairs]
    built, processor = build_model("tiny", texts, model_overrides=overrides)
    model = embedding_model(built, processor=processor, device="cpu")
    start = time.process_time()
    history = learn(model, pairs, seed, recipe, folder)
    seconds = time.process_time() - start
    model.eval()
    images = [Image.open(io.BytesIO(pair["image"]["bytes"])) for pair in test]
    found = evaluate_retrieval(model, images, [pair["text"] for pair in test])
    result = {
        **found.as_dict(),
        "cpu_seconds": seconds,
        "parameters": built.active_parameters(),
        "worst_load": worst_load(model, texts[:256]),
        "history": history,
    }
    write_json(folder / "result.json", result)
    return result


def learn(
    model: SentenceTransformer, pairs: list[Pair], seed: int, recipe: dict[str, Any], folder: Path
) -> list[dict[str, float]]:
    """Train by InfoNCE both ways; return the logged losses."""
    data = Dataset.from_list(pairs).cast_column("image", ImageColumn())
    arguments = SentenceTransformerTrainingArguments(
        str(folder / "training"),
        max_steps=recipe["steps"],
        per_device_train_batch_size=recipe["batch_size"],
        learning_rate=recipe["learning_rate"],
        warmup_steps=recipe["warmup_steps"],
        lr_scheduler_type="cosine",
        seed=seed,
        logging_steps=50,
        save_strategy="no",
        dataloader_drop_last=True,
        report_to=[],
        use_cpu=True,
    )
    loss = MultipleNegativesRankingLoss(
        model, directions=("query_to_doc", "doc_to_query"), partition_mode="per_direction"
    )
    trainer = VLMoESentenceTransformerTrainer(model, arguments, train_dataset=data, loss=loss)
    trainer.train()
    return [
        {key: entry[key] for key in ("step", "loss", "router_loss") if key in entry}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]


def worst_load(model: SentenceTransformer, texts: list[str]) -> float | None:
    """Return the largest share of an expert over the mean, of the worst layer; None if dense."""
    backbone = model[0].model
    if backbone.config.text_config.mlp_only_layers:
        return None
    inputs = model.preprocess(texts)
    with record_expert_load(backbone) as load:
        backbone(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    return max(load.as_dict()["max_over_mean"])


def table(runs: dict[str, dict[str, Pair]]) -> str:
    """Return recalls at 1, 5 and 10 both ways, means over seeds; the range of Recall@1."""
    ways = ("text_to_image", "image_to_text")
    lines = [f"{'':26}" + "".join(f"{way + ' R@1 / 5 / 10':>44}" for way in ways)]
    for arm, of_seeds in runs.items():
        cells = ""
        for way in ways:
            every = [[run[f"{way}_recall@{k}"] for run in of_seeds.values()] for k in (1, 5, 10)]
            means = " / ".join(f"{statistics.mean(each):.1%}" for each in every)
            cells += f"{f'{means} ({min(every[0]):.1%} to {max(every[0]):.1%})':>44}"
        lines.append(f"{arm:26}{cells}")
    return "\n".join(lines)


def main() -> None:
    """Run what is missing, print the table, write the result."""
    options = parse_options()
    one_thread()
    recipe = RECIPE | ({"steps": options.max_steps} if options.max_steps else {})
    check_same(options.output_dir / "config.json", {"arms": ARMS, "recipe": recipe})
    runs: dict[str, dict[str, Pair]] = {}
    for seed, arm in itertools.product(sorted(options.seeds), options.arms):
        folder = options.output_dir / arm.replace(",", "").replace(" ", "_") / str(seed)
        runs.setdefault(arm, {})[str(seed)] = train_arm(ARMS[arm], seed, recipe, folder)
        reach = {name: sum(reached(run) for run in of.values()) for name, of in runs.items()}
        write_json(
            options.results,
            {
                "environment": environment(),
                "arms": ARMS,
                "recipe": recipe,
                "seeds_that_reach_the_goal": reach,
                "runs": runs,
            },
        )
    print(table(runs))


def reached(run: Pair) -> bool:
    """Return whether Recall@1 reached the goal both ways."""
    return min(run["text_to_image_recall@1"], run["image_to_text_recall@1"]) >= GOAL


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--max_steps", type=int, help="to try it out")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/retrieval"))
    parser.add_argument("--results", type=Path, default=RESULTS / "retrieval.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()

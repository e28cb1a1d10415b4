# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Do experts hold more names at the same compute? Emoji, to be named in four languages.

    OMP_NUM_THREADS=1 python benchmarks/emoji_names.py
    python benchmarks/emoji_names.py --report_only
    OMP_NUM_THREADS=1 python benchmarks/emoji_names.py --max_steps 4 --seeds 0 \\
        --output_dir outputs/try --results outputs/try/emoji_names.json

1. The vision tower learns to tell the emoji apart, once for all, by numbers that say nothing of
   their names.
2. Each arm is trained with every learning rate of one grid on seed 0. The rate with the best exact
   match on validation drawings is the arm's rate on the other seeds.
3. Every arm names every emoji on test drawings, and on another artist's.

The emoji are the same for all seeds; drawings, their order and weights differ. What a killed run
has finished is kept. It needs the extra `openmoji`.
"""

import argparse
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from capacity_arms import Arm, dense
from capacity_training import EYES, freeze, train, upcycled_model
from emoji_names_arms import AGAIN, ARMS, LENGTH, TWIN, config_of
from emoji_names_data import (
    ASKED,
    NameBatches,
    chosen_emoji,
    name_row,
    names_tokenizer,
    number_row,
    prepare,
    question_rows,
    training_rows,
)
from emoji_names_report import finished_rate, report, run_folder
from measure import RESULTS
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, set_seed
from transformers.utils import logging
from upcycling import check_same
from upcycling_arms import flops_per_token
from upcycling_training import one_thread

from vlmoe import VLMoEForConditionalGeneration, VLMoEProcessor
from vlmoe.hub.atomic_files import write_json
from vlmoe.training.evaluation import Evaluation, evaluate

RATES = (0.006, 0.012, 0.024, 0.048, 0.096)
QUESTIONS_AT_ONCE = 600
LONGEST_ANSWER = 24
OTHER_WEIGHTS = 1000
"""Added to the seed of the weights of the repeated twin."""


@dataclass(frozen=True)
class Recipe:
    """Numbers of the training, the same for every arm."""

    steps: int = 800
    rows: int = 48
    see_batches: int = 1500
    see_epochs: int = 3
    see_rows: int = 64
    see_rate: float = 2e-3
    warmup_steps: int = 100

    def shortened(self, steps: int) -> "Recipe":
        """Return the same recipe with at most so many steps of every kind."""
        return replace(self, steps=min(steps, self.steps), see_batches=steps, see_epochs=1)


def names_processor() -> VLMoEProcessor:
    """Return the processor of all arms."""
    return VLMoEProcessor.for_config(config_of(ARMS[TWIN]), names_tokenizer())


def learn_to_see(recipe: Recipe, output_dir: Path) -> dict[str, torch.Tensor]:
    """Return the weights of tower and connector after they have learned to see, once."""
    file, processor = output_dir / "eyes.safetensors", names_processor()
    if not file.exists():
        data, rows = output_dir / "see.pt", training_rows(number_row, "see", 0)
        prepare(data, rows, recipe.see_batches, recipe.see_rows, processor)
        set_seed(0)
        model = VLMoEForConditionalGeneration(config_of(dense(256, "to see with")))
        batches = NameBatches(data, epochs=recipe.see_epochs)
        train(model, processor, batches, recipe.see_rate, 0, recipe, output_dir / "see")
        asked = [number_row(n, np.random.default_rng([1, n])) for n in range(len(chosen_emoji()))]
        seen = evaluate(model, processor, asked, batch_size=QUESTIONS_AT_ONCE, max_new_tokens=8)
        write_json(output_dir / "eyes.json", {"right numbers": seen.exact_match})
        weights = {n: w.clone() for n, w in model.state_dict().items() if n.startswith(EYES)}
        save_file(weights, staging := output_dir / ".eyes.safetensors")
        staging.rename(file)
    return load_file(file)


def new_model(name: str, seed: int, recipe: Recipe, output_dir: Path) -> PreTrainedModel:
    """Return an arm's model before its training; the tower is frozen."""
    arm = ARMS[name]
    if arm.start is not None:
        chosen = finished_rate(output_dir, arm.start, RATES)
        return upcycled_model(arm, seed, run_folder(output_dir, arm.start, seed, chosen) / "model")
    eyes = learn_to_see(recipe, output_dir)
    set_seed(seed + OTHER_WEIGHTS if name == AGAIN else seed)
    model = VLMoEForConditionalGeneration(config_of(arm))
    model.load_state_dict(eyes, strict=False)
    return freeze(model)


def run_arm(name: str, seed: int, rate: float, recipe: Recipe, output_dir: Path) -> None:
    """Train an arm with a rate and let it name the emoji, unless that is done."""
    arm, own = ARMS[name], run_folder(output_dir, name, seed, rate)
    if (own / "result.json").exists():
        return
    processor, steps = names_processor(), recipe.steps
    rows = training_rows(name_row, "train", seed)
    data = prepare(output_dir / str(seed) / "train.pt", rows, 2 * steps, recipe.rows, processor)
    first = 0 if arm.start is None else steps  # who goes on sees further drawings
    model = new_model(name, seed, recipe, output_dir)
    batches = NameBatches(data, first, first + steps)
    times = train(model, processor, batches, rate, seed, recipe, own)
    if any(other.start == name for other in ARMS.values()):
        model.save_pretrained(own / "model")
        processor.save_pretrained(own / "model")
    asked = {
        "validation": question_rows("validation", seed),
        "test": question_rows("test", seed),
        "other artist": question_rows("test", seed, "openmoji"),
    }
    options = {"batch_size": QUESTIONS_AT_ONCE, "max_new_tokens": LONGEST_ANSWER}
    found = {kind: evaluate(model, processor, each, **options) for kind, each in asked.items()}
    write_json(own / "result.json", describe(arm, model, found, times))


def describe(
    arm: Arm, model: Any, found: dict[str, Evaluation], times: dict[str, float]
) -> dict[str, Any]:
    """Gather an arm's answers, sizes and costs."""
    load = found["test"].expert_load
    return {
        "label": arm.label,
        "exact_match": {kind: each.exact_match for kind, each in found.items()},
        "parameters": model.active_parameters(),
        "flops_per_token": flops_per_token(model.config.text_config, LENGTH),
        "worst_load": 1.0 if load is None else max(load["max_over_mean"]),
        **times,
        "answers": {
            kind: [[each["prediction"], each["reference"]] for each in found[kind].predictions]
            for kind in ("test", "other artist")
        },
    }


def main() -> None:
    """Run what is missing, print the table, write the result."""
    options = parse_options()
    one_thread()
    recipe = Recipe().shortened(options.max_steps) if options.max_steps else Recipe()
    codes = [each.code for each in chosen_emoji()]
    config = {"recipe": asdict(recipe), "rates": list(RATES), "languages": list(ASKED)}
    output_dir = options.output_dir
    check_same(output_dir / "config.json", config | {"emoji": codes})
    runs = [] if options.report_only else planned(options)
    bar = logging.tqdm(total=len(runs), desc="runs", unit="run")
    with bar:
        for name, seed, given in runs:
            # the repeated twin takes the twin's rate: it differs in its weights alone
            chooser = TWIN if name == AGAIN else name
            rate = finished_rate(output_dir, chooser, RATES) if given is None else given
            bar.set_postfix_str(f"seed {seed}, {name}, rate {rate}")
            run_arm(name, seed, rate, recipe, output_dir)
            bar.update()
    print(report(output_dir, options.results, config, RATES))


def planned(options: argparse.Namespace) -> list[tuple[str, int, float | None]]:
    """Return the runs in their order; a rate of None is chosen when it is known."""
    runs: list[tuple[str, int, float | None]] = []
    for seed in sorted(options.seeds):
        for name in options.arms or ARMS:
            has_grid = seed == 0 and name != AGAIN
            runs += [(name, seed, rate) for rate in (RATES if has_grid else (None,))]
    return runs


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="0 comes first")
    parser.add_argument("--arms", nargs="+", choices=ARMS, help="by default all")
    parser.add_argument("--max_steps", type=int, help="of every stage, to try it out")
    parser.add_argument("--report_only", action="store_true", help="train nothing")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/emoji_names"))
    parser.add_argument("--results", type=Path, default=RESULTS / "emoji_names.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()

# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""The whole way on real data: train the tiny model on easy-VQA, evaluate it, save it, ask it.

    vlmoe demo --output_dir outputs/demo --seed 0

1. Caption the training images ("blue circle"): the vision tower learns to see.
2. Train on every question about every training image, one row per question.
3. Train the question-only baseline: the same model and recipe, never shown an image.
4. Answer all 9,673 test questions with both; draw figures; write metrics.json.
5. Load the saved model in a new process and ask it through `pipeline("image-text-to-text")`.
6. Complete its model card with the results.
7. Teach facts to a dense model and to one with 16 experts, of equal active size
   (demo_capacity.py). A demo of fewer rows leaves this out.

The stages' options are in the recipes (configuration/recipes/*.yaml); `vlmoe train --config` takes
them too.
"""

import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .commands import run as run_command
from .config_file import ConfigFile
from .shared_options import Seed, place

if TYPE_CHECKING:
    from vlmoe.data.rows import Rows
    from vlmoe.hub.json_files import JsonObject
    from vlmoe.training.evaluation import Evaluation, Prediction
    from vlmoe.training.run import TrainResult

CAPTIONS, QUESTIONS, QUESTION_ONLY = "easy_vqa_captions", "easy_vqa", "easy_vqa_question_only"
EVALUATION_BATCH = 256
SHOWN_ANSWERS = 16


@dataclass(frozen=True)
class Demo:
    """What a run of the demo writes and reads.

    Attributes:
        output_dir: folder for the model, metrics.json and figures.
        seed: of all stages.
        max_train_rows: train on only the first images.
        max_test_rows: test on only the first images.
    """

    output_dir: str
    seed: int = 0
    max_train_rows: int | None = None
    max_test_rows: int | None = None


def main(
    output_dir: Annotated[
        str,
        typer.Option(
            parser=place, metavar="FOLDER", help="Folder for the model, metrics.json and figures."
        ),
    ] = "outputs/demo",
    seed: Seed = 0,
    max_train_rows: Annotated[
        int | None, typer.Option(min=1, help="Train on only the first N images, to try it out.")
    ] = None,
    max_test_rows: Annotated[
        int | None, typer.Option(min=1, help="Test on only the first N images, to try it out.")
    ] = None,
    config: ConfigFile = None,
) -> None:
    """Train, evaluate and ask the tiny model on real data, start to end.

    The data are easy-VQA. The stages' options are in the recipes (configuration/recipes/*.yaml),
    which `vlmoe train --config` takes too. A last stage, left out where only the first N images are
    used, teaches drawn facts to a dense model and to one with 16 experts of equal active size.

    examples:
      vlmoe demo --output_dir outputs/demo
      vlmoe demo --seed 1 --output_dir outputs/demo_seed_1
      vlmoe demo --max_train_rows 64 --max_test_rows 20 --output_dir outputs/try
    """
    run(Demo(output_dir, seed, max_train_rows, max_test_rows))


def run(options: Demo) -> "JsonObject":
    """Run every stage; return the content of metrics.json.

    Raises:
        ValueError: an option has a wrong value, or another process writes into the output folder.
        ImportError: an optional package is missing.
        OSError: the output folder cannot be written into.
    """
    from vlmoe.hub.folder_lock import folder_lock

    with folder_lock(options.output_dir):
        return _run(options, Path(options.output_dir))


def _run(options: Demo, output_dir: Path) -> "JsonObject":
    from vlmoe.data.loading import load_rows
    from vlmoe.hub.atomic_files import write_json
    from vlmoe.hub.card_results import METRICS_FILE
    from vlmoe.training.evaluation import evaluate
    from vlmoe.training.metrics import majority_baseline
    from vlmoe.training.recipes import save_tokenizer

    start = time.perf_counter()
    tokenizer = save_tokenizer(output_dir / "tokenizer")
    _say("1/6 captions")
    captions = train_stage(options, CAPTIONS, "tiny", tokenizer)
    _say("2/6 questions")
    trained = train_stage(options, QUESTIONS, str(captions.output_dir))
    _say("3/6 the same model, never shown an image")
    blind = train_stage(options, QUESTION_ONLY, "tiny", tokenizer)

    _say("4/6 test questions")
    test_rows = load_rows("easy_vqa", "test", limit=options.max_test_rows)
    test_texts = load_rows("easy_vqa", "test", limit=options.max_test_rows, with_images=False)
    ask = partial(evaluate, batch_size=EVALUATION_BATCH, progress=True)
    answers = ask(trained.model, trained.processor, test_rows)
    blind_answers = ask(blind.model, blind.processor, test_texts).as_dict()
    del blind_answers["expert_load"]
    baselines = {
        "majority class": asdict(majority_baseline(load_rows("easy_vqa", "train"), test_rows)),
        "question only": blind_answers,
    }
    metrics = summarise(options, captions, trained, blind, answers, baselines)
    metrics["example"] = save_example(output_dir, test_rows, answers.predictions)
    draw_figures(output_dir, trained, test_rows, answers.predictions, metrics)

    _say("5/6 a new process loads the model and answers through pipeline()")
    ask_in_new_process(trained.output_dir)
    metrics["seconds"] = time.perf_counter() - start
    write_json(output_dir / METRICS_FILE, metrics)
    complete_card(trained.output_dir, output_dir)
    tables = [answers.table(), comparison_table(metrics)]
    if options.max_train_rows is None and options.max_test_rows is None:
        from .demo_capacity import capacity_table, run_capacity

        _say("6/6 what experts are for: facts that only parameters can hold")
        tables.append(capacity_table(run_capacity(output_dir, options.seed)))
    print("", *tables, sep="\n\n")
    seconds = time.perf_counter() - start
    print(f"\n{seconds:.0f} s in all. Look at {output_dir}/*.png and *.json.")
    return metrics


def summarise(
    options: Demo,
    captions: "TrainResult",
    trained: "TrainResult",
    blind: "TrainResult",
    answers: "Evaluation",
    baselines: "JsonObject",
) -> "JsonObject":
    """Return the part of metrics.json on the stages, the test and the baselines."""
    import torch

    return {
        "accuracy": answers.exact_match,
        "accuracy_by_type": answers.exact_match_by_type,
        "questions_by_type": answers.count_by_type,
        "questions": answers.questions,
        "dataset": QUESTIONS,
        "split": "test",
        "max_test_rows": options.max_test_rows,
        "baselines": baselines,
        "train_seconds": captions.metrics["train_seconds"] + trained.metrics["train_seconds"],
        "tokens_per_second": trained.metrics["tokens_per_second"],
        "parameters": trained.metrics["parameters"],
        "expert_load": answers.expert_load,
        "stages": {
            CAPTIONS: captions.metrics,
            QUESTIONS: trained.metrics,
            QUESTION_ONLY: blind.metrics,
        },
        "seed": options.seed,
        "threads": torch.get_num_threads(),
        "versions": trained.metrics["versions"],
    }


def train_stage(
    options: Demo, recipe: str, model: str, tokenizer: str | None = None
) -> "TrainResult":
    """Train with a recipe, into the folder of its name; the question stage's is `model`."""
    from vlmoe.training.recipes import train_recipe

    folder = Path(options.output_dir) / ("model" if recipe == QUESTIONS else recipe)
    return train_recipe(
        recipe,
        model,
        tokenizer=tokenizer,
        output_dir=str(folder),
        seed=options.seed,
        max_train_rows=options.max_train_rows,
    )


def draw_figures(
    output_dir: Path,
    trained: "TrainResult",
    test_rows: "Rows",
    predictions: "list[Prediction]",
    metrics: "JsonObject",
) -> None:
    """Draw answers.png, training.png and expert_load.png."""
    from vlmoe.data.images import open_image
    from vlmoe.data.rows import ConversationRows
    from vlmoe.figures.plots import (
        AnsweredQuestion,
        plot_answers,
        plot_expert_load,
        plot_training,
    )

    questions = ConversationRows(test_rows)
    wrong = [i for i, record in enumerate(predictions) if not record["correct"]]
    step = max(1, len(predictions) // SHOWN_ANSWERS)
    chosen = sorted({*wrong[:4], *range(0, len(predictions), step)})[:SHOWN_ANSWERS]
    shown = [
        AnsweredQuestion(
            image=open_image(questions[i]["images"][0], f"test question {i}"),
            question=predictions[i]["question"],
            answer=predictions[i]["prediction"],
            truth=predictions[i]["reference"],
        )
        for i in chosen
    ]
    title = f"Test questions, {metrics['accuracy']:.1%} of all {len(predictions):,} right"
    plot_answers(shown, output_dir / "answers.png", title=f"{title} (some of the wrong ones shown)")
    plot_training(
        trained.log_history,
        output_dir / "training.png",
        evaluated=f"{trained.metrics['eval_questions']} test questions",
    )
    load = metrics["expert_load"]
    plot_expert_load(load["image_share"], load["text_share"], output_dir / "expert_load.png")


def save_example(
    output_dir: Path, test_rows: "Rows", predictions: "list[Prediction]"
) -> dict[str, str] | None:
    """Save the picture of the first shape or color that was told right, as example.png.

    Returns its question and the model's answer, or None where there is none.
    """
    from vlmoe.data.images import open_image
    from vlmoe.data.rows import ConversationRows
    from vlmoe.hub.atomic_files import atomic_path
    from vlmoe.hub.model_card import EXAMPLE_FILE

    (output_dir / EXAMPLE_FILE).unlink(missing_ok=True)
    questions = ConversationRows(test_rows)
    for number, record in enumerate(predictions):
        if record["correct"] and record["question_type"] in ("shape", "color"):
            image = open_image(questions[number]["images"][0], record["id"])
            with atomic_path(output_dir / EXAMPLE_FILE) as temporary:
                image.save(temporary)
            return {"question": record["question"], "answer": record["prediction"]}
    return None


def complete_card(model: Path, results: Path) -> None:
    """Copy results and figures into the model's folder, and write its card."""
    from vlmoe.hub.atomic_files import atomic_path
    from vlmoe.hub.folder_lock import folder_lock
    from vlmoe.hub.model_card import (
        EXAMPLE_FILE,
        METRICS_FILE,
        PICTURE_FILE,
        write_model_card,
    )

    found = [name for name in (PICTURE_FILE, EXAMPLE_FILE) if (results / name).is_file()]
    with folder_lock(model):
        for name in (METRICS_FILE, *found):
            with atomic_path(model / name) as temporary:
                shutil.copyfile(results / name, temporary)
        write_model_card(model)


def ask_in_new_process(model: Path) -> None:
    """Run demo_pipeline.py on the saved model.

    Raises:
        ValueError: it failed; its output is above.
    """
    command = [sys.executable, "-m", f"{__package__}.demo_pipeline", str(model)]
    if subprocess.run(command, check=False).returncode != 0:
        raise ValueError(f"The saved model could not be used: {' '.join(command)} failed.")


def comparison_table(metrics: "JsonObject") -> str:
    """Return a table of the model and its baselines."""
    kinds = list(metrics["accuracy_by_type"])
    lines = [f"{'':<16}{'all':>9}" + "".join(f"{kind:>9}" for kind in kinds)]
    baselines = metrics["baselines"].items()
    rows = {name: (b["exact_match"], b["exact_match_by_type"]) for name, b in baselines}
    rows["this model"] = (metrics["accuracy"], metrics["accuracy_by_type"])
    for name, (overall, by_type) in rows.items():
        lines.append(f"{name:<16}{overall:>9.2%}" + "".join(f"{by_type[k]:>9.2%}" for k in kinds))
    return "\n".join(lines)


def _say(stage: str) -> None:
    print(f"\n=== {stage}", flush=True)


if __name__ == "__main__":
    sys.exit(run_command("demo", main))

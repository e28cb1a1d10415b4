"""The upcycling benchmark at toy size: budgets, operations, plateau, and a run that is killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import upcycling
from torch.utils.flop_counter import FlopCounterMode
from transformers import TrainerControl
from upcycling_arms import ARMS, BASELINE, PLATEAU, build, flops_per_token, new_model
from upcycling_data import majority
from upcycling_report import summary, winner
from upcycling_training import Recipe, StopAtPlateau, times

from vlmoe import VLMoEForConditionalGeneration
from vlmoe.data.easy_vqa import conversation, dataset
from vlmoe.data.tokenizer import train_tokenizer

BENCHMARK = Path(upcycling.__file__)
ARMS_RUN = (PLATEAU, BASELINE, "upcycled")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Every arm before its first step; the continued ones from one dense model."""
    folder = tmp_path_factory.mktemp("arms")
    train_tokenizer(["how many red shapes are there? two"] * 3, 320).save_pretrained(folder / "t")
    dense, processor = new_model(ARMS[PLATEAU].mlp_width, folder / "t")
    dense.save_pretrained(folder / "dense")
    processor.save_pretrained(folder / "dense")
    return {name: build(arm, 0, folder / "t", folder / "dense")[0] for name, arm in ARMS.items()}


def test_twins_have_the_parameters_of_the_upcycled_model(models: dict[str, Any]) -> None:
    sizes = {name: model.active_parameters() for name, model in models.items()}
    upcycled = sizes["upcycled"]
    assert sizes["sparse_scratch"] == upcycled
    assert sizes["dense_total"]["total"] == pytest.approx(upcycled["total"], rel=0.03)
    for token in ("text_token", "image_token"):
        assert sizes["dense_active"][token] == pytest.approx(upcycled[token], rel=0.03)
    dense = sizes[BASELINE]
    assert dense == sizes[PLATEAU] == sizes["question_only"]
    assert upcycled["total"] > 1.5 * dense["total"]


def test_the_split_arm_costs_what_the_dense_model_costs(models: dict[str, Any]) -> None:
    split, dense = (models[name].config.text_config for name in ("upcycled_split", BASELINE))
    assert (split.num_experts, split.num_experts_per_tok) == (16, 2)
    router = 2 * split.num_hidden_layers * split.hidden_size * split.num_experts
    extra = flops_per_token(split, 32) - flops_per_token(dense, 32)
    assert extra == router < 0.04 * flops_per_token(dense, 32)


def test_upcycled_arms_start_at_the_dense_function(models: dict[str, Any]) -> None:
    for name in ("upcycled", "upcycled_split"):
        assert models[name].training
        assert models[name].upcycling_report.error <= 1e-5
        assert torch.equal(models[name].lm_head.weight, models[BASELINE].lm_head.weight)


@pytest.mark.parametrize("name", ["dense", "upcycled", "upcycled_split", "dense_total"])
def test_counted_operations_are_those_that_torch_counts(models: dict[str, Any], name: str) -> None:
    model: VLMoEForConditionalGeneration = models[name]
    model.set_experts_implementation("eager")
    model.set_attn_implementation("eager")
    rows, length = 3, 20
    ids = torch.randint(6, 300, (rows, length))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids))
    per_token = counter.get_total_flops() / (rows * length)
    model.train()
    assert flops_per_token(model.config.text_config, length) == pytest.approx(per_token, rel=0.01)


def evaluations(accuracies: list[float]) -> list[dict[str, float]]:
    return [{"eval_exact_match": each, "step": 10 * i} for i, each in enumerate(accuracies, 1)]


def test_a_plateau_comes_not_before_the_least_steps() -> None:
    history = evaluations([0.6, 0.6, 0.6])
    assert StopAtPlateau(0.002, 2, least_steps=30).is_reached(history)
    assert not StopAtPlateau(0.002, 2, least_steps=31).is_reached(history)


def test_a_plateau_is_two_evaluations_without_a_gain_of_two_thousandths() -> None:
    stop = StopAtPlateau(0.002, 2)
    for accuracies, reached in (
        ([0.5, 0.6], False),
        ([0.6, 0.601, 0.6015], True),
        ([0.6, 0.601, 0.6021], False),
        ([0.6, 0.5, 0.5], True),
        ([0.6, 0.7, 0.5, 0.5], True),
        ([0.6, 0.5, 0.7], False),
    ):
        history = [{"loss": 1.0}, *evaluations(accuracies)]
        assert stop.is_reached(history) == reached, accuracies
        control = TrainerControl()
        stop.on_evaluate(None, SimpleNamespace(log_history=history), control)
        assert control.should_training_stop == reached


def test_times_are_of_steps_not_of_log_entries() -> None:
    log = [
        {"loss": 1.0, "step_seconds": 2.0, "step_cpu_seconds": 1.0, "steps_cpu_seconds": 50.0},
        {"eval_loss": 1.0},
        {"loss": 1.0, "step_seconds": 4.0, "step_cpu_seconds": 3.0, "steps_cpu_seconds": 70.0},
    ]
    assert times(log) == {"step_seconds": 3.0, "step_cpu_seconds": 2.0, "cpu_seconds": 120.0}


def test_majority_knows_words_and_types() -> None:
    def rows(*asked: tuple[str, str]) -> Any:
        entry = {"id": "0", "images": [], "question_type": ["kind"] * len(asked)}
        return dataset([entry | {"messages": [conversation(*pair) for pair in asked]}])

    train = rows(("a?", "yes"), ("b?", "no"), ("c?", "no"))
    test = rows(("a?", "yes"), ("b?", "yes"), ("new?", "no"), ("c?", "no"))
    assert majority(train, test) == {"by words": 0.75, "by type": 0.5}


def test_accuracy_in_training_is_of_the_types_that_the_test_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    row = {"messages": [], "images": [], "question_type": ["count", "side"]}
    pictures = dataset([{"id": str(i), **row} for i in range(5)])
    records = [("count", True), ("side", False), ("find", True), ("description", True)]
    asked: list[int] = []

    def answers(model: Any, processor: Any, rows: Any, **options: Any) -> SimpleNamespace:
        asked.append(len(rows))
        predictions = [{"question_type": k, "correct": c} for k, c in records]
        return SimpleNamespace(predictions=predictions)

    monkeypatch.setattr(upcycling, "evaluate", answers)
    rows = {"train": pictures, "validation": pictures.select(range(3)), "test": pictures}
    assert upcycling.seen_accuracy(None, None, rows) == 0.5
    assert asked == [3]


def command(folder: Path, *more: str) -> list[str]:
    options = ["--tasks", "composition", "--seeds", "3", "--arms", *ARMS_RUN, *more]
    sizes = ["--max_images", "60", "--max_steps", "12", "--output_dir", str(folder)]
    return [sys.executable, str(BENCHMARK), *options, *sizes, "--results", str(folder / "r.json")]


def kept(folder: Path) -> dict[str, Any]:
    """Of each arm what does not depend on the clock."""
    results = {}
    for arm in ARMS_RUN:
        result = json.loads((folder / "composition" / "3" / arm / "result.json").read_text())
        results[arm] = {key: each for key, each in result.items() if "seconds" not in key}
    return results


def kill_when(process: subprocess.Popen, condition: Any) -> None:
    """SIGKILL as soon as the condition holds."""
    end = time.time() + 240
    while not condition():
        assert process.poll() is None and time.time() < end, "ended before it was killed"
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


def last_rate(model: Path) -> float:
    """The learning rate that was logged last."""
    [state] = model.glob("checkpoint-*/trainer_state.json")
    history = json.loads(state.read_text())["log_history"]
    return [entry["learning_rate"] for entry in history if "learning_rate" in entry][-1]


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_numbers(tmp_path: Path) -> None:
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run(command(tmp_path / "whole"), check=True, **quiet)
    killed = tmp_path / "killed"
    own = killed / "composition" / "3"
    states = ("plateau/see", "plateau/model", "upcycled/model")
    for state in states:  # killed three times, in the middle of three stages
        done = [own / state / f"checkpoint-{step}" / "trainer_state.json" for step in (3, 6)]
        process = subprocess.Popen(command(killed), **quiet)
        kill_when(process, lambda done=done: any(file.exists() for file in done))
    before = (own / PLATEAU / "result.json").stat().st_mtime_ns
    subprocess.run(command(killed), check=True, **quiet)
    assert (own / PLATEAU / "result.json").stat().st_mtime_ns == before, "trained again"
    assert kept(killed) == kept(tmp_path / "whole")
    for state in states[1:]:
        trained = json.loads((own / state / "train_results.json").read_text())
        assert trained["resumed_at_step"] in (3, 6, 9), "started anew"
    assert last_rate(own / PLATEAU / "model") == pytest.approx(0.1 * Recipe.learning_rate)
    for arm in (BASELINE, "upcycled"):
        assert last_rate(own / arm / "model") == pytest.approx(Recipe.learning_rate / 3)  # then 0
    table = subprocess.run(
        command(killed, "--report_only"), check=True, capture_output=True, text=True
    ).stdout
    assert "won" in table and "upcycled, 8 experts, top 2" in table
    found = json.loads((killed / "r.json").read_text())["tasks"]["composition"]["arms"]
    assert found["upcycled"]["minus baseline"].keys() == {"mean", "low", "high"}
    assert (killed / "r.png").stat().st_size > 1000


def test_the_winner_is_named_with_its_doubt() -> None:
    def arms(**gaps: tuple[float, float, float]) -> dict[str, Any]:
        found = {
            name: {"minus baseline": dict(zip(("low", "mean", "high"), gap, strict=True))}
            for name, gap in gaps.items()
        }
        return {BASELINE: {}, "question_only": {"minus baseline": {"mean": 1.0}}} | found

    assert winner(arms()) is None
    assert winner(arms(upcycled=(-0.2, -0.1, -0.05))) == '"dense, continued" won'
    assert winner(arms(upcycled=(-0.2, -0.1, 0.01), dense_total=(-0.4, -0.3, -0.2))) == (
        '"dense, continued" won, but the interval of "upcycled, 8 experts, top 2" holds 0'
    )
    assert winner(arms(upcycled=(0.01, 0.1, 0.2), dense_total=(0.02, 0.05, 0.1))) == (
        '"upcycled, 8 experts, top 2" won'
    )
    assert winner(arms(upcycled=(0.01, 0.1, 0.2), dense_total=(-0.1, 0.2, 0.4))) == (
        '"dense twin, equal total" won, but its interval holds 0'
    )


def test_seeds_that_the_baseline_lacks_are_reported_and_not_compared() -> None:
    def run(right: str) -> dict[str, Any]:
        return {"accuracy": 0.5, "right": right, "images": ["a", "b"]}

    runs = {BASELINE: {0: run("01")}, "upcycled": {0: run("11"), 1: run("00")}}
    found = summary(runs | {"dense_total": {1: run("10")}})
    assert set(found["arms"]["upcycled"]["seeds"]) == {0, 1}
    assert found["arms"]["upcycled"]["minus baseline"]["mean"] == pytest.approx(0.5)
    assert "minus baseline" not in found["arms"]["dense_total"]
    assert found["won"].startswith('"upcycled')


def test_runs_of_another_recipe_are_not_mixed_in(tmp_path: Path) -> None:
    upcycling.check_same(tmp_path / "config.json", {"recipe": 1})
    upcycling.check_same(tmp_path / "config.json", {"recipe": 1})
    with pytest.raises(ValueError, match="holds runs of another recipe"):
        upcycling.check_same(tmp_path / "config.json", {"recipe": 2})

"""The capacity benchmark at toy size: equal budgets, one stream of batches, a rate per arm."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import capacity
import capacity_report
import capacity_training
import numpy as np
import pytest
import torch
from capacity_arms import (
    ARMS,
    BALANCE_ARMS,
    CONTINUED,
    COPY,
    CURVE,
    LENGTH,
    SPARSE,
    SPLIT,
    START,
    STUDIES,
    TOTAL,
    TWIN,
    Arm,
    Study,
    config_of,
)
from capacity_data import EncodedBatches, emblem_processor, packed, prepare_questions, unpacked
from capacity_report import paired, summary
from capacity_training import (
    RATES,
    best_rate,
    grid,
    new_model,
    right_answers,
    run_folder,
    upcycled_model,
)
from upcycling_arms import flops_per_token

from vlmoe import VLMoEForConditionalGeneration
from vlmoe.data.collator import VLMoECollator
from vlmoe.data.emblems import Emblems
from vlmoe.training.evaluation import evaluate

NOT_EQUAL = {(SPARSE, TOTAL), (SPLIT, CONTINUED), (COPY, CONTINUED)}
NOT_EQUAL |= {("experts_64", "experts_16"), ("experts_2", TWIN)}
"""Pairs whose active sizes differ by more, on purpose; tables print by how much."""


def sizes(arm: Arm) -> dict[str, float]:
    with torch.device("meta"):
        model = VLMoEForConditionalGeneration(config_of(arm))
    return {
        **model.active_parameters(),
        "flops": flops_per_token(model.config.text_config, LENGTH),
    }


PAIRS = [(study, *pair) for study, each in STUDIES.items() for pair in each.pairs]


@pytest.mark.parametrize(
    ("study", "ours", "peer"), [pair for pair in PAIRS if pair[1:] not in NOT_EQUAL]
)
def test_equal_arms_are_equal_within_two_percent(study: str, ours: str, peer: str) -> None:
    arms = STUDIES[study].arms
    found, twin = sizes(arms[ours]), sizes(arms[peer])
    assert found["text_token"] == pytest.approx(twin["text_token"], rel=0.02)
    assert found["flops"] == pytest.approx(twin["flops"], rel=0.02)


def test_the_larger_twin_has_all_parameters_of_the_experts() -> None:
    ours, peer = sizes(ARMS[SPARSE]), sizes(ARMS[TOTAL])
    assert ours["total"] == pytest.approx(peer["total"], rel=0.02)
    assert ours["flops"] < 0.5 * peer["flops"]


def test_arms_of_the_curve_differ_in_the_number_of_experts_alone() -> None:
    for name, arm in CURVE.items():
        if arm.experts:
            same = replace(CURVE["experts_16"], experts=arm.experts, label=arm.label)
            assert arm == same, name
    for name, arm in BALANCE_ARMS.items():
        assert arm == replace(ARMS[SPARSE], balance=arm.balance, label=arm.label), name


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> tuple[Emblems, Any, Path]:
    task, processor = Emblems(6, seed=1), emblem_processor(config_of(ARMS[TWIN]))
    return (
        task,
        processor,
        prepare_questions(task, "image", processor, tmp_path_factory.mktemp("q")),
    )


def test_packed_batches_come_back_as_the_collator_made_them(toy: tuple) -> None:
    task, processor, _ = toy
    for shown in ("image", "name", "nothing"):
        batch = VLMoECollator(processor)(list(task.training_rows(1, shown)))
        found = unpacked(packed(batch))
        model = new_model(ARMS[TWIN], 0, {}).eval()
        for name, tensor in found.items():
            assert torch.allclose(tensor.float(), batch[name].float(), atol=1e-6), name
        with torch.no_grad():
            assert torch.allclose(model(**found).loss, model(**batch).loss, atol=1e-5)


@pytest.mark.parametrize("name", ["facts-test", "cells-test"])
def test_right_answers_are_those_of_greedy_generation(toy: tuple, name: str) -> None:
    task, processor, folder = toy
    torch.manual_seed(0)
    model = new_model(ARMS[TWIN], 0, {})
    rows = list(task.fact_rows("test") if name == "facts-test" else task.cell_rows("test"))
    source = f"{name}-image" if name == "facts-test" else name
    batches = EncodedBatches(folder / source)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    right = right_answers(model, batches)
    while right.float().mean() < 0.3:  # some answers are to be right, some wrong
        optimizer.zero_grad()
        model(**batches[0]).loss.backward()
        optimizer.step()
        right = right_answers(model, batches)
    length = 1 if name == "facts-test" else 2
    answered = evaluate(model, processor, rows, batch_size=len(rows), max_new_tokens=length)
    assert right.tolist() == [bool(each["correct"]) for each in answered.predictions]
    assert 0 < right.float().mean() < 1


def runs(right: np.ndarray) -> list[dict[str, Any]]:
    return [{"right": {"facts-test": "".join(map(str, row))}} for row in right.astype(int)]


def test_differences_are_paired_by_seed_and_question_and_grouped_by_entity() -> None:
    rng = np.random.default_rng(0)
    ours = rng.random((2, 800)) < 0.5
    peer = ours.copy()
    peer[:, :8] = ~peer[:, :8]
    found = paired(runs(ours), runs(peer), "facts-test")
    unpaired = paired(runs(ours), runs(rng.permutation(peer, axis=1)), "facts-test")
    assert unpaired["high"] - unpaired["low"] > 4 * (found["high"] - found["low"])
    by_entity = np.repeat(rng.random((1, 100)) < 0.5, 8, axis=1)
    grouped = paired(runs(by_entity), runs(np.zeros_like(by_entity)), "facts-test")
    width = 2 * 1.96 * by_entity.std() / np.sqrt(100)
    assert grouped["high"] - grouped["low"] == pytest.approx(width, rel=0.1)


def write_run(folder: Path, validation: float, test: float) -> None:
    folder.mkdir(parents=True)
    accuracy = {"facts-validation": validation, "facts-test": test}
    (folder / "result.json").write_text(json.dumps({"accuracy": accuracy}))


def test_the_rate_is_chosen_on_validation_phrasings_when_the_whole_grid_has_run(
    tmp_path: Path,
) -> None:
    for number, rate in enumerate(RATES[:-1]):
        write_run(run_folder(tmp_path, "facts_4096", TWIN, 0, rate), number % 3, -number % 3)
    assert summary(tmp_path, "facts_4096")["arms"] == {}
    write_run(run_folder(tmp_path, "facts_4096", TWIN, 0, RATES[-1]), 0, 9)
    assert best_rate(grid(tmp_path, "facts_4096", TWIN)) == RATES[2]


def test_a_run_is_whole_and_is_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    names = (TWIN, SPARSE, START, CONTINUED, SPLIT)
    toy = Study(8, 4, {name: ARMS[name] for name in names}, [(SPARSE, TWIN), (SPLIT, CONTINUED)])
    for module in (capacity, capacity_report, capacity_training):
        monkeypatch.setattr(module, "RATES", (0.01, 0.02))
    monkeypatch.delitem(STUDIES, "facts_8192")
    monkeypatch.setitem(STUDIES, "facts_4096", toy)
    trained: dict[str, list[torch.Tensor]] = {}
    train = capacity.train

    def noting(model: Any, processor: Any, batches: Any, rate: float, *args: Any) -> Any:
        trained.setdefault(str(args[-1].parent), []).append(batches[0]["input_ids"])
        return train(model, processor, batches, rate, *args)

    monkeypatch.setattr(capacity, "train", noting)
    results = tmp_path / "capacity.json"
    options = ["--max_steps", "2", "--seeds", "0", "1", "--output_dir", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", ["capacity.py", *options, "--results", str(results)])
    capacity.main()
    found = json.loads(results.read_text())["studies"]["facts_4096"]
    assert set(found["arms"]) == set(names)
    assert all(set(arm["seeds"]) == {"0", "1"} for arm in found["arms"].values())
    assert [each["ours"] for each in found["differences"]] == [SPARSE, SPLIT]
    assert results.with_suffix(".png").is_file()
    assert (tmp_path / "capacity_rates.png").is_file()
    assert ARMS[SPLIT].label in capsys.readouterr().out
    first = {Path(folder).name: batches[0] for folder, batches in trained.items()}
    assert torch.equal(first[TWIN], first[SPARSE]), "all arms of a seed see the same batches"
    assert not torch.equal(first[START], first[CONTINUED]), "trained on further ones"
    assert torch.equal(first[CONTINUED], first[SPLIT])
    trained.clear()
    capacity.main()
    assert not trained


def test_continued_arms_start_at_the_function_of_the_dense_model(
    tmp_path: Path, toy: tuple
) -> None:
    _, processor, folder = toy
    dense = new_model(ARMS[START], 0, {})
    dense.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    batch = EncodedBatches(folder / "facts-test-image")[0]
    logits = dense.eval()(**batch).logits
    for name in (CONTINUED, SPLIT, COPY):
        model = upcycled_model(ARMS[name], 0, tmp_path).eval()
        assert torch.allclose(model(**batch).logits, logits, atol=1e-4), name
        text, balance = model.config.text_config, ARMS[name].balance
        assert not ARMS[name].experts or balance.items() <= vars(text).items()

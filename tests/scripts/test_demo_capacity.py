"""The demo's dense model and its experts: equal active size, new drawings, a figure and numbers."""

import json
import logging
from pathlib import Path

import pytest
import torch

from vlmoe import VLMoEForConditionalGeneration, VLMoEProcessor
from vlmoe.data.collator import VLMoECollator
from vlmoe.data.emblems import CELL, COLORS, Emblems, emblem_config, emblem_tokenizer
from vlmoe_cli.demo_capacity import ARMS, FreshDrawings, Sizes, capacity_table, run_capacity


def test_both_models_have_the_same_active_size() -> None:
    dense, sparse = (
        VLMoEForConditionalGeneration(emblem_config(**fields)).active_parameters()
        for fields, _ in ARMS.values()
    )
    assert sparse["text_token"] == pytest.approx(dense["text_token"], rel=0.01)
    assert sparse["total"] > 1.1 * dense["total"]


def test_a_batch_keeps_its_words_and_draws_its_emblems_anew() -> None:
    processor = VLMoEProcessor.for_config(emblem_config(), emblem_tokenizer())
    rows = list(Emblems(40, seed=1).training_rows(2))
    batches = FreshDrawings(rows, 1, processor)
    assert [len(batch["labels"]) for batch in (batches[0], batches[1])] == [64, 16]
    encoded = VLMoECollator(processor)(rows[64:])
    first, second = batches[1], batches[1]
    assert first.keys() == second.keys() == encoded.keys()
    for name in encoded.keys() - {"pixel_values"}:
        assert torch.equal(first[name], encoded[name]) and torch.equal(second[name], encoded[name])
    one, other = first["pixel_values"], second["pixel_values"]
    assert one.shape == encoded["pixel_values"].shape
    assert one.dtype == encoded["pixel_values"].dtype
    assert not torch.equal(one, other)
    for shown in (one, other):
        assert torch.equal(colors_of(shown), colors_of(encoded["pixel_values"]))


def colors_of(pixels: torch.Tensor) -> torch.Tensor:
    """Return the color at the center of each cell, as the nearest of the task's."""
    cells = pixels[:, 0].unflatten(-1, (2, CELL)).unflatten(-3, (2, CELL))
    middle = slice(CELL // 2 - 1, CELL // 2 + 1)
    centers = cells[:, :, :, middle, :, middle].mean((3, 5)).movedim(1, -1)  # (rows, 2, 2, 3)
    return torch.cdist(centers.flatten(1, 2), torch.tensor(list(COLORS.values()))).argmin(-1)


def test_it_leaves_a_figure_and_its_numbers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("vlmoe"), "propagate", True)
    threads = torch.get_num_threads()
    sizes = Sizes(entities=6, see_batches=1, see_epochs=2, wordings=2, epochs=2)
    found = run_capacity(tmp_path, seed=2, sizes=sizes)
    assert found == json.loads((tmp_path / "capacity.json").read_text())
    assert (found["seed"], found["facts"], found["questions"]) == (2, 48, 24)
    for name, arm in found["models"].items():
        assert 0 <= arm["accuracy"] <= 1
        assert name in capacity_table(found)
        assert f"{arm['parameters']['total']:,}" in capacity_table(found)
    assert (tmp_path / "capacity.png").read_bytes().startswith(b"\x89PNG")
    assert {each.name for each in tmp_path.iterdir()} == {"capacity.json", "capacity.png"}
    assert torch.get_num_threads() == threads
    assert "not read" not in caplog.text


def test_both_models_learn_facts(tmp_path: Path) -> None:
    sizes = Sizes(entities=1, see_batches=1, see_epochs=1, wordings=16, epochs=60, asked=1)
    models = run_capacity(tmp_path, seed=0, sizes=sizes)["models"]
    assert all(arm["accuracy"] > 0.5 for arm in models.values())

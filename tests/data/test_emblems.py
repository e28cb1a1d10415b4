"""Emblems: facts, phrasings and drawings of one split stay out of the others."""

from collections import defaultdict

import numpy as np
import pytest

from vlmoe import VLMoEConfig, VLMoEProcessor
from vlmoe.data.collator import VLMoECollator
from vlmoe.data.emblems import (
    ATTRIBUTES,
    BANK,
    CELL,
    CELLS,
    COLORS,
    PHRASINGS,
    SEE,
    SPLITS,
    SYMBOLS,
    VALUES,
    Emblems,
    emblem_tokenizer,
    perception_rows,
)


@pytest.fixture(scope="module")
def task() -> Emblems:
    return Emblems(entities=24, seed=3)


def turns(row: dict) -> list[tuple[str, str]]:
    texts = [part["text"] for m in row["messages"] for part in m["content"] if "text" in part]
    return list(zip(texts[::2], texts[1::2], strict=True))


def entity_of(row: dict) -> int:
    return int(row["id"].split("/")[-1 if row["id"].startswith("train/") else 1])


def test_no_phrasing_of_validation_or_test_is_trained(task: Emblems) -> None:
    trained: dict[tuple[int, str], set[str]] = defaultdict(set)
    for row in task.training_rows(epochs=40):
        for question, _ in turns(row):
            phrasing, about = question.split()
            if phrasing != SEE:
                trained[entity_of(row), about].add(phrasing)
    assert all(len(found) == 3 for found in trained.values())
    held_out = {}
    for split in ("validation", "test"):
        for row in task.fact_rows(split):
            phrasing, about = turns(row)[0][0].split()
            fact = int(row["id"].split("/")[1]), about
            assert phrasing not in trained[fact]
            held_out.setdefault(fact, set()).add(phrasing)
    assert all(len(found) == 2 for found in held_out.values())
    asked = [turns(row)[0][0].split()[0] for row in task.fact_rows("test")]
    assert set(asked) == set(PHRASINGS), "every phrasing is known from other facts"


def test_no_drawing_of_a_split_is_in_another(task: Emblems) -> None:
    banks = {
        split: {drawing.tobytes() for drawing in bank.reshape(-1, CELL * CELL * 3)}
        for split, bank in task._banks.items()
    }
    assert [len(bank) for bank in banks.values()] == [len(SYMBOLS) * BANK] * 3
    for split in SPLITS:
        for other in SPLITS:
            assert split == other or not banks[split] & banks[other]


def test_each_split_draws_from_its_own_bank(task: Emblems, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[str] = []
    drawing = Emblems.drawing

    def noting(self: Emblems, entity: int, split: str, rng: np.random.Generator):
        drawn.append(split)
        return drawing(self, entity, split, rng)

    monkeypatch.setattr(Emblems, "drawing", noting)
    for rows, split in (
        (task.training_rows(1), "train"),
        (task.fact_rows("validation"), "validation"),
        (task.fact_rows("test"), "test"),
        (task.fact_rows("train"), "test"),
        (task.cell_rows("test"), "test"),
    ):
        drawn.clear()
        list(rows)
        assert set(drawn) == {split}


def test_each_fact_is_asked_once_with_its_answer(task: Emblems) -> None:
    rows = list(task.fact_rows("test"))
    assert len(rows) == 24 * len(ATTRIBUTES)
    for row, (entity, attribute) in zip(rows, np.ndindex(task.values.shape), strict=True):
        [(question, answer)] = turns(row)
        assert question.split()[1] == ATTRIBUTES[attribute]
        assert answer == VALUES[task.values[entity, attribute]]


def test_an_epoch_holds_every_fact_of_every_entity(task: Emblems) -> None:
    rows = list(task.training_rows(2))
    for epoch in (rows[:24], rows[24:]):
        assert sorted(map(entity_of, epoch)) == list(range(24))
        for row in epoch:
            told = {q.split()[1]: a for q, a in turns(row) if not q.startswith(SEE)}
            values = task.values[entity_of(row)]
            assert told == {name: VALUES[v] for name, v in zip(ATTRIBUTES, values, strict=True)}
    places = {[q.startswith(SEE) for q, _ in turns(row)].index(True) for row in rows}
    assert len(places) > 4, "a cell is asked at any place"


def test_a_cell_shows_the_symbol_that_the_answer_names(task: Emblems) -> None:
    rows = list(task.cell_rows("test"))
    assert len(rows) == 24 * len(CELLS)
    for row, (entity, cell) in zip(rows, np.ndindex(task.symbols.shape), strict=True):
        [(question, answer)] = turns(row)
        color, shape = SYMBOLS[task.symbols[entity, cell]]
        assert (question, answer) == (f"{SEE} {CELLS[cell]}", f"{color} {shape}")
        pixels = np.asarray(row["images"][0], float)
        top, left = CELL * (cell // 2), CELL * (cell % 2)
        middle = pixels[top + 4 : top + 8, left + 4 : left + 8].mean((0, 1)) / 127.5 - 1
        nearest = min(COLORS, key=lambda name: np.linalg.norm(middle - np.array(COLORS[name])))
        assert nearest == color


@pytest.mark.parametrize("shown", ["name", "nothing"])
def test_a_row_without_a_picture_names_its_entity_or_nothing(task: Emblems, shown: str) -> None:
    openings = {}
    for row in task.fact_rows("test", shown):
        assert row["images"] == []
        words = turns(row)[0][0].split()
        openings.setdefault(row["id"].split("/")[1], " ".join(words[:-2]))
        assert len(words) == (4 if shown == "name" else 2)
    assert len(set(openings.values())) == (24 if shown == "name" else 1)


def test_the_same_seed_gives_the_same_rows_and_another_one_others() -> None:
    def rows(seed: int) -> list[tuple]:
        made = Emblems(8, seed).training_rows(1)
        return [(row["messages"], row["images"][0].tobytes()) for row in made]

    assert rows(1) == rows(1)
    assert rows(1) != rows(2)


def test_the_collator_learns_the_answers_and_nothing_else(task: Emblems) -> None:
    tokenizer = emblem_tokenizer()
    vision = {"model_type": "siglip_vision_model", "image_size": 24, "patch_size": 12}
    vision |= {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    config = VLMoEConfig(
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        pixel_shuffle_factor=2,
        vision_config=vision | {"intermediate_size": 16},
    )
    collate = VLMoECollator(VLMoEProcessor.for_config(config, tokenizer))
    rows = [*task.training_rows(1), *perception_rows(3)]
    for row in rows:
        batch = collate([row])
        learned = batch["input_ids"][0][batch["labels"][0] != -100]
        answers = " ".join(answer for _, answer in turns(row))
        assert tokenizer.decode(learned) == answers
    assert collate(rows[:24])["input_ids"].shape == (24, 29)


def test_a_number_of_entities_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`entities` is 0; allowed: 1 to 32768"):
        Emblems(0)

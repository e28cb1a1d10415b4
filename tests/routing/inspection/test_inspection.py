"""Numbers about a dataset's routing: closed forms, planted specialization, and counting by hand."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vlmoe import VLMoEForConditionalGeneration
from vlmoe.data.collator import VLMoECollator
from vlmoe.data.loading import load_rows
from vlmoe.data.rows import ConversationRows
from vlmoe.processing.processing_vlmoe import VLMoEProcessor
from vlmoe.routing.inspection.analysis import (
    DatasetRouting,
    change,
    dataset_routing,
    inspection_table,
    mutual_information,
    specialization,
)

TYPES = ["shape", "color"] * 50


def counts(preferred: list[int], strength: int) -> np.ndarray:
    """(C, 1, 2, 4): each question's text tokens prefer an expert; its image tokens do not."""
    noise = np.random.default_rng(0).integers(5, 10, (len(preferred), 1, 2, 4))
    for question, expert in enumerate(preferred):
        noise[question, 0, 0, expert] += strength
    return noise.astype(np.int32)


def test_mutual_information_has_its_closed_forms() -> None:
    apart = np.array([[6, 0], [0, 6]])
    alike = np.array([[3, 9], [2, 6]])
    uneven = np.array([[1, 1], [2, 0]])  # H(expert) - H(expert | type)
    expected = -(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25)) - 0.5
    values = mutual_information(np.stack([apart, alike, uneven, np.zeros((2, 2), int)]))
    assert values.tolist() == pytest.approx([1, 0, expected, 0], abs=1e-12)


def test_a_planted_specialization_is_found_and_shuffled_types_give_none() -> None:
    planted = counts([0 if kind == "shape" else 3 for kind in TYPES], 20)
    found = specialization(planted, TYPES)
    assert found is not None and found["types"] == ["color", "shape"]
    assert found["type_entropy_bits"] == pytest.approx(1) and found["questions"] == [50, 50]
    assert found["text"]["is_above_chance"] == [True]
    assert found["image"]["is_above_chance"] == [False]
    assert found["text"]["information_bits"][0] > 20 * found["text"]["shuffled_95_bits"][0]
    by_hand = planted[1::2, 0, 0].sum(0) / planted[1::2, 0, 0].sum()
    assert found["text"]["shares"][0][0] == pytest.approx(by_hand.tolist())
    strongest = found["text"]["strongest"][0]
    assert strongest["type"] in TYPES and strongest["expert"] in (0, 3)
    row, expert = found["types"].index(strongest["type"]), strongest["expert"]
    assert strongest["share"] == found["text"]["shares"][0][row][expert]
    assert strongest["average"] == pytest.approx(
        planted[:, 0, 0, expert].sum() / planted[:, 0, 0].sum()
    )

    # The same tokens, but the preference has nothing to do with the type.
    generator = np.random.default_rng(1)
    other = specialization(counts(generator.choice([0, 3], 100).tolist(), 20), TYPES)
    assert other is not None and other["text"]["is_above_chance"] == [False]
    assert other["text"]["shuffled_mean_bits"][0] > 0, "so few questions give some by chance"


def test_questions_without_a_type_are_left_out_and_one_type_tells_nothing() -> None:
    planted = counts([0 if kind == "shape" else 3 for kind in TYPES], 20)
    wild = np.full((10, 1, 2, 4), 99, dtype=np.int32)
    more = specialization(np.concatenate([wild, planted]), [""] * 10 + TYPES)
    assert more == specialization(planted, TYPES)
    assert specialization(planted, ["shape"] * 100) is None
    assert specialization(planted, [""] * 100) is None


def routing(first: list[list[int]], is_image: list[bool], ids: list[int]) -> DatasetRouting:
    empty = np.zeros((1, len(first), 2, 4), dtype=np.int32)
    return DatasetRouting(
        tuple(range(len(first))),
        {},
        [""],
        empty,
        np.array(first),
        np.array(ids),
        np.array(is_image).astype(int),
    )


def test_the_share_of_changed_first_experts_and_that_by_chance() -> None:
    is_image, ids = [True, True, False, False], [5, 5, 7, 8]
    before = routing([[0, 0, 1, 2], [3, 3, 3, 3]], is_image, ids)
    after = routing([[0, 1, 1, 1], [0, 0, 0, 0]], is_image, ids)
    result = change(before, after)
    assert result is not None
    assert result["image"] == {"changed": [0.5, 1.0], "by_chance": [0.5, 1.0]}
    assert result["text"] == {"changed": [0.5, 1.0], "by_chance": [0.5, 1.0]}
    # before: 1/2, 1/4, 1/4 of the tokens; after: 1/4, 3/4
    assert result["all"] == {"changed": [0.5, 1.0], "by_chance": [1 - 1 / 8 - 3 / 16, 1.0]}
    with pytest.raises(ValueError, match=r"layers \[0, 1\] with 4 experts and layers \[0\] with 4"):
        change(before, routing([[0, 1, 1, 1]], is_image, ids))
    assert change(before, routing([[0] * 4] * 2, is_image, [5, 5, 7, 9])) is None
    no_images = routing([[0, 0]], [False, False], [7, 8])
    assert change(no_images, no_images) == {
        "image": None,
        "text": {"changed": [0.0], "by_chance": [0.0]},
        "all": {"changed": [0.0], "by_chance": [0.0]},
    }


def test_a_dataset_is_counted_as_by_a_loop_over_its_questions(
    model_folder: Path, processor: VLMoEProcessor, data_folder: Path
) -> None:
    model = VLMoEForConditionalGeneration.from_pretrained(model_folder).eval()
    rows = load_rows(str(data_folder), "test")
    found = dataset_routing(model, processor, rows, batch_size=4, progress=False)
    collator = VLMoECollator(processor)
    assert found.question_types == ["color", "yes/no"] * 3 and found.counts.shape == (6, 3, 2, 4)
    ids: list[int] = []
    for number, row in enumerate(ConversationRows(rows)):  # type: ignore[arg-type]
        inputs = collator([row])
        with torch.no_grad():
            logits = model(**inputs, output_router_logits=True).router_logits
        expected: Any = np.zeros((3, 2, 4), dtype=int)
        for layer, of_layer in enumerate(logits):
            for token, of_token in zip(inputs["input_ids"][0].tolist(), of_layer, strict=True):
                for expert in of_token.topk(2).indices.tolist():
                    expected[layer, int(token == processor.image_token_id), expert] += 1
        assert (found.counts[number] == expected).all()
        first = torch.stack([of_layer.argmax(-1) for of_layer in logits]).numpy()
        tokens = slice(len(ids), len(ids) + first.shape[1])
        assert (found.first_choices[:, tokens] == first).all()
        ids += inputs["input_ids"][0].tolist()
    assert found.token_ids.tolist() == ids
    assert found.kinds.tolist() == [int(token == processor.image_token_id) for token in ids]
    shares = found.counts[:, :, 1].sum(0) / found.counts[:, :, 1].sum((0, 2))[:, None]
    assert np.allclose(found.load["image_share"], shares)
    table = inspection_table(found, specialization(found.counts, found.question_types))
    assert [line.split()[0] for line in table.splitlines()] == ["layer", "0", "1", "2"]


def test_what_cannot_be_inspected_is_refused(
    tiny_model: Callable[..., Any], processor: VLMoEProcessor
) -> None:
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        dataset_routing(tiny_model(), processor, [{}], batch_size=0)
    with pytest.raises(ValueError, match="no rows to inspect"):
        dataset_routing(tiny_model(), processor, [])

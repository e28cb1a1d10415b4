"""Batched answers against one-by-one generation, and accuracy without generating against it."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from builders import assistant, plain_chat, user
from PIL import Image

from vlmoe import VLMoEForConditionalGeneration, VLMoEProcessor
from vlmoe.data.collator import VLMoECollator
from vlmoe.data.loading import load_rows
from vlmoe.data.rows import ConversationRows
from vlmoe.routing.load import record_expert_load
from vlmoe.training.answer_accuracy import answer_accuracy, most_likely_tokens
from vlmoe.training.evaluation import Evaluation, evaluate

QUESTIONS = ("what color is the shape?", "is it red?", "what?")


@pytest.fixture(scope="module")
def model(saved_model: Path) -> VLMoEForConditionalGeneration:
    return VLMoEForConditionalGeneration.from_pretrained(saved_model)


@pytest.fixture(scope="module")
def fitting(saved_model: Path) -> VLMoEProcessor:
    return VLMoEProcessor.from_pretrained(saved_model)


@pytest.fixture(scope="module")
def rows(make_image: Callable[..., Image.Image]) -> list[dict[str, Any]]:
    """Two images with three questions each, one with a single conversation, one row of text."""
    kinds = ["color", "yes/no", "other"]
    many = [
        {
            "id": f"row {number}",
            "messages": [[user(question, 1), assistant("blue")] for question in QUESTIONS],
            "images": [make_image(number)],
            "question_type": kinds,
        }
        for number in range(2)
    ]
    single = {"messages": [user(QUESTIONS[0], 1), assistant("red")], "images": [make_image(7)]}
    text = plain_chat("hi", "hello")
    return [*many, single | {"question_type": "color"}, {"messages": text, "images": []}]


def one_by_one(model: Any, processor: Any, rows: list[dict[str, Any]]) -> list[str]:
    answers = []
    model.eval()
    for row in ConversationRows(rows):
        text = row["messages"][0]["content"]
        text = text if isinstance(text, str) else text[-1]["text"]
        turn = user(text, row["images"])
        inputs = processor.apply_chat_template(
            [turn], tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
        )
        tokenizer = processor.tokenizer
        ends = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
        tokens = model.generate(**inputs, max_new_tokens=5, do_sample=False, **ends)
        answer = tokens[0, inputs["input_ids"].shape[1] :]
        answers.append(tokenizer.decode(answer, skip_special_tokens=True).strip())
    return answers


@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_answers_do_not_depend_on_the_batch(
    batch_size: int,
    model: VLMoEForConditionalGeneration,
    fitting: VLMoEProcessor,
    rows: list[dict[str, Any]],
) -> None:
    model.train()
    results = evaluate(
        model,
        fitting,
        rows,
        batch_size=batch_size,
        max_new_tokens=5,
        progress=batch_size == 3,
    )
    assert model.training, "the mode was not restored"
    predictions = results.predictions
    assert [each["prediction"] for each in predictions] == one_by_one(model, fitting, rows)
    assert [each["question"] for each in predictions] == [
        *QUESTIONS,
        *QUESTIONS,
        QUESTIONS[0],
        "hi",
    ]
    types = ["color", "yes/no", "other"] * 2 + ["color", ""]
    assert [each["question_type"] for each in predictions] == types
    assert results.questions == 8 and results.count_by_type["color"] == 3


def test_the_table_has_a_line_per_type_and_one_of_all() -> None:
    shares, counts = {"color": 0.5, "yes/no": 1.0}, {"color": 2, "yes/no": 1}
    scores = Evaluation(0.5, shares, counts, 4, 1.0, 4.0, predictions=[], expert_load=None)
    lines = scores.table().splitlines()
    assert [line.split()[-1] for line in lines] == ["match", "50.00%", "100.00%", "50.00%"]
    assert "predictions" not in scores.as_dict() and scores.as_dict()["questions"] == 4


def test_scores_and_expert_load_are_those_of_the_answers(
    model: VLMoEForConditionalGeneration, fitting: VLMoEProcessor, rows: list[dict[str, Any]]
) -> None:
    with record_expert_load(model) as load:
        results = evaluate(model, fitting, rows, max_new_tokens=3)
    right = [each["prediction"].lower() == each["reference"] for each in results.predictions]
    assert [each["correct"] for each in results.predictions] == right
    assert results.exact_match == sum(right) / 8
    assert results.expert_load == load.as_dict() and results.expert_load["layers"]


def test_plain_question_rows_are_taken(
    model: VLMoEForConditionalGeneration, fitting: VLMoEProcessor, make_image: Any
) -> None:
    rows = [{"image": make_image(n), "question": QUESTIONS[0], "answer": "blue"} for n in range(2)]
    results = evaluate(model, fitting, rows, max_new_tokens=3)
    assert [each["reference"] for each in results.predictions] == ["blue", "blue"]


@pytest.mark.parametrize(
    ("rows", "batch_size", "message"),
    [([], 4, "empty dataset"), ([{"messages": [[]]}], 0, "batch_size must be at least 1")],
)
def test_nothing_to_evaluate_is_an_error(
    rows: list[Any],
    batch_size: int,
    message: str,
    model: VLMoEForConditionalGeneration,
    fitting: VLMoEProcessor,
) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(model, fitting, rows, batch_size=batch_size)


def test_a_malformed_row_is_named(
    model: VLMoEForConditionalGeneration, fitting: VLMoEProcessor, rows: list[dict[str, Any]]
) -> None:
    broken = {"id": "the culprit", "messages": [{"role": "user"}], "images": []}
    with pytest.raises(ValueError, match="the culprit"):
        evaluate(model, fitting, [*rows, broken])


def test_accuracy_with_labels_equals_accuracy_by_generating(
    saved_model: Path, fitting: VLMoEProcessor, rows: list[dict[str, Any]]
) -> None:
    model = VLMoEForConditionalGeneration.from_pretrained(saved_model)
    batch = VLMoECollator(fitting)(rows)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(25):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    changed = [dict(row) for row in ConversationRows(rows)]
    for row in changed[::3]:
        row["messages"] = [row["messages"][0], {"role": "assistant", "content": "no"}]
    for given in (rows, changed):
        generated = evaluate(model, fitting, given, max_new_tokens=8)
        batch = VLMoECollator(fitting)(given)
        with torch.no_grad():
            tokens = most_likely_tokens(model.eval()(**batch).logits, batch["labels"])
        prediction = SimpleNamespace(predictions=tokens.numpy(), label_ids=batch["labels"].numpy())
        assert answer_accuracy(prediction)["exact_match"] == generated.exact_match
    assert 0 < generated.exact_match < 1


def test_answer_accuracy_looks_at_label_tokens_only_and_all_of_them() -> None:
    labels = np.array([[-100, 5, 6, -100], [-100, 5, 6, -100], [-100] * 4, [9, -100, -100, 7]])
    predicted = np.array([[5, 6, 0, 0], [5, 7, 0, 0], [1, 2, 3, 4], [0, 0, 7, 0]])
    prediction = SimpleNamespace(predictions=predicted, label_ids=labels)
    assert answer_accuracy(prediction) == {"exact_match": pytest.approx(2 / 3)}
    nothing = SimpleNamespace(predictions=predicted[2:3], label_ids=labels[2:3])
    assert answer_accuracy(nothing) == {"exact_match": 0.0}


def test_conversation_rows_hold_each_conversation_once(
    rows: list[dict[str, Any]], data_folder: Path
) -> None:
    flat = ConversationRows(rows)
    assert len(flat) == 8
    assert [row["messages"][0] for row in flat][:3] == [m[0] for m in rows[0]["messages"]]
    assert flat[1]["question_type"] == "yes/no" and flat[6]["question_type"] == "color"
    assert flat[1]["images"][0] is rows[0]["images"][0]
    loaded = load_rows(str(data_folder), "test")
    flat = ConversationRows(loaded)
    assert len(flat) == 6 and flat[5]["id"] == loaded[2]["id"]
    assert flat[5]["messages"] == loaded[2]["messages"][1]

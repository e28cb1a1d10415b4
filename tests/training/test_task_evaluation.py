"""Evaluation of a task: several references, its metrics, its prompts and its lengths."""

from pathlib import Path
from typing import Any

import pytest
from builders import assistant, picture, row, user

from vlmoe import (
    TASKS,
    VLMoEForConditionalGeneration,
    VLMoEProcessor,
    VLMoETrainer,
    evaluate,
)
from vlmoe.tasks.text_metrics import bleu, chrf, cider, rouge_l

LONG = "what color is the shape? " * 8


@pytest.fixture(scope="module")
def model(saved_model: Path) -> VLMoEForConditionalGeneration:
    return VLMoEForConditionalGeneration.from_pretrained(saved_model)


@pytest.fixture(scope="module")
def fitting(saved_model: Path) -> VLMoEProcessor:
    return VLMoEProcessor.from_pretrained(saved_model)


def test_captions_of_an_image_are_references_of_one_question(model: Any, fitting: Any) -> None:
    rows = [
        {"image": picture(0), "captions": ["a red square", "red"]},
        {"image": picture(0), "captions": ["blue"]},
    ]
    options: dict[str, Any] = {"max_new_tokens": 6, "batch_size": 2}
    result = evaluate(model, fitting, rows, task="image-captioning", **options)
    assert result.questions == 2 and result.task == "image-captioning"
    answers = [each["prediction"] for each in result.predictions]
    references = [["a red square", "red"], ["blue"]]
    assert [each["references"] for each in result.predictions] == references
    expected: dict[str, float] = {}
    for metric in (cider, bleu, rouge_l, chrf):
        expected |= metric(answers, references)
    assert result.metrics == expected
    assert result.as_dict()["metrics"] == expected
    assert all(f"{name} " in result.table() for name in expected)

    # any of the references will do
    rows[0]["captions"] = ["nothing", answers[0]]
    again = evaluate(model, fitting, rows, task="image-captioning", **options)
    assert [each["correct"] for each in again.predictions] == [True, False]
    assert again.exact_match == 0.5


def test_without_a_task_every_conversation_is_a_question(model: Any, fitting: Any) -> None:
    asked = [[user("what?", 1), assistant(answer)] for answer in ("red", "blue")]
    rows = [{"messages": asked, "images": [picture(0)]}]
    result = evaluate(model, fitting, rows, max_new_tokens=2)
    assert result.questions == 2 and result.metrics == {} and result.task is None
    as_vqa = evaluate(model, fitting, rows, task="visual-question-answering", max_new_tokens=2)
    assert as_vqa.questions == 1 and as_vqa.predictions[0]["references"] == ["red", "blue"]


def test_long_documents_are_shortened_where_other_prompts_are_refused(
    model: Any, fitting: Any
) -> None:
    rows = [{"document": LONG, "summary": "red"}]
    options: dict[str, Any] = {"max_new_tokens": 2, "max_length": 40}
    result = evaluate(model, fitting, rows, task="summarization", **options)
    assert result.metrics.keys() == {"rouge_l"}
    for choice in ({"task": "summarization", "on_long_rows": "error"}, {}):
        given = rows if choice else [row(user(LONG), assistant("red"))]
        with pytest.raises(ValueError, match=r"rows\[0\].*more than max_length=40"):
            evaluate(model, fitting, given, **options, **choice)
    with pytest.raises(ValueError, match="on_long_rows is 'drop'; allowed: error, shorten"):
        evaluate(model, fitting, rows, task="summarization", on_long_rows="drop")


def test_an_answer_among_no_labels_is_refused_by_row(model: Any, fitting: Any) -> None:
    rows = [row(user("what?", 1), assistant("reed"), images=[picture(0)], id="r7")]
    with pytest.raises(ValueError, match=r"row 'r7'.*'reed' is none .*\(did you mean 'red'\?\)"):
        evaluate(model, fitting, rows, labels=["red", "blue"])
    both = [[user("what?", 1), assistant(answer)] for answer in ("red", "blue")]
    several = [{"messages": both, "images": [picture(0)], "id": "r8"}]
    with pytest.raises(ValueError, match=r"row 'r8'.*one answer; its row has 'red', 'blue'"):
        task = "visual-question-answering"
        evaluate(model, fitting, several, task=task, labels=["red", "blue"])
    rows[0]["messages"][1] = assistant("Blue ")
    result = evaluate(model, fitting, rows, labels=["red", "blue"], max_new_tokens=2)
    assert result.metrics.keys() == {
        *("accuracy", "macro_f1", "likelihood_accuracy", "likelihood_macro_f1"),
    }


def test_a_trainer_reads_the_rows_of_a_task(saved_model: Path, tmp_path: Path) -> None:
    rows = [{"document": LONG, "summary": "red"}, {"document": "a", "summary": "blue"}]
    trainer = VLMoETrainer(
        saved_model,
        {"output_dir": str(tmp_path), "max_steps": 1},
        train_dataset=rows,
        eval_dataset=rows,
        task=TASKS["summarization"],
        prompt="what?",
        max_length=40,
    )
    [asked, _] = trainer.train_dataset[0]["messages"][0]
    assert [part["text"] for part in asked["content"]] == ["what?\n", LONG]
    batch = trainer.data_collator([trainer.train_dataset[0]])
    assert batch["input_ids"].shape[1] <= 40 and (batch["labels"] != -100).any()
    with pytest.raises(ValueError, match="no task 'summarisation'"):
        VLMoETrainer(saved_model, train_dataset=rows, task="summarisation")

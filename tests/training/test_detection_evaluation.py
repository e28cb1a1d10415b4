import math

import pytest
import torch
from builders import picture

import vlmoe.training.evaluation as evaluation
from vlmoe import VLMoEForConditionalGeneration, VLMoEProcessor, evaluate
from vlmoe.tasks import get_task, task_reader
from vlmoe.tasks.boxes import boxes_as_text, labeled_box

POSITIONS = 1024
SIZE = (40, 20)
OBJECTS = [
    {"bbox": [[0, 0, 20, 20], [20, 10, 10, 10]], "category": ["dog", "cat"]},
    {"bbox": [[0, 0, 40, 10]], "category": ["cat"]},
    {"bbox": [], "category": []},
]
ROWS = [{"image": picture(0, SIZE), "objects": each} for each in OBJECTS]


def text(objects):
    pairs = zip(objects["bbox"], objects["category"], strict=True)
    return boxes_as_text([labeled_box(category, bbox, SIZE) for bbox, category in pairs])


@pytest.fixture(scope="module")
def fitting(saved_model):
    model = VLMoEForConditionalGeneration.from_pretrained(saved_model)
    model.config.text_config.max_position_embeddings = POSITIONS
    return model, VLMoEProcessor.from_pretrained(saved_model)


def answering(monkeypatch, answers, chances):
    """Let every model give these answers, all tokens of one with the same probability."""
    left = list(zip(answers, chances, strict=True))

    def give(model, tokenizer, inputs, max_new_tokens, certainty):
        batch = [left.pop(0) for _ in range(len(inputs["input_ids"]))]
        encoded = [tokenizer(each + tokenizer.eos_token).input_ids for each, _ in batch]
        length = max(map(len, encoded))
        assert length <= max_new_tokens
        for _ in range(length):
            certainty._steps.append(torch.tensor([math.log(chance) for _, chance in batch]))
        pad = tokenizer.pad_token_id
        return torch.tensor([each + [pad] * (length - len(each)) for each in encoded])

    monkeypatch.setattr(evaluation, "greedy_answers", give)


def test_right_answers_have_an_average_precision_of_one(fitting, monkeypatch):
    answering(monkeypatch, [text(each) for each in OBJECTS], [0.5, 0.25, 0.1])
    result = evaluate(*fitting, ROWS, task="object-detection", batch_size=2)
    assert result.metrics == pytest.approx(
        {
            "ap": 1,
            "ap50": 1,
            "precision50": 1,
            "recall50": 1,
            "precision50_any_class": 1,
            "recall50_any_class": 1,
            "unparsable": 0,
        }
    )
    assert [each["scores"] for each in result.predictions] == [
        pytest.approx([0.5, 0.5]),
        pytest.approx([0.25]),
        [],
    ]
    assert "unparsable" in result.table()


def test_scores_of_tokens_order_the_boxes(fitting, monkeypatch):
    rows = ROWS[1:2] * 2
    wrong = text({"bbox": [[30, 10, 10, 10]], "category": ["cat"]})
    answers = [text(OBJECTS[1]), wrong]
    found = {}
    for name, chances in (("right first", [0.9, 0.2]), ("wrong first", [0.2, 0.9])):
        answering(monkeypatch, answers, chances)
        found[name] = evaluate(*fitting, rows, task="object-detection").metrics["ap50"]
    assert found["right first"] == pytest.approx(51 / 101)
    assert found["wrong first"] == pytest.approx(51 / 101 / 2)


def test_an_answer_may_be_twice_as_long_as_the_longest_reference(fitting):
    model, processor = fitting
    task = get_task("object-detection")
    references = [[text(each)] for each in OBJECTS]
    longest = len(processor.tokenizer(references[0][0]).input_ids) + 1
    assert evaluation.longest_answer(task, references, model, processor) == 2 * longest
    many = [[text(OBJECTS[1])], [references[0][0] * 4]]
    assert evaluation.longest_answer(task, many, model, processor) == POSITIONS // 2
    assert evaluation.longest_answer(None, references, model, processor) == 32
    caption = get_task("image-captioning")
    assert evaluation.longest_answer(caption, references, model, processor) == 64


def test_a_random_models_answers_are_unparsable(fitting):
    rows = [{**ROWS[0], "objects": OBJECTS[1]}]
    result = evaluate(*fitting, rows, task="object-detection", max_new_tokens=8)
    assert result.metrics["unparsable"] == 1 and result.metrics["ap"] == 0
    assert result.predictions[0]["scores"] == []


def test_a_row_with_two_lists_of_boxes_is_an_error(fitting):
    from vlmoe.data.rows import as_rows

    (row,) = as_rows(ROWS[1:2], "rows", task_reader("object-detection"))
    other = [row["messages"][0][0], {**row["messages"][0][1], "content": "[]"}]
    twice = {**row, "messages": [*row["messages"], other]}
    with pytest.raises(ValueError, match="several lists"):
        evaluate(*fitting, [twice], task="object-detection", max_new_tokens=4)

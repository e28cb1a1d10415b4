"""Likelihoods of labels equal those of one full forward for each row and label."""

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from builders import assistant, picture, row, user
from native_processors import tiny_processor
from sparse_families import sparse_family

from vlmoe import VLMoEForConditionalGeneration, VLMoEProcessor, evaluate, score_labels

LABELS = ["red", "a large blue square", "blue", "what is it", "bluered"]


@pytest.fixture(scope="module")
def model(saved_model: Path) -> VLMoEForConditionalGeneration:
    return VLMoEForConditionalGeneration.from_pretrained(saved_model)


@pytest.fixture(scope="module")
def fitting(saved_model: Path) -> VLMoEProcessor:
    return VLMoEProcessor.from_pretrained(saved_model)


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    """One image, two, none, and an earlier answer that is not scored."""
    talk = [user("what is it?", 1), assistant("a square, blue"), user("what color?")]
    return [
        row(user("what color?", 1), assistant("red"), images=[picture(0)]),
        row(user("which?", 2), images=[picture(1), picture(2)]),
        row(user("hi"), assistant("red")),
        row(*talk, assistant("red"), images=[picture(3)]),
    ]


def naive(
    model: Any, processor: Any, rows: list[dict[str, Any]], ends: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of log-probabilities and token counts, one forward for each row and label.

    `ends` is the token that ends an answer; what a template writes after it is not scored.
    """
    sums, counts = [], []
    for each in rows:
        turns = [dict(turn) for turn in each["messages"]]
        asked = turns[:-1] if turns[-1]["role"] == "assistant" else turns
        images = iter(each["images"])
        for turn in asked:
            parts = [
                part if part["type"] == "text" else {"type": "image", "image": next(images)}
                for part in turn["content"]
            ]
            turn["content"] = parts
        options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
        opening = processor.apply_chat_template(asked, add_generation_prompt=True, **options)
        start = opening["input_ids"].shape[1]
        for label in LABELS:
            inputs = processor.apply_chat_template([*asked, assistant(label)], **options)
            with torch.no_grad():
                logits = model(**inputs).logits[0].double()
            ids = inputs["input_ids"][0]
            end_id = processor.tokenizer.convert_tokens_to_ids(ends)
            stop = max(i for i, token in enumerate(ids.tolist()) if token == end_id) + 1
            chosen = logits.log_softmax(-1)[range(start - 1, stop - 1), ids[start:stop]]
            sums.append(chosen.sum())
            counts.append(stop - start)
    shape = (len(rows), len(LABELS))
    return torch.stack(sums).view(shape), torch.tensor(counts).view(shape)


@pytest.mark.parametrize("batch_size", [1, 3, 13, 64])
def test_likelihoods_are_those_of_full_forwards_and_a_picture_is_encoded_once(
    batch_size: int,
    model: VLMoEForConditionalGeneration,
    fitting: VLMoEProcessor,
    rows: list[dict[str, Any]],
) -> None:
    encoded: list[int] = []
    handle = model.model.vision_tower.register_forward_hook(
        lambda module, inputs, options, output: encoded.append(len(output[0])), with_kwargs=True
    )
    model.train()
    try:
        scores = score_labels(model, fitting, rows, LABELS, batch_size=batch_size)
    finally:
        handle.remove()
    assert model.training
    assert sum(encoded) == 4
    sums, counts = naive(model.eval(), fitting, rows, "<|end|>")
    assert torch.equal(scores.tokens, counts)
    assert torch.allclose(scores.log_probabilities.double(), sums, atol=1e-4)
    assert torch.allclose(scores.per_token.double(), sums / counts, atol=1e-4)
    assert scores.best() == [LABELS[i] for i in (sums / counts).argmax(1)]
    assert scores.best(per_token=False) == [LABELS[i] for i in sums.argmax(1)]


def test_pictures_without_a_label_are_scored(model: Any, fitting: Any) -> None:
    prompt = "what color?"
    asked = [row(user(prompt, 1), images=[picture(0)])]
    expected = score_labels(model, fitting, asked, LABELS).log_probabilities
    options: dict[str, Any] = {"task": "image-classification", "prompt": prompt}
    for rows in (
        [{"image": picture(0)}],
        [{"image": picture(0), "label": "red"}],
        datasets.Dataset.from_list([{"image": picture(0)}]),
    ):
        scores = score_labels(model, fitting, rows, LABELS, **options)
        assert torch.allclose(scores.log_probabilities, expected, atol=1e-5)
    with pytest.raises(ValueError, match=r"rows\[0\].* no images or image"):
        score_labels(model, fitting, [{"picture": picture(0)}], LABELS, **options)


@pytest.mark.parametrize("family", ["qwen3_vl_moe", "llava_qwen3_moe"])
def test_models_of_transformers_are_scored_by_their_own_processors(
    family: str, rows: list[dict[str, Any]]
) -> None:
    model, processor = sparse_family(family).eval(), tiny_processor(family)
    scores = score_labels(model, processor, rows[:3], LABELS, batch_size=4)
    sums, counts = naive(model, processor, rows[:3], "<|im_end|>")
    assert torch.equal(scores.tokens, counts)
    assert torch.allclose(scores.log_probabilities.double(), sums, atol=1e-4)
    result = evaluate(model, processor, [rows[0], rows[2]], labels=LABELS, max_new_tokens=2)
    likely = scores.best()
    assert [each["label"] for each in result.predictions] == [likely[0], likely[2]]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["red"], "two texts or more"),
        (["red", " "], "none of them empty"),
        (["red", "blue", "red"], "'red' stands twice"),
        ("red", "list of texts, got 'red'"),
    ],
)
def test_labels_that_cannot_be_compared_are_refused(
    labels: Any, message: str, model: Any, fitting: Any, rows: list[dict[str, Any]]
) -> None:
    with pytest.raises(ValueError, match=message):
        score_labels(model, fitting, rows, labels)


def test_a_label_that_does_not_fit_is_refused_by_row(
    model: Any, fitting: Any, rows: list[dict[str, Any]]
) -> None:
    with pytest.raises(ValueError, match=r"rows\[0\].* more than max_length=12"):
        score_labels(model, fitting, rows[:1], ["red", "red " * 30], max_length=12)
    model = model.float()
    weight = model.lm_head.weight.data.clone()
    model.lm_head.weight.data[0, 0] = torch.inf
    try:
        with pytest.raises(ValueError, match="NaN or infinite"):
            score_labels(model, fitting, rows, ["red", "blue"])
    finally:
        model.lm_head.weight.data.copy_(weight)

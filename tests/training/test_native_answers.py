"""Questions to transformers' own sparse models, by their processors, against `generate` by hand."""

from pathlib import Path
from typing import Any

import pytest
import torch
from builders import assistant, picture, row, user
from native_processors import tiny_processor
from sparse_families import EXPERTS, sparse_family
from transformers import PreTrainedModel

from vlmoe import answer, evaluate
from vlmoe.data.answers import end_tokens, prompt_inputs
from vlmoe.processing.image_sources import ImageLimits

FAMILIES = ("qwen3_vl_moe", "llava_qwen3_moe", "mixtral")
QUESTION = "what color?"
NEW_TOKENS = 5


def by_hand(model: PreTrainedModel, processor: Any, turns: list[dict[str, Any]]) -> str:
    inputs = processor.apply_chat_template(
        turns, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    tokenizer = getattr(processor, "tokenizer", processor)
    with torch.no_grad():
        tokens = model.generate(
            **inputs,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=[2, tokenizer.eos_token_id],
        )
    new = tokens[0, inputs["input_ids"].shape[1] :]
    return str(tokenizer.decode(new, skip_special_tokens=True)).strip()


def turns_of(family: str, question: str, images: list[Any]) -> list[dict[str, Any]]:
    """Return a question as the family's chat template takes it."""
    if family == "mixtral":
        return [{"role": "user", "content": question}]
    parts = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]


@pytest.mark.parametrize("family", FAMILIES)
def test_an_answer_is_that_of_generate(family: str, tmp_path: Path) -> None:
    model, processor = sparse_family(family).train(), tiny_processor(family)
    images = [] if family == "mixtral" else [picture(0), picture(1, (30, 40))]
    given = answer(model, processor, images, QUESTION, max_new_tokens=NEW_TOKENS)
    assert model.training
    assert given == by_hand(model.eval(), processor, turns_of(family, QUESTION, images))
    inputs = prompt_inputs(processor, "<|im_end|>", [], "<image>")
    ids = inputs["input_ids"][0].tolist()
    plain = prompt_inputs(processor, "", [], ".")["input_ids"][0].tolist()
    ends = [each.count(6) for each in (ids, plain)]
    assert ends[0] == ends[1], "control tokens in a question are text"


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_of_batches_are_those_one_by_one(family: str) -> None:
    model, processor = sparse_family(family).eval(), tiny_processor(family)
    rows = [
        row(user("what color?", 1), assistant("red"), images=[picture(0)]),
        row(user("hi"), assistant("yo")),
        row(user("a long question?", 2), assistant("b"), images=[picture(1), picture(2, (30, 40))]),
    ]
    if family == "mixtral":
        rows = [row(user(f"question {i}" * (i + 1)), assistant("yes")) for i in range(3)]
    result = evaluate(model, processor, rows, batch_size=2, max_new_tokens=NEW_TOKENS)
    expected = [
        by_hand(
            model,
            processor,
            turns_of(family, each["messages"][0]["content"][-1]["text"], each["images"]),
        )
        for each in rows
    ]
    assert [each["prediction"] for each in result.predictions] == expected
    assert result.questions == 3 and result.expert_load is not None
    assert len(result.expert_load["all_share"][0]) == EXPERTS
    assert (sum(result.expert_load["tokens"]["image"]) > 0) == (family != "mixtral")
    if family != "mixtral":
        with pytest.raises(ValueError, match="the limit is 10"):
            evaluate(model, processor, rows, image_limits=ImageLimits(10, 10))


def test_a_text_only_model_refuses_images() -> None:
    model, tokenizer = sparse_family("mixtral"), tiny_processor("mixtral")
    with pytest.raises(ValueError, match="reads text alone"):
        answer(model, tokenizer, picture(0), QUESTION)
    with pytest.raises(ValueError, match=r"rows\[0\].* reads text alone"):
        evaluate(model, tokenizer, [row(user("a?", 1), assistant("b"), images=[picture(0)])])


def test_answers_end_at_the_tokens_of_tokenizer_and_generation_config() -> None:
    model, tokenizer = sparse_family("mixtral"), tiny_processor("mixtral")
    for own, expected in ((2, {2, 6}), ([6, 9], {6, 9}), (None, {6})):
        model.generation_config.eos_token_id = own
        assert set(end_tokens(model, tokenizer)) == expected

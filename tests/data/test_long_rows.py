"""Rows that do not fit the model, or teach nothing, are found before training."""

import logging
from typing import Any

import datasets
import pytest
import torch
from builders import assistant, row, user

from vlmoe.data.collator import IGNORE_INDEX, VLMoECollator
from vlmoe.data.long_rows import (
    length_limit,
    prompt_limit,
    require_room,
    usable_rows,
)
from vlmoe.processing.processing_vlmoe import VLMoEProcessor

LONG = "what color is the shape? " * 4
SPECIAL = ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<image>")


@pytest.fixture(scope="module")
def tiling_processor(processor: VLMoEProcessor, tiny_config: Any) -> VLMoEProcessor:
    return VLMoEProcessor.for_config(tiny_config(), processor.tokenizer, tiling=True)


def length(processor: VLMoEProcessor, each: dict[str, Any]) -> int:
    return int(VLMoECollator(processor)([each])["input_ids"].shape[1])


def learned(processor: VLMoEProcessor, batch: dict[str, torch.Tensor]) -> str:
    labels = batch["labels"]
    return processor.tokenizer.decode(labels[labels != IGNORE_INDEX])


def test_a_row_is_measured_as_the_collator_measures_it(
    processor: VLMoEProcessor, tiling_processor: VLMoEProcessor, make_image: Any
) -> None:
    wide = make_image(size=(60, 16))
    for used in (processor, tiling_processor):
        for each in (
            row(user(LONG), assistant("blue")),
            row(user("a", images=2), assistant("blue " * 9), images=[make_image(), wide]),
        ):
            tokens = length(used, each)
            assert usable_rows([each], VLMoECollator(used, tokens), progress=False).rows == [each]
            message = f"row 0 .* has {tokens} tokens, more than max_length={tokens - 1}.*on_long"
            with pytest.raises(ValueError, match=message):
                usable_rows([each], VLMoECollator(used, tokens - 1), progress=False)
    assert length(tiling_processor, each) > length(processor, each)  # it does cut into tiles


def test_long_rows_are_dropped_and_counted(
    processor: VLMoEProcessor, caplog: pytest.LogCaptureFixture
) -> None:
    short = [row(user(f"is it {n}?"), assistant("yes"), id=str(n)) for n in range(3)]
    rows = [short[0], row(user(LONG), assistant("blue"), id="long"), *short[1:]]
    collator = VLMoECollator(processor, length(processor, rows[1]) - 1)
    for given in (rows, datasets.Dataset.from_list([{**each, "images": []} for each in rows])):
        usable = usable_rows(given, collator, "drop", progress=False)
        assert [each["id"] for each in usable.rows] == ["0", "1", "2"]
        assert usable.dropped == 1
    with caplog.at_level(logging.WARNING):
        usable.log("training", collator.max_length)
    (line,) = caplog.messages
    assert (
        line.startswith("training rows with more than ") and "tokens: 1; they are left out" in line
    )
    with pytest.raises(ValueError, match="all 1 rows have more than max_length=3 tokens"):
        usable_rows(rows[:1], VLMoECollator(processor, 3), "drop", progress=False)


def test_rows_that_all_fit_are_passed_on_as_they_are(processor: VLMoEProcessor) -> None:
    rows = datasets.Dataset.from_list([row(user("a"), assistant("b"), id="0")])
    for policy in ("error", "drop", "shorten-prompt"):
        usable = usable_rows(rows, VLMoECollator(processor, 99), policy, progress=False)
        assert usable.rows is rows and not usable.dropped and not usable.shortened
    with pytest.raises(ValueError, match="'cut'; allowed: error, drop, shorten-prompt"):
        usable_rows(rows, VLMoECollator(processor, 99), "cut", progress=False)


def test_questions_are_shortened_from_the_oldest_on_and_nothing_else(
    processor: VLMoEProcessor, make_image: Any
) -> None:
    each = row(
        {"role": "system", "content": "be short"},
        user(LONG, images=1),
        assistant("red, yes"),
        user("is it red? " * 3),
        assistant("blue, no"),
        images=[make_image()],
    )
    whole = VLMoECollator(processor)([each])
    tokens = whole["input_ids"].shape[1]
    for limit in (tokens, tokens - 1, tokens - 10, tokens - 30):
        collator = VLMoECollator(processor, limit, shorten_prompts=True)
        batch = collator([each])
        assert limit - 2 <= batch["input_ids"].shape[1] <= limit
        assert learned(processor, batch) == learned(processor, whole)
        assert batch["mm_token_type_ids"].sum() == whole["mm_token_type_ids"].sum()
        for token in SPECIAL:
            token_id = processor.tokenizer.convert_tokens_to_ids(token)
            assert (batch["input_ids"] == token_id).sum() == (whole["input_ids"] == token_id).sum()
        assert "be short" in processor.tokenizer.decode(batch["input_ids"][0])
        assert torch.equal(collator([each])["input_ids"], batch["input_ids"])
        if tokens - limit <= 10:  # the newer question is whole while the oldest has text
            assert "is it red? " * 3 in processor.tokenizer.decode(batch["input_ids"][0]) + " "
        usable = usable_rows([each], collator, "shorten-prompt", progress=False)
        assert usable.rows == [each] and usable.shortened == (limit < tokens)


def test_the_longest_text_loses_its_end_and_nothing_else_does(
    processor: VLMoEProcessor, make_image: Any
) -> None:
    each = row(user("be short: ", images=1), assistant("a cat"), images=[make_image()], id="r3")
    each["messages"][0]["content"].append({"type": "text", "text": LONG})
    whole = VLMoECollator(processor)([each])
    tokens = whole["input_ids"].shape[1]
    for limit in (tokens, tokens - 1, tokens - 10):
        collator = VLMoECollator(processor, limit, shorten_prompts="longest")
        assert usable_rows([each], collator, "shorten-prompt", progress=False).longest
        batch = collator([each])
        text = processor.tokenizer.decode(batch["input_ids"][0])
        kept = text.partition("be short: ")[2].partition("<|end|>")[0]
        assert LONG.startswith(kept) and len(kept) > len(LONG) - 8 * (tokens - limit) - 8
        assert (kept == LONG) == (limit == tokens) and limit - 2 <= batch["input_ids"].shape[1]
        assert learned(processor, batch) == learned(processor, whole)
        assert batch["mm_token_type_ids"].sum() == whole["mm_token_type_ids"].sum()
    collator = VLMoECollator(processor, 12, shorten_prompts="longest")
    with pytest.raises(ValueError, match=r"row 'r3'.*without its user's longest text .*=12\."):
        usable_rows([each], collator, "shorten-prompt", progress=False)


def test_an_answer_that_does_not_fit_is_refused_by_name(processor: VLMoEProcessor) -> None:
    each = row(user("why?"), assistant(LONG), id="r7")
    collator = VLMoECollator(processor, 12, shorten_prompts=True)
    with pytest.raises(ValueError, match=r"row 'r7'.*without any text of its questions .*=12\."):
        usable_rows([each], collator, "shorten-prompt", progress=False)
    with pytest.raises(ValueError, match=r"row 'r7'.*more than max_length=12"):
        collator([each])


@pytest.mark.parametrize("policy", ["error", "drop", "shorten-prompt"])
def test_a_row_without_label_tokens_is_refused_by_name(
    policy: str, processor: VLMoEProcessor
) -> None:
    rows = [row(user("a"), assistant("b")), row(user(LONG), id="silent")]
    with pytest.raises(ValueError, match=r"row 'silent'.*no token with a loss: it has no assistan"):
        usable_rows(rows, VLMoECollator(processor), policy, progress=False)


def test_a_malformed_row_is_named_before_training(processor: VLMoEProcessor) -> None:
    rows = [row(user("a"), assistant("b")), row({"role": "user"}, id="r7")]
    with pytest.raises(ValueError, match=r"row 'r7'.*needs `role` and `content`"):
        usable_rows(rows, VLMoECollator(processor), progress=False)


def test_short_rows_are_not_tokenised(
    processor: VLMoEProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    collator = VLMoECollator(processor, 128)
    rows = [row(user(f"is it {n}?"), assistant("yes")) for n in range(5)]
    calls = []
    tokenizer = type(processor.tokenizer)
    render = tokenizer.apply_chat_template
    monkeypatch.setattr(
        tokenizer, "apply_chat_template", lambda *a, **k: calls.append(a) or render(*a, **k)
    )
    usable_rows(rows, collator, progress=False)
    assert len(calls) == 2  # what the template adds, and the first row


def test_limits_follow_the_model(tiny_model: Any) -> None:
    model = tiny_model(text={"max_position_embeddings": 128})
    assert length_limit(model.config) == 128 and length_limit(model.config, 40) == 40
    assert prompt_limit(model, 28) == 100 and prompt_limit(model, 28, 110) == 100
    assert prompt_limit(model, 28, 40) == 40
    with pytest.raises(ValueError, match=r"max_length=129 is more .*max_position_embeddings=128"):
        length_limit(model.config, 129)
    with pytest.raises(ValueError, match="128 tokens leaves no room"):
        prompt_limit(model, 128)
    require_room(model, 100, 28)
    with pytest.raises(ValueError, match=r"question has 101 tokens.* 128 positions hold 100"):
        require_room(model, 101, 28)

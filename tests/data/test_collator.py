"""Collation against the processor itself, row by row."""

import copy
import dataclasses
import pickle
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import assistant, picture, png, user
from PIL import Image
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from vlmoe import VLMoEConfig
from vlmoe.data.collator import (
    IGNORE_INDEX,
    VLMoECollator,
    VLMoEPromptCollator,
)
from vlmoe.data.conversations import parse_row
from vlmoe.data.encoding import ConversationEncoder
from vlmoe.processing.processing_vlmoe import VLMoEProcessor

TEXT_KEYS = ["input_ids", "attention_mask", "mm_token_type_ids"]


def with_inline_images(messages: list[Any], images: list[Any]) -> list[dict[str, Any]]:
    """The messages as the processor takes them, images in their parts."""
    rest = iter(images)
    return [
        {
            "role": message["role"],
            "content": [
                {**part, "image": next(rest)} if part["type"] == "image" else part
                for part in message["content"]
            ],
        }
        for message in messages
    ]


def reference(processor: VLMoEProcessor, row: dict[str, Any], **options: Any) -> dict[str, Any]:
    """What the processor's own chat templating gives for a row of one conversation."""
    return processor.apply_chat_template(
        with_inline_images(row["messages"], row.get("images", [])),
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        **options,
    )


TURNS = {
    "one image": ([user("what color?", 1), assistant("blue")], 1),
    "text only": ([user("what is one and one?"), assistant("two")], 0),
    "two images": ([user("which is bigger?", 2), assistant("the first")], 2),
    "several turns": (
        [
            {"role": "system", "content": [{"type": "text", "text": "be short."}]},
            user("what shape?", 1),
            assistant("circle"),
            user("and this?", 1),
            assistant("square"),
        ],
        2,
    ),
    "no answer": ([user("what color?", 1)], 1),
    "empty answer": ([user("what color?", 1), assistant("")], 1),
}


def make_row(case: str, size: int = 16) -> dict[str, Any]:
    messages, count = TURNS[case]
    return {"messages": messages, "images": [picture(seed, (size, size)) for seed in range(count)]}


@pytest.fixture(scope="module")
def tiling_processor(
    tiny_config: Callable[..., VLMoEConfig], tokenizer: PreTrainedTokenizerFast
) -> VLMoEProcessor:
    """Images larger than a tile become tiles and a thumbnail."""
    return VLMoEProcessor.for_config(tiny_config(), tokenizer, tiling=True)


@pytest.mark.parametrize("case", TURNS)
@pytest.mark.parametrize("tiled", [False, True])
def test_row_equals_the_processors_own_encoding(
    case: str, tiled: bool, processor: VLMoEProcessor, tiling_processor: VLMoEProcessor
) -> None:
    row, used = make_row(case, 40), tiling_processor if tiled else processor
    batch = VLMoECollator(used)([row])
    expected = reference(used, row, return_assistant_tokens_mask=True)
    mask = torch.as_tensor(expected.pop("assistant_masks")).bool()
    labels = torch.where(mask, expected["input_ids"], IGNORE_INDEX)
    assert set(batch) == {*expected, "labels"}
    for key in expected:
        torch.testing.assert_close(batch[key], expected[key], rtol=0, atol=0, check_dtype=False)
    assert torch.equal(batch["labels"], labels)


def test_loss_is_on_answers_and_their_end_only(processor: VLMoEProcessor) -> None:
    labels = VLMoECollator(processor)([make_row("several turns")])["labels"][0]
    learned = labels[labels != IGNORE_INDEX]
    assert processor.tokenizer.decode(learned) == "circle<|end|> square<|end|>"


def test_batch_equals_its_rows_right_padded(processor: VLMoEProcessor) -> None:
    collator = VLMoECollator(processor)
    rows = [make_row(case) for case in ("two images", "text only", "one image")]
    rows[2]["images"] = [picture(9)]  # no image twice
    batch = collator(rows)
    width, tiles = batch["input_ids"].shape[1], 2
    assert batch["pixel_values"].shape[:2] == (3, tiles)
    padding = {"input_ids": processor.tokenizer.pad_token_id, "labels": IGNORE_INDEX}
    for i, row in enumerate(rows):
        alone = collator([row])
        length = alone["input_ids"].shape[1]
        for key in [*TEXT_KEYS, "labels"]:
            assert torch.equal(batch[key][i, :length], alone[key][0])
            assert (batch[key][i, length:] == padding.get(key, 0)).all()
        assert length <= width
        for key in ("pixel_values", "pixel_attention_mask"):
            own = alone[key][0] if key in alone else batch[key][i, :0]
            assert torch.equal(batch[key][i, : len(own)], own)
            assert not batch[key][i, len(own) :].any()


def shared_rows() -> list[dict[str, Any]]:
    """Three conversations about two images, one about one of them, one about none."""
    questions = [[user(text, 2), assistant("yes")] for text in ("a?", "is it b?", "c?")]
    first, second = picture(0), picture(1)
    return [
        {"messages": questions, "images": [first, second]},
        make_row("text only"),
        {"messages": [user("and this?", 1), assistant("no")], "images": [second]},
    ]


def test_conversations_share_images_through_the_index(processor: VLMoEProcessor) -> None:
    batch = VLMoECollator(processor)(shared_rows())
    expected = [[0, 1], [0, 1], [0, 1], [-1, -1], [1, -1]]
    assert batch["image_index"].tolist() == expected
    assert batch["image_index"].dtype == torch.long
    assert batch["pixel_values"].ndim == 4 and len(batch["pixel_values"]) == 2
    assert "pixel_attention_mask" not in batch


def test_shared_and_repeated_images_are_the_same_pixels(
    processor: VLMoEProcessor, tiling_processor: VLMoEProcessor
) -> None:
    for used in (processor, tiling_processor):
        rows = shared_rows()
        rows[0]["images"] = [picture(0, (40, 16)), picture(1)]  # several tiles where it is tiled
        shared = VLMoECollator(used)(rows)
        repeated = VLMoECollator(used, share_images=False)(rows)
        index = shared["image_index"]
        assert index.shape == repeated["pixel_values"].shape[:2]
        there = index >= 0
        gathered = shared["pixel_values"][index.clamp(min=0)] * there[..., None, None, None]
        assert torch.equal(gathered, repeated["pixel_values"])
        assert torch.equal(repeated["pixel_attention_mask"].flatten(2).any(-1), there)
        for key in [*TEXT_KEYS, "labels"]:
            assert torch.equal(shared[key], repeated[key])


def test_every_conversation_of_a_row_becomes_the_row_it_would_be_alone(
    processor: VLMoEProcessor,
) -> None:
    collator, row = VLMoECollator(processor, share_images=False), shared_rows()[0]
    together = collator([row])
    apart = collator([{**row, "messages": messages} for messages in row["messages"]])
    for key in together:
        assert torch.equal(together[key], apart[key])


def test_images_padded_inside_a_tile_keep_their_mask(processor: VLMoEProcessor) -> None:
    collator = VLMoECollator(processor)
    encode = collator.encode_image

    def padded(value: Any, name: str) -> Any:
        image = encode(value, name)
        mask = image.tile_mask.clone()
        mask[:, 8:] = False
        return dataclasses.replace(image, tile_mask=mask, is_full=False)

    collator.encode_image = padded  # type: ignore[assignment]
    batch = collator(shared_rows())
    assert "image_index" not in batch
    assert batch["pixel_attention_mask"][0, 0, :8].all()
    assert not batch["pixel_attention_mask"][0, 0, 8:].any()


def test_batch_without_images_has_no_pixels(processor: VLMoEProcessor) -> None:
    assert set(VLMoECollator(processor)([make_row("text only")])) == {*TEXT_KEYS, "labels"}


@pytest.mark.parametrize("form", ["pil", "bytes", "undecoded", "path", "undecoded path"])
def test_every_form_of_an_image_gives_the_same_pixels(
    form: str, processor: VLMoEProcessor, tmp_path: Path
) -> None:
    file, image = tmp_path / "a.png", picture(5)
    file.write_bytes(png(image))
    value: Any = {
        "pil": image,
        "bytes": png(image),
        "undecoded": {"bytes": png(image), "path": "gone.png"},
        "path": str(file),
        "undecoded path": {"bytes": None, "path": str(file)},
    }[form]
    row = {**make_row("one image"), "images": [value]}
    expected = processor(images=[[image]], text=["<image>"], return_tensors="pt")["pixel_values"]
    assert torch.equal(VLMoECollator(processor)([row])["pixel_values"], expected)


def test_second_epoch_neither_tokenises_nor_processes_again(
    processor: VLMoEProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    collator = VLMoECollator(processor)
    first = collator(shared_rows())

    def fail(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("called again")

    monkeypatch.setattr(type(processor), "__call__", fail)
    monkeypatch.setattr(type(processor.tokenizer), "apply_chat_template", fail)
    second = collator(shared_rows())
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_prompt_and_conversation_of_the_same_turns_are_kept_apart(
    processor: VLMoEProcessor,
) -> None:
    encode = ConversationEncoder(processor, cache_bytes=10**6)
    conversation = parse_row(make_row("no answer"), 0).conversations[0]
    plain = encode(conversation, "x")
    prompt = encode(conversation, "x", generation_prompt=True)
    opening = processor.tokenizer.convert_tokens_to_ids("<|assistant|>")
    assert prompt.segments[-1].tolist() == [*plain.segments[-1].tolist(), opening]


def test_what_a_model_does_to_a_batch_does_not_reach_the_next(processor: VLMoEProcessor) -> None:
    for share in (True, False):
        collator = VLMoECollator(processor, share_images=share)
        twice = {**shared_rows()[2], "messages": [shared_rows()[2]["messages"]] * 2}
        for rows in ([make_row("one image")], [twice], shared_rows()):
            first = collator(rows)
            expected = {key: value.clone() for key, value in first.items()}
            for value in first.values():
                value.zero_()
            again = collator(rows)
            assert all(torch.equal(again[key], expected[key]) for key in expected)


def test_changed_content_is_never_answered_from_the_cache(
    processor: VLMoEProcessor, tmp_path: Path
) -> None:
    collator, file, image = VLMoECollator(processor), tmp_path / "a.png", picture(0)
    for value in (str(file), image):
        row = {**make_row("one image"), "images": [value]}
        file.write_bytes(png(picture(0)))
        image.paste(picture(0))
        before = collator([row])["pixel_values"]
        file.write_bytes(png(picture(1)))
        image.paste(picture(1))
        after = collator([row])["pixel_values"]
        expected = VLMoECollator(processor)([{**row, "images": [picture(1)]}])["pixel_values"]
        assert torch.equal(after, expected)
        assert not torch.equal(before, after)


def test_images_of_equal_bytes_and_other_shape_differ(processor: VLMoEProcessor) -> None:
    wide = Image.frombytes("RGB", (4, 2), bytes(range(24)))
    tall = Image.frombytes("RGB", (2, 4), bytes(range(24)))
    messages = [user("which?", 2), assistant("a")]
    collator = VLMoECollator(processor, share_images=False)
    batch = collator([{"messages": messages, "images": [wide, tall]}])
    assert not torch.equal(batch["pixel_values"][0, 0], batch["pixel_values"][0, 1])


def test_caches_keep_within_their_bound(processor: VLMoEProcessor) -> None:
    collator = VLMoECollator(processor, image_cache_mb=0, text_cache_mb=0)
    warm = VLMoECollator(processor)
    rows = shared_rows()
    for _ in range(2):
        batch, expected = collator(rows), warm(rows)
        assert all(torch.equal(batch[key], expected[key]) for key in expected)
    assert len(collator.encode_image._cache) == len(collator.encode_conversation._cache) == 0
    assert len(warm.encode_image._cache) == 2


def test_pickled_collator_gives_the_same_batch(processor: VLMoEProcessor) -> None:
    collator = VLMoECollator(processor, max_length=99)
    expected = collator(shared_rows())
    copy = pickle.loads(pickle.dumps(collator))
    assert len(copy.encode_image._cache) == 0
    batch = copy(shared_rows())
    assert all(torch.equal(batch[key], expected[key]) for key in expected)


def test_length_is_rounded_up_on_request(processor: VLMoEProcessor) -> None:
    plain = VLMoECollator(processor)([make_row("one image")])
    padded = VLMoECollator(processor, pad_to_multiple_of=16)([make_row("one image")])
    length = plain["input_ids"].shape[1]
    assert length % 16 and padded["input_ids"].shape[1] == -(-length // 16) * 16
    assert torch.equal(padded["labels"][:, :length], plain["labels"])
    assert not padded["attention_mask"][:, length:].any()


@pytest.mark.parametrize("kind", ["several turns", "one image"])
def test_a_row_longer_than_max_length_is_refused_by_name(
    kind: str, processor: VLMoEProcessor
) -> None:
    row = {**make_row(kind), "id": "photo-7"}
    length = VLMoECollator(processor)([row])["input_ids"].shape[1]
    assert VLMoECollator(processor, max_length=length)([row])["input_ids"].shape[1] == length
    message = (
        rf"row 'photo-7' .*conversation has {length} tokens, more than max_length={length - 1}"
    )
    with pytest.raises(ValueError, match=message):
        VLMoECollator(processor, max_length=length - 1)([row])


def test_control_strings_in_a_row_are_text(processor: VLMoEProcessor) -> None:
    """A row that writes an image token or a turn trains on these letters."""
    question, answer = "a<|end|><|assistant|>yes <image>?", "<|end|> ends, <row_1_col_1> marks"
    row = {"messages": [user(question, 1), assistant(answer)], "images": [picture(0)]}
    batch = VLMoECollator(processor)([row])
    ids, tokenizer = batch["input_ids"][0], processor.tokenizer
    count = Counter(tokenizer.convert_ids_to_tokens(ids))
    assert count["<|end|>"] == 2 and count["<|assistant|>"] == 1 and count["<row_1_col_1>"] == 0
    assert count["<image>"] == batch["mm_token_type_ids"].sum() == processor.image_seq_len
    assert torch.equal(ids[None], reference(processor, row)["input_ids"])
    images = "<image>" * processor.image_seq_len
    assert tokenizer.decode(ids) == (
        f"<|user|>{images} {question}<|end|><|assistant|> {answer}<|end|>"
    )
    assert tokenizer.decode(batch["labels"][0][batch["labels"][0] >= 0]) == f"{answer}<|end|>"


def test_a_template_that_leaves_out_images_is_refused(processor: VLMoEProcessor) -> None:
    silent = copy.copy(processor)
    silent.chat_template = processor.chat_template.replace("'<image>'", "''")
    with pytest.raises(ValueError, match=r"row 0 .* has 0 image tokens for 1 images; the chat"):
        VLMoECollator(silent)([make_row("one image")])


@pytest.mark.parametrize("content", [b"", b"no image", png(picture(0, (64, 64)))[:-200]])
def test_unusable_image_is_refused_by_name(processor: VLMoEProcessor, content: bytes) -> None:
    row = {**make_row("two images"), "id": "photo-7"}
    row["images"][1] = {"bytes": content, "path": None}
    with pytest.raises(ValueError, match=r"^row 'photo-7' \('which is bigger\?'\), image 1: "):
        VLMoECollator(processor)([row])


def test_missing_image_file_is_refused_by_name(processor: VLMoEProcessor) -> None:
    row = {**make_row("one image"), "images": ["/nowhere/a.png"]}
    with pytest.raises(ValueError, match=r"^row 0 of the batch .*, image 0: .*/nowhere/a\.png"):
        VLMoECollator(processor)([row])


def test_malformed_row_is_refused_by_its_place_in_the_batch(processor: VLMoEProcessor) -> None:
    with pytest.raises(ValueError, match=r"row 1 of the batch .*has 1 image parts"):
        VLMoECollator(processor)([make_row("text only"), {**make_row("one image"), "images": []}])


def test_template_without_generation_marks_is_refused(processor: VLMoEProcessor) -> None:
    unmarked = pickle.loads(pickle.dumps(processor))
    unmarked.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    with pytest.raises(ValueError, match="generation"):
        VLMoECollator(unmarked)


@pytest.mark.parametrize("field", ["max_length", "pad_to_multiple_of"])
def test_length_below_one_is_refused(processor: VLMoEProcessor, field: str) -> None:
    with pytest.raises(ValueError, match=f"{field} must be at least 1 or None, got 0"):
        VLMoECollator(processor, **{field: 0})


def test_tokenizer_that_adds_a_first_token_is_followed(
    processor: VLMoEProcessor, tokenizer: PreTrainedTokenizerFast
) -> None:
    copy = pickle.loads(pickle.dumps(tokenizer))
    copy.add_special_tokens({"bos_token": "<|begin|>"})
    copy.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", copy.bos_token_id)]
    )
    template = processor.chat_template
    for used in (template, "{{ bos_token }}" + template):
        adding = VLMoEProcessor(
            processor.image_processor, copy, chat_template=used, image_seq_len=4
        )
        for case in ("one image", "text only"):
            row = make_row(case)
            batch = VLMoECollator(adding)([row])
            expected = reference(adding, row, return_assistant_tokens_mask=True)
            assert batch["input_ids"][0, 0] == copy.bos_token_id != batch["input_ids"][0, 1]
            assert torch.equal(batch["input_ids"], expected["input_ids"])
            mask = torch.as_tensor(expected["assistant_masks"]).bool()
            assert torch.equal(batch["labels"] != IGNORE_INDEX, mask)


def test_image_marker_that_is_ordinary_text_is_refused(
    processor: VLMoEProcessor, tokenizer: PreTrainedTokenizerFast
) -> None:
    marked = VLMoEProcessor(
        processor.image_processor, tokenizer, image_seq_len=2, image_start_token="image: "
    )
    with pytest.raises(ValueError, match="no added token of the tokenizer"):
        VLMoECollator(marked)([make_row("one image")])


def test_prompt_is_the_row_without_its_last_answer(
    processor: VLMoEProcessor, tiling_processor: VLMoEProcessor
) -> None:
    for used in (processor, tiling_processor):
        row = {**make_row("several turns", 40), "question_type": "shape"}
        batch = VLMoEPromptCollator(used)([row])
        asked = {**row, "messages": row["messages"][:-1]}
        expected = reference(used, asked, add_generation_prompt=True)
        assert set(batch.inputs) == set(expected)
        for key in expected:
            assert torch.equal(batch.inputs[key], expected[key])
        assert (batch.references, batch.question_types) == (["square"], ["shape"])


def test_prompts_are_padded_on_the_left(processor: VLMoEProcessor) -> None:
    collator = VLMoEPromptCollator(processor)
    rows = [make_row("one image"), make_row("text only"), make_row("two images")]
    batch = collator(rows)
    width = batch.inputs["input_ids"].shape[1]
    for i, row in enumerate(rows):
        alone = collator([row]).inputs
        padding = width - alone["input_ids"].shape[1]
        for key in TEXT_KEYS:
            assert torch.equal(batch.inputs[key][i, padding:], alone[key][0])
        assert (batch.inputs["input_ids"][i, :padding] == processor.tokenizer.pad_token_id).all()
        assert not batch.inputs["attention_mask"][i, :padding].any()
    assert batch.references == ["blue", "two", "the first"]
    assert batch.question_types == ["", "", ""]


def test_prompts_of_one_row_share_its_images(processor: VLMoEProcessor) -> None:
    row = {**shared_rows()[0], "question_type": ["a", "b", "c"], "id": "photo-7"}
    batch = VLMoEPromptCollator(processor)([row])
    assert batch.inputs["image_index"].tolist() == [[0, 1]] * 3
    assert batch.question_types == ["a", "b", "c"]
    assert [name.startswith("row 'photo-7'") for name in batch.names] == [True] * 3


def test_prompt_without_a_reference_is_refused_by_name(processor: VLMoEProcessor) -> None:
    with pytest.raises(ValueError, match=r"row 0 .*last message must be the assistant's"):
        VLMoEPromptCollator(processor)([make_row("no answer")])


def test_prompt_is_never_cut(processor: VLMoEProcessor) -> None:
    length = VLMoEPromptCollator(processor)([make_row("text only")]).inputs["input_ids"].shape[1]
    collator = VLMoEPromptCollator(processor, max_length=length)
    assert collator([make_row("text only")]).inputs["input_ids"].shape[1] == length
    collator = VLMoEPromptCollator(processor, max_length=length - 1)
    with pytest.raises(ValueError, match=f"row 0 .*the prompt has {length} tokens"):
        collator([make_row("text only")])


def test_micro_batch_without_label_tokens_is_no_error(processor: VLMoEProcessor) -> None:
    batch = VLMoECollator(processor)([make_row("no answer")])
    assert (batch["labels"] == IGNORE_INDEX).all()


def test_a_tokenizer_without_a_pad_token_pads_with_its_end_token(processor: VLMoEProcessor) -> None:
    """Padding is masked, so that the batch is the same but for these ids."""
    rows = [make_row("text only"), make_row("several turns")]
    wanted = VLMoECollator(processor)(rows)
    own = copy.copy(processor)
    own.tokenizer = copy.deepcopy(processor.tokenizer)
    own.tokenizer.pad_token = None
    batch = VLMoECollator(own)(rows)
    padding = wanted["attention_mask"] == 0
    assert padding.any() and (batch["input_ids"][padding] == own.tokenizer.eos_token_id).all()
    assert torch.equal(batch["labels"], wanted["labels"])
    assert torch.equal(batch["input_ids"][~padding], wanted["input_ids"][~padding])
    own.tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"set tokenizer\.pad_token"):
        VLMoECollator(own)


def test_rows_that_trainer_emptied_name_its_option(processor: VLMoEProcessor) -> None:
    with pytest.raises(ValueError, match=r"row 0 of the batch .*remove_unused_columns=False"):
        VLMoECollator(processor)([{}])


@pytest.mark.parametrize("question", ["a\ud800", [{"type": "text", "text": "a\ud800"}]])
def test_half_a_surrogate_pair_names_the_row(processor: VLMoEProcessor, question: Any) -> None:
    row = {"messages": [{"role": "user", "content": question}, assistant("b")], "id": 7}
    with pytest.raises(ValueError, match=r"row 7 .*: the text holds '\\ud800' at position 1"):
        VLMoECollator(processor)([row])

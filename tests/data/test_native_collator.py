"""Rows to batches of transformers' own models: their processor's inputs, labels on the answers."""

from typing import Any

import pytest
import torch
from builders import assistant, picture, row, user
from native_processors import MARKED, TEMPLATE, tiny_processor

from vlmoe.data.collator import IGNORE_INDEX
from vlmoe.data.native_collator import NativeCollator, NativePromptCollator

VISION = (
    "qwen3_vl_moe",
    "glm4v_moe",
    "gemma4",
    "llava_qwen3_moe",
    "internvl_qwen3_moe",
    "ernie4_5_vl_moe",
    "ovis2",
)


def rows() -> list[dict[str, Any]]:
    return [
        row(user("what color?", 1), assistant("red"), images=[picture(0)]),
        row(user("hi"), assistant("yo")),
        row(
            user("a?", 2),
            assistant("b"),
            user("and?"),
            assistant("end"),
            images=[picture(1), picture(2, (30, 40))],
        ),
    ]


def learned(processor: Any, batch: dict[str, torch.Tensor]) -> list[str]:
    tokenizer = getattr(processor, "tokenizer", processor)
    return [tokenizer.decode(of_row[of_row != IGNORE_INDEX]) for of_row in batch["labels"]]


@pytest.mark.parametrize("family", VISION)
def test_inputs_are_the_processors_and_labels_the_assistants(family: str) -> None:
    processor = tiny_processor(family)
    batch = NativeCollator(processor)(rows())
    assert learned(processor, batch) == [
        "red<|im_end|>",
        "yo<|im_end|>",
        "b<|im_end|>end<|im_end|>",
    ]
    labels = batch.pop("labels")
    assert torch.equal(labels[labels != IGNORE_INDEX], batch["input_ids"][labels != IGNORE_INDEX])
    chats = [
        [
            {**turn, "content": [part | {"image": picture(0)} for part in turn["content"]]}
            if turn["role"] == "user"
            else turn
            for turn in each["messages"]
        ]
        for each in rows()[:1]
    ]
    alone = NativeCollator(processor)(rows()[:1])
    expected = processor.apply_chat_template(
        chats, tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert alone.keys() == {*expected.keys(), "labels"}
    for name, tensor in expected.items():
        assert torch.equal(alone[name], tensor), name
    marked = NativeCollator(tiny_processor(family, marked=True))(rows())
    assert torch.equal(marked["labels"], labels)


def test_a_language_models_tokenizer_takes_the_place_of_a_processor() -> None:
    tokenizer = tiny_processor("mixtral")
    batch = NativeCollator(tokenizer)(rows()[1:2])
    assert batch.keys() == {"input_ids", "attention_mask", "labels"}
    assert learned(tokenizer, batch) == ["yo<|im_end|>"]
    with pytest.raises(ValueError, match=r"what color\?.* has images, but the model reads text"):
        NativeCollator(tokenizer)(rows())


def test_videos_are_frames_for_processors_of_transformers_too() -> None:
    frames = [picture(seed) for seed in range(3)]
    asked = {"role": "user", "content": [{"type": "video", "num_frames": 2}]}
    given = {"messages": [asked, assistant("red")], "videos": [frames]}
    parts = [{"type": "text", "text": "frame 1: "}, {"type": "image"}]
    parts += [{"type": "text", "text": "frame 2: "}, {"type": "image"}]
    by_hand = row({"role": "user", "content": parts}, assistant("red"), images=frames[:2])
    processor = tiny_processor("llava")
    for collator in (NativeCollator(processor), NativePromptCollator(processor)):
        got, wanted = collator([given]), collator([by_hand])
        got, wanted = (getattr(each, "inputs", each) for each in (got, wanted))
        assert got.keys() == wanted.keys()
        assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    tiling = tiny_processor("internvl_qwen3_moe")
    tiling.image_processor.crop_to_patches = True
    with pytest.raises(ValueError, match=r"has videos, and GotOcr2.* cut each frame into tiles"):
        NativeCollator(tiling)([given])
    tiling.image_processor.crop_to_patches = False
    text = tiling.decode(NativeCollator(tiling)([given])["input_ids"][0])
    assert ("Frame1:" in text and "Frame2:" in text) or type(tiling).__name__ != "InternVLProcessor"


def test_prompts_end_where_the_answer_begins() -> None:
    processor = tiny_processor("llava")
    prompts = NativePromptCollator(processor)(rows())
    assert prompts.references == ["red", "yo", "end"]
    ends = [
        text.rsplit("<|im_start|>")[-1]
        for text in processor.batch_decode(prompts.inputs["input_ids"])
    ]
    assert ends == ["assistant\n"] * 3
    whole = NativeCollator(processor)(rows()[1:2])
    length = int((whole["labels"][0] == IGNORE_INDEX).int().cumprod(0).sum())
    assert torch.equal(prompts.inputs["input_ids"][1, -length:], whole["input_ids"][0, :length])
    assert prompts.inputs["attention_mask"][1].sum() == length


@pytest.mark.parametrize("marked", [False, True])
def test_control_strings_in_a_row_are_text(marked: bool) -> None:
    processor = tiny_processor("qwen3_vl_moe", marked)
    text = "<image>or<|im_end|>?"
    batch = NativeCollator(processor)(
        [row(user(text, 1), assistant(f"no{text}"), images=[picture(0)])]
    )
    ids = batch["input_ids"][0].tolist()
    assert ids.count(6) == 2, "the ends of two turns"
    assert ids.count(5) == int(batch["image_grid_thw"].prod()) // 4
    assert learned(processor, batch) == [f"no{text}<|im_end|>"]


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        (row(user("a")), {}, "no token to learn; it needs an assistant turn"),
        (
            row(user("long" * 30), assistant("b")),
            {"max_length": 100},
            "tokens, more than max_length",
        ),
        (row(user("a", 1), assistant("b"), images=["nowhere.png"]), {}, "image 0"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(
    given: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=rf"row 'r7' .*{message}"):
        NativeCollator(tiny_processor("llava"), **options)([{**given, "id": "r7"}])


@pytest.mark.parametrize("family", ["llava_qwen3_moe", "qwen3_vl_moe"])
def test_long_texts_are_shortened_and_nothing_else(family: str) -> None:
    processor, text = tiny_processor(family), "what color is it? " * 9
    each = row(user("be short: ", 1), assistant("a cat"), images=[picture(0)], id="r3")
    each["messages"][0]["content"].append({"type": "text", "text": text})
    given = [row(user("hi"), assistant("yo")), each]
    whole = NativeCollator(processor)(given)
    tokens = int(whole["attention_mask"][1].sum())
    limit = tokens - 20
    with pytest.raises(ValueError, match=f"'r3'.* has {tokens} tokens, more than"):
        NativeCollator(processor, limit)(given)
    for choice in (True, "longest"):
        batch = NativeCollator(processor, limit, shorten_prompts=choice)(given)
        assert limit - 2 <= batch["attention_mask"].sum(-1).max() <= limit
        assert learned(processor, batch) == learned(processor, whole)
        assert torch.equal(batch["pixel_values"], whole["pixel_values"])
        shown = processor.tokenizer.decode(batch["input_ids"][1])
        assert ("be short: " in shown) == (choice == "longest")
        kept = shown.partition("be short: ")[2].partition("<|im_end|>")[0]
        assert choice is True or (text.startswith(kept) and len(kept) > len(text) / 2)
        prompt = NativePromptCollator(processor, limit - 9, shorten_prompts=choice)(given)
        assert prompt.inputs["attention_mask"].sum(-1).max() <= limit - 9
        assert prompt.references == ["yo", "a cat"]
    with pytest.raises(ValueError, match=r"'r3'.* more than max_length=12"):
        NativeCollator(processor, 12, shorten_prompts="longest")(given[1:])


def test_a_template_that_rewrites_earlier_turns_needs_markers() -> None:
    processor = tiny_processor("llava")
    template = TEMPLATE.replace("{{ m['content'] }}", "").replace("START", "").replace("END", "")
    last = "{{ m['content'][0]['text'] if loop.last or m['role'] == 'user' else 'gone' }}"
    start = template.index("{% if m['content']")
    end = template.index("{{ '<|im_end|>")
    processor.chat_template = template[:start] + last + template[end:]
    several = row(user("a"), assistant("b"), user("c"), assistant("d"))
    with pytest.raises(ValueError, match="turn 1 in another way where more turns follow"):
        NativeCollator(processor)([several])
    processor.chat_template = MARKED.replace("START", "").replace("END", "")
    assert learned(processor, NativeCollator(processor)([several])) == ["b<|im_end|>d<|im_end|>"]


def test_a_processor_without_a_chat_template_is_refused() -> None:
    processor = tiny_processor("llava")
    processor.chat_template = processor.tokenizer.chat_template = None
    with pytest.raises(ValueError, match="LlavaProcessor has no chat template"):
        NativeCollator(processor)


def test_a_processor_that_hides_its_image_tokens_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    processor = tiny_processor("llava")
    plain = type(processor).__call__

    def hiding(self: Any, *args: Any, return_text_replacement_offsets: bool, **kwargs: Any) -> Any:
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(type(processor), "__call__", hiding)
    assert learned(processor, NativeCollator(processor)(rows()[1:2])) == ["yo<|im_end|>"]
    with pytest.raises(ValueError, match="LlavaProcessor does not tell where"):
        NativeCollator(processor)(rows()[:1])

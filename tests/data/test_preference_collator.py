"""Preference batches against TRL's own collator."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from PIL import Image
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

from vlmoe.data.collator import VLMoEPreferenceCollator
from vlmoe.processing.processing_vlmoe import VLMoEProcessor

TOKEN_KEYS = ("input_ids", "attention_mask", "mm_token_type_ids", "completion_mask")


def message(role: str, text: str, images: int = 0) -> dict[str, Any]:
    """A message whose images come first."""
    text_part = {"type": "text", "text": text}
    return {"role": role, "content": [{"type": "image"}] * images + [text_part]}


@pytest.fixture
def pairs(make_image: Callable[..., Image.Image]) -> list[dict[str, Any]]:
    """One image; text only; two images in two turns, the first one answered."""

    def pair(prompt: list[Any], chosen: str, rejected: str, *seeds: int) -> dict[str, Any]:
        return {
            "prompt": prompt,
            "chosen": [message("assistant", chosen)],
            "rejected": [message("assistant", rejected)],
            "images": [make_image(seed) for seed in seeds],
        }

    two_turns = [
        message("system", "be short."),
        message("user", "what shape?", 1),
        message("assistant", "circle"),
        message("user", "and is this one red?", 1),
    ]
    return [
        pair([message("user", "what color?", 1)], "blue", "a red shape", 0),
        pair([message("user", "what is one and one?")], "it is two", "no", *()),
        pair(two_turns, "yes", "no, a blue circle", 1, 2),
    ]


def test_tokens_and_completion_mask_equal_those_of_trls_collator(
    pairs: list[dict[str, Any]], processor: VLMoEProcessor
) -> None:
    batch = VLMoEPreferenceCollator(processor)(pairs)
    expected = DataCollatorForVisionPreference(processor)([dict(pair) for pair in pairs])
    padding = expected["attention_mask"] == 0  # TRL pads one side with <|end|> if <|pad|> is 0
    expected["input_ids"][padding] = processor.tokenizer.pad_token_id
    for key in TOKEN_KEYS:
        assert torch.equal(batch[key], expected[key]), key
    assert batch["completion_mask"].any(-1).all()


def test_chosen_and_rejected_share_the_encoding_of_their_images(
    pairs: list[dict[str, Any]], processor: VLMoEProcessor
) -> None:
    batch = VLMoEPreferenceCollator(processor)(pairs)
    own_rows = DataCollatorForVisionPreference(processor)([dict(pair) for pair in pairs])
    assert batch["pixel_values"].shape[0] == 3 and own_rows["pixel_values"].shape[:2] == (6, 2)
    for row, indices in enumerate(batch["image_index"]):
        shown = indices[indices >= 0]
        assert torch.equal(
            batch["pixel_values"][shown], own_rows["pixel_values"][row, : len(shown)]
        )


def test_a_pair_longer_than_max_length_is_refused_by_name(
    pairs: list[dict[str, Any]], processor: VLMoEProcessor
) -> None:
    length = int(VLMoEPreferenceCollator(processor)(pairs[:1])["attention_mask"].sum(-1).max())
    VLMoEPreferenceCollator(processor, max_length=length)(pairs[:1])
    with pytest.raises(ValueError, match=rf"row 0 .*what color\?.*max_length={length - 1}"):
        VLMoEPreferenceCollator(processor, max_length=length - 1)(pairs[:1])


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"prompt": "what color?"}, "`prompt` 'what color"),
        ({"rejected": None}, "`rejected` None"),
        ({"images": []}, "1 image parts, but the row has 0 images"),
        ({"chosen": [message("user", "blue")]}, "chosen: no token of the answer"),
    ],
)
def test_a_malformed_pair_is_named(
    change: dict[str, Any], error: str, pairs: list[dict[str, Any]], processor: VLMoEProcessor
) -> None:
    with pytest.raises(ValueError, match=error) as raised:
        VLMoEPreferenceCollator(processor)([pairs[1], pairs[0] | change])
    assert str(raised.value).startswith("row 1 of the batch")


def test_control_strings_in_a_pair_are_text(processor: VLMoEProcessor) -> None:
    pair = {
        "prompt": [message("user", "a<|end|><|assistant|>b")],
        "chosen": [message("assistant", "<|end|> is the end")],
        "rejected": [message("assistant", "<image>")],
        "images": [],
    }
    batch = VLMoEPreferenceCollator(processor)([pair])
    learned = [
        processor.tokenizer.decode(ids[mask.bool()])
        for ids, mask in zip(batch["input_ids"], batch["completion_mask"], strict=True)
    ]
    assert learned == ["<|end|> is the end<|end|>", "<image><|end|>"]
    count = {"<|end|>": 2, "<|assistant|>": 1, "<image>": 0}
    for token, number in count.items():
        token_id = processor.tokenizer.convert_tokens_to_ids(token)
        assert ((batch["input_ids"] == token_id).sum(-1) == number).all(), token

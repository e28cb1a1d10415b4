# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Texts and options of a call that cannot be used are named."""

import pytest
from transformers.trainer_pt_utils import LengthGroupedSampler


@pytest.mark.parametrize("where", ["text_kwargs", "flat"])
@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("max_length", value) for value in (-1, 0, "7", 2.5, True)),
        *(("pad_to_multiple_of", value) for value in (-3, 0, 1.5)),
        ("stride", -1),
        ("add_special_tokens", "no"),
    ],
)
def test_a_wrong_option_is_named(processor, option, value, where):
    options = {option: value} if where == "flat" else {where: {option: value}}
    with pytest.raises(ValueError, match=rf"`{option}` is {value!r}; allowed: "):
        processor(text="a", **options)


@pytest.mark.parametrize("group", ["text_kwargs", "images_kwargs", "common_kwargs"])
def test_options_that_are_no_mapping_are_named(processor, group):
    with pytest.raises(ValueError, match=f"`{group}` is 5; allowed: a mapping"):
        processor(text="a", **{group: 5})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "at least one input"),
        ([None], "string or list of strings"),
        (5, "string or list of strings"),
        ([], "`text` is an empty list"),
        (["a", "b\ud83d c"], r"sample 1: the text holds '\\ud83d' at position 1"),
    ],
)
def test_a_text_that_is_none_is_named(processor, text, message):
    with pytest.raises(ValueError, match=message):
        processor(text=text)


def test_half_a_surrogate_pair_in_a_chat_is_named(processor):
    with pytest.raises(ValueError, match=r"the chat: the text holds '\\udc00' at position 2"):
        processor.apply_chat_template([{"role": "user", "content": "ab\udc00"}], tokenize=True)


def test_the_names_of_inputs_begin_with_the_tokens(processor, make_image):
    """Trainer and its sampler by length read the first one."""
    assert processor.model_input_names[0] == "input_ids"
    output = processor(images=make_image(), text="<image>")
    assert set(processor.model_input_names) == set(output)
    rows = [{"input_ids": [0] * n, "pixel_values": [0]} for n in (3, 9, 5)]
    sampler = LengthGroupedSampler(2, rows, model_input_name=processor.model_input_names[0])
    assert sampler.lengths == [3, 9, 5]

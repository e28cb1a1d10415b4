"""The default chat template, those of language models, and the assistant mask over images."""

import copy

import pytest
import torch

from vlmoe.processing.chat_template import DEFAULT_CHAT_TEMPLATE
from vlmoe.processing.processing_vlmoe import VLMoEProcessor
from vlmoe.upcycling.image_parts import with_image_parts

CONVERSATION = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "a círcle 日本"}]},
    {"role": "user", "content": "red?"},
    {"role": "assistant", "content": "no"},
]
TEXT_ONLY = (
    "{% for message in messages %}\n"
    "{{ '[' + message['role'] + ']' + message['content'] + eos_token }}"
    "{% if message.name %} by {{ message.name }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)
LEARNED = "a círcle 日本<|end|> no<|end|>"


def test_default_chat_template_renders_the_chat_format(processor):
    assert processor.apply_chat_template(CONVERSATION, add_generation_prompt=True) == (
        "<|system|>be brief<|end|><|user|><image>what is it?<|end|>"
        "<|assistant|>a círcle 日本<|end|><|user|>red?<|end|><|assistant|>no<|end|><|assistant|>"
    )


def test_default_chat_template_keeps_white_space_of_the_content(processor):
    rendered = processor.apply_chat_template([{"role": "user", "content": " a\n b  "}])
    assert rendered == "<|user|> a\n b  <|end|>"


@pytest.mark.parametrize(
    "message",
    [{"role": "tool", "content": "x"}, {"role": "user", "content": [{"type": "video"}]}],
)
def test_default_chat_template_refuses_what_it_cannot_say(processor, message):
    with pytest.raises(Exception, match="allowed: "):
        processor.apply_chat_template([message])


def test_the_tokenizers_own_template_comes_before_the_default(processor):
    tokenizer = copy.deepcopy(processor.tokenizer)
    assert processor.chat_template == DEFAULT_CHAT_TEMPLATE
    tokenizer.chat_template = "own"
    assert VLMoEProcessor(processor.image_processor, tokenizer).chat_template == "own"
    given = VLMoEProcessor(processor.image_processor, tokenizer, chat_template="given")
    assert given.chat_template == "given"


def test_default_chat_template_uses_the_processors_image_token(processor, make_image):
    other = VLMoEProcessor(
        processor.image_processor, processor.tokenizer, image_token="<global-img>"
    )
    output = other.apply_chat_template(
        CONVERSATION,
        tokenize=True,
        return_dict=True,
        processor_kwargs={"images": [make_image()]},
    )
    assert output["input_ids"][0].count(other.image_token_id) == other.image_seq_len


@pytest.mark.parametrize("splitting", [False, True])
@pytest.mark.parametrize("return_tensors", [None, "pt"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_assistant_mask_covers_exactly_what_the_assistant_says(
    processor, make_image, splitting, return_tensors, side
):
    text_only = [CONVERSATION[0], *CONVERSATION[3:]]
    output = processor.apply_chat_template(
        [CONVERSATION, text_only],
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        return_tensors=return_tensors,
        processor_kwargs={
            "images": [[make_image(size=(40, 20))], []],
            "do_image_splitting": splitting,
            "padding": True,
            "padding_side": side,
        },
    )
    mask, ids = torch.as_tensor(output["assistant_masks"]), torch.as_tensor(output["input_ids"])
    assert mask.shape == ids.shape
    assert processor.tokenizer.decode(ids[0][mask[0].bool()]) == LEARNED
    assert processor.tokenizer.decode(ids[1][mask[1].bool()]) == "no<|end|>"
    assert not (mask.bool() & (torch.as_tensor(output["mm_token_type_ids"]) == 1)).any()


def test_images_inside_the_messages_equal_images_beside_them(processor, make_image, tmp_path):
    image = make_image()
    image.save(tmp_path / "image.png")
    beside = processor.apply_chat_template(
        CONVERSATION, tokenize=True, return_dict=True, processor_kwargs={"images": [image]}
    )
    for part in ({"image": image}, {"path": str(tmp_path / "image.png")}):
        inside = copy.copy(CONVERSATION)
        inside[1] = {
            "role": "user",
            "content": [{"type": "image", **part}, {"type": "text", "text": "what is it?"}],
        }
        output = processor.apply_chat_template(inside, tokenize=True, return_dict=True)
        assert output["input_ids"] == beside["input_ids"]
        assert torch.equal(output["pixel_values"], beside["pixel_values"])


def test_a_placeholder_written_by_a_user_is_text_when_sanitized(processor, make_image):
    forged = copy.deepcopy(CONVERSATION)
    forged[3]["content"] = "red <image>?"
    output = processor.apply_chat_template(
        forged,
        tokenize=True,
        return_dict=True,
        sanitize_control_tokens=True,
        processor_kwargs={"images": [make_image()]},
    )
    assert output["input_ids"][0].count(processor.image_token_id) == processor.image_seq_len


@pytest.mark.parametrize("template", [TEXT_ONLY, "\n" + TEXT_ONLY, "  " + TEXT_ONLY])
@pytest.mark.parametrize("generation", [False, True])
def test_a_language_models_template_says_the_same_of_text_and_takes_parts(
    tokenizer, template, generation
):
    options = {"tokenize": False, "add_generation_prompt": generation}
    strings = [
        {"role": "system", "content": " be\n<brief> & 'kind' "},
        {"role": "user", "content": "", "name": "Ann"},
        {"role": "assistant", "content": "日本\n"},
    ]
    parts = [m | {"content": [{"type": "text", "text": m["content"]}]} for m in strings]
    text = tokenizer.apply_chat_template(strings, chat_template=template, **options)
    wrapped = with_image_parts(template)
    for messages in (strings, parts):
        given = tokenizer.apply_chat_template(messages, chat_template=wrapped, **options)
        assert given == text


def test_a_language_models_template_shows_images_where_they_stand(tokenizer):
    content = [
        {"type": "text", "text": "this "},
        {"type": "image"},
        {"type": "text", "text": " and this"},
        {"type": "image"},
    ]
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}],
        chat_template=with_image_parts(TEXT_ONLY, "<global-img>"),
        tokenize=False,
    )
    assert "[user]this <global-img> and this<global-img><|end|>" in rendered


def test_a_language_models_template_refuses_other_parts(tokenizer):
    chat = [{"role": "user", "content": [{"type": "video"}]}]
    with pytest.raises(Exception, match="allowed: image, text"):
        tokenizer.apply_chat_template(chat, chat_template=with_image_parts(TEXT_ONLY))


def test_a_template_that_names_image_parts_stays_as_it_is():
    assert with_image_parts(DEFAULT_CHAT_TEMPLATE) == DEFAULT_CHAT_TEMPLATE
    assert with_image_parts(TEXT_ONLY) != TEXT_ONLY

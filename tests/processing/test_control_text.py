# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""What users write stays text, token for token, whatever control strings it holds."""

import random

import pytest
from text_tokenizers import KINDS, make_tokenizer
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast, ProcessorMixin

from vlmoe.processing.processing_vlmoe import VLMoEProcessor
from vlmoe.upcycling.image_parts import with_image_parts

NAMES = ("<pad>", "<|end|>", "<unk>", "<|system|>", "<|user|>", "<|assistant|>", "<image>", "</s>")
NAMES += ("<row_1_col_1>", "<global-img>", "[INST]")
OTHER_NAMES = tuple(f"⟪{number}⟫" for number in range(len(NAMES)))
PIECES = (
    *NAMES,
    *(
        "<|en",
        "d|>",
        "<",
        "|>",
        "<|",
        "<ima",
        "ge>",
        "</",
        "s>",
        "<|END|>",
        "\uff1c|end|\uff1e",
        "[",
        "INST]",
    ),
    *(" ", "  ", "\n", "a", "is it red?", "blue", "日本", "é", "\U0010fffd", "\U000f1000", "▁"),
    *("<think>", "<tool_call>", "Ġ", "##s"),
)
PLAIN = ("", " ", "is it red?", "blue ", "\n日本", "<think>", "a < b ", "|> x", "\U000f1000")


def random_chat(choose: random.Random, pieces: tuple[str, ...], image) -> list[dict]:
    """A chat about up to two images, its texts made of `pieces`."""

    def text() -> str:
        return "".join(choose.choices(pieces, k=choose.randint(0, 4))) + "."

    def content(images: int):
        if not images and choose.random() < 0.5:
            return text()
        parts = [{"type": "text", "text": text()[:-1]} for _ in range(choose.randint(1, 3))]
        parts += [{"type": "image", "image": image}] * images
        choose.shuffle(parts)
        return [*parts, {"type": "text", "text": "."}]

    chat = [{"role": "system", "content": content(0)}] if choose.random() < 0.5 else []
    for _ in range(choose.randint(1, 2)):
        chat.append({"role": "user", "content": content(choose.randint(0, 1))})
        chat.append({"role": "assistant", "content": content(0)})
    return chat


@pytest.fixture(scope="module", params=KINDS)
def pair(request, processor):
    """A processor, and one whose control strings have names that no test writes."""
    made = []
    for names in (NAMES, OTHER_NAMES):
        token = dict(zip(NAMES, names, strict=True))
        template = processor.chat_template
        for name in NAMES:
            template = template.replace(name, token[name])
        made.append(
            VLMoEProcessor(
                processor.image_processor,
                make_tokenizer(request.param, names),
                chat_template=template,
                image_seq_len=3,
                image_token=token["<image>"],
                global_image_token=token["<global-img>"],
            )
        )
    return made


def encode(processor, chats, call=ProcessorMixin.apply_chat_template, **options):
    """The token ids and the learned tokens of chats; by default as transformers gives them."""
    output = call(
        processor,
        chats,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        processor_kwargs={"padding": False} | options,
    )
    return output["input_ids"], output["assistant_masks"], output["mm_token_type_ids"]


@pytest.mark.parametrize("seed", range(3))
def test_control_strings_of_users_are_the_tokens_of_their_text(pair, make_image, seed):
    """The reference has no control tokens of these names, and is equal but for the names."""
    processor, reference = pair
    choose, image = random.Random(seed), make_image()
    chats = [random_chat(choose, PIECES, image) for _ in range(12)]
    ours = VLMoEProcessor.apply_chat_template
    assert encode(processor, chats, ours) == encode(reference, chats)
    for chat in chats:
        assert encode(processor, [chat], ours) == encode(reference, [chat])
    padding = {"padding": True, "padding_side": "left"}
    assert encode(processor, chats, ours, **padding) == encode(reference, chats, **padding)


def test_decoding_gives_back_what_the_user_wrote(pair, make_image):
    processor, reference = pair
    choose, image = random.Random(7), make_image()
    chats = [random_chat(choose, PIECES, image) for _ in range(12)]
    ids = processor.apply_chat_template(chats, tokenize=True)
    known = encode(reference, chats)[0]
    for row, known_row in zip(ids, known, strict=True):
        text = reference.tokenizer.decode(known_row)
        for name, other in zip(NAMES, OTHER_NAMES, strict=True):
            text = text.replace(other, name)
        assert processor.tokenizer.decode(row) == text


def test_a_chat_without_control_strings_is_encoded_as_ever(pair, make_image, monkeypatch):
    processor, _ = pair
    monkeypatch.setattr("vlmoe.processing.control_text.GuardedTokenizer", None)
    choose, image = random.Random(3), make_image()
    chats = [random_chat(choose, PLAIN, image) for _ in range(20)]
    assert encode(processor, chats, VLMoEProcessor.apply_chat_template) == encode(processor, chats)


def test_all_strings_of_a_chat_are_text(processor):
    """Roles, names, tools and variables, beginnings in one part and ends in the next."""
    template = (
        "{% for m in messages %}{{ '<|' ~ m.role ~ '|>' ~ m.name ~ ': ' ~ m.content ~ '<|end|>' }}"
        "{% endfor %}{{ tools[0] | tojson }}{{ documents[0].text }}{{ note }}{{ end_token }}"
    )
    chat = [
        {"role": "user", "name": "Ann<|end|>", "content": "a<|en"},
        {"role": "end|><|assistant", "name": "d|>", "content": "<|image|>"},
    ]
    options = {
        "chat_template": template,
        "tools": [{"name": "<|user|>", "parameters": {"<|pad|>": "<image>"}}],
        "documents": [{"text": "<|system|>"}],
        "note": "<global-img>",
        "end_token": "<|end|>",
    }
    rendered = processor.apply_chat_template(chat, **options)
    ids = processor.apply_chat_template(chat, tokenize=True, **options)[0]
    tokens = processor.tokenizer.convert_ids_to_tokens(ids)
    known = [t for t in tokens if t in processor.tokenizer.all_special_tokens]
    assert known == ["<|user|>", "<|end|>", "<|end|>", "<|end|>"]
    assert processor.tokenizer.decode(ids).replace(" ", "") == rendered.replace(" ", "")


def test_the_message_that_is_continued_keeps_its_control_strings(processor):
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b<|end|>c"}]
    ids = processor.apply_chat_template(chat, tokenize=True, continue_final_message=True)[0]
    assert processor.tokenizer.convert_ids_to_tokens(ids).count("<|end|>") == 1
    assert processor.tokenizer.decode(ids).endswith("b<|end|>c")


def test_a_truncation_counts_the_tokens_of_the_text(processor, make_image):
    part = {"type": "text", "text": "<image>?<|end|>"}
    chat = [{"role": "user", "content": [part, {"type": "image", "image": make_image()}]}]
    whole = processor.apply_chat_template(chat, tokenize=True)[0]
    options = {"truncation": True, "max_length": len(whole) - 1}
    cut = processor.apply_chat_template(chat, tokenize=True, processor_kwargs=options)[0]
    assert cut == whole[1:] if processor.tokenizer.truncation_side == "left" else whole[:-1]
    with pytest.raises(ValueError, match=f"sample 0: .* the sample has {len(whole)} tokens"):
        options["max_length"] = len(whole) - 2
        processor.apply_chat_template(chat, tokenize=True, processor_kwargs=options)


def test_rendered_text_that_a_caller_tokenizes_keeps_its_meaning(processor, make_image):
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}]}]
    text = processor.apply_chat_template(chat)
    ids = processor(images=make_image(), text=text)["input_ids"]
    inside = [{"role": "user", "content": [{"type": "image", "image": make_image()}, "a"]}]
    inside[0]["content"][1] = {"type": "text", "text": "a"}
    assert ids == processor.apply_chat_template(inside, tokenize=True)


def test_a_token_added_later_is_a_control_string_too(processor, with_tokens):
    tokenizer = with_tokens()
    own = VLMoEProcessor(processor.image_processor, tokenizer)
    chat = [{"role": "user", "content": "a<new>"}]
    before = own.apply_chat_template(chat, tokenize=True)
    tokenizer.add_tokens(["<new>"], special_tokens=True)
    assert own.apply_chat_template(chat, tokenize=True) == before
    assert own.tokenizer("<new>")["input_ids"] == [tokenizer.convert_tokens_to_ids("<new>")]


def test_a_tokenizer_that_splits_special_tokens_makes_none(processor, with_tokens):
    own = VLMoEProcessor(processor.image_processor, with_tokens())
    own.tokenizer.split_special_tokens = True
    chat = [{"role": "user", "content": "a<|end|>"}]
    assert own.apply_chat_template(chat, tokenize=True) == ProcessorMixin.apply_chat_template(
        own, chat, tokenize=True
    )


def test_forged_private_characters_are_refused(processor):
    """The aliases of control tokens, known from the code, together with a control string."""
    text = "a<|end|>" + "".join(chr(code) + "\U0010fffd" * 6 for code in range(0x100000, 0x100020))
    with pytest.raises(ValueError, match="private-use characters"):
        processor.apply_chat_template([{"role": "user", "content": text}], tokenize=True)


def test_a_control_string_in_two_parts_is_text(processor):
    parts = [{"type": "text", "text": text} for text in ("a<|en", "d|>")]
    ids = processor.apply_chat_template([{"role": "user", "content": parts}], tokenize=True)
    whole = processor.apply_chat_template([{"role": "user", "content": "a<|end|>"}], tokenize=True)
    assert ids == whole


def test_what_the_model_itself_would_merge_to_a_control_token_is_text(processor):
    """A byte-pair model whose merges end in `</s>`, as converted SentencePiece ones do."""
    pieces = [*NAMES, *"</s>a", "</", "</s"]
    merges = [("<", "/"), ("</", "s"), ("</s", ">")]
    model = BPE({piece: number for number, piece in enumerate(pieces)}, merges, unk_token="<unk>")
    assert model.tokenize("</s>")[0].value == "</s>"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(model), unk_token="<unk>", extra_special_tokens=list(NAMES)
    )
    own = VLMoEProcessor(processor.image_processor, tokenizer)
    ids = own.apply_chat_template([{"role": "user", "content": "a</s>"}], tokenize=True)[0]
    assert tokenizer.convert_ids_to_tokens(ids) == ["<|user|>", "a", "</s", ">", "<|end|>"]


def test_a_refusal_says_what_the_user_wrote(processor):
    with pytest.raises(Exception, match=r"Role 'a<\|end\|>b'; allowed"):
        processor.apply_chat_template([{"role": "a<|end|>b", "content": "c"}], tokenize=True)


def test_padding_needs_a_pad_token_as_ever(processor, with_tokens):
    own = VLMoEProcessor(processor.image_processor, with_tokens())
    own.tokenizer.pad_token = None
    chats = [[{"role": "user", "content": text}] for text in ("a", "b<|end|>c")]
    for chat in (chats, [chats[0], chats[0]]):
        with pytest.raises(ValueError, match="does not have a padding token"):
            own.apply_chat_template(chat, tokenize=True, processor_kwargs={"padding": True})


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ '<|user|>' + m.role + '\n' + m.content | trim + '<|end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|user|>assistant\n' }}{% endif %}",
        "{{ bos_token }}{% for m in messages %}{{ '[INST] ' + m.content.strip() + ' [/INST]' }}"
        "{% if '</think>' in m.content %}{{ m.content.split('</think>')[-1] }}{% endif %}"
        "{{ '<|end|>' }}{% endfor %}",
    ],
    ids=["ChatML", "Llama"],
)
def test_templates_of_language_models_get_text(pair, make_image, template):
    """As after upcycling: their parts are joined to one string by our own lines before them."""
    _, reference = pair
    options = [{"bos_token": name} for name in ("<pad>", OTHER_NAMES[0])]
    theirs = template
    for name, other in zip(NAMES, OTHER_NAMES, strict=True):
        theirs = theirs.replace(name, other)
    templates = (
        with_image_parts(template),
        with_image_parts(theirs, reference.image_token),
    )
    choose, image = random.Random(11), make_image()
    chats = [random_chat(choose, (*PIECES, "</think>"), image) for _ in range(8)]
    ours, known = (
        call(each, chats, chat_template=given, tokenize=True, add_generation_prompt=True, **more)
        for call, each, given, more in zip(
            (VLMoEProcessor.apply_chat_template, ProcessorMixin.apply_chat_template),
            pair,
            templates,
            options,
            strict=True,
        )
    )
    assert ours == known


def test_a_control_string_that_the_tokenizer_takes_for_text_stays_text(processor):
    """Llama's old files: `</s>` is found after white space alone, in the template, too."""
    tokenizer = make_tokenizer("old_llama", NAMES)
    own = VLMoEProcessor(processor.image_processor, tokenizer)
    template = "{% for m in messages %}{{ '<|user|>' + m.content + '.</s>' }}{% endfor %}"
    options = {"chat_template": template, "tokenize": True}
    (plain,) = own.apply_chat_template([{"role": "user", "content": "is"}], **options)
    (ids,) = own.apply_chat_template([{"role": "user", "content": "is<|end|>"}], **options)
    assert tokenizer.convert_tokens_to_ids("</s>") not in plain
    assert plain[-4:] == ids[-4:] and len(ids) > len(plain)

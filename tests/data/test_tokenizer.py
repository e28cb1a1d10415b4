"""The trained tokenizer encodes anything, keeps special tokens whole, and is reproducible."""

import pytest
from transformers import AutoTokenizer

from vlmoe.data.tokenizer import CHAT_TOKENS, tile_markers, train_tokenizer

TEXTS = ["the quick brown fox", "the quick red fox", "the slow brown dog"] * 4
STRINGS = ["", " ", "a  b\n\n\tc ", "日本語 🎉 ñ", "\x00\x7f￿", "<row_9_col_9> <|nobody|>"]


@pytest.mark.parametrize("text", STRINGS)
def test_any_string_is_decoded_without_loss_but_for_a_leading_space(text):
    tokenizer = train_tokenizer(TEXTS, vocab_size=300)
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text.removeprefix(" ")
    assert tokenizer.unk_token is None and None not in ids


def test_a_word_is_one_token_wherever_it_stands():
    tokenizer = train_tokenizer(TEXTS, vocab_size=400)
    alone, after_a_marker = tokenizer.tokenize("fox"), tokenizer.tokenize("<|assistant|>fox<|end|>")
    assert alone == tokenizer.tokenize("the fox")[1:] == after_a_marker[1:2]


def test_frequent_words_become_one_token():
    tokenizer = train_tokenizer(TEXTS, vocab_size=400)
    assert len(tokenizer(" quick brown")["input_ids"]) == 2


def test_special_tokens_come_first_and_stay_whole():
    tokenizer = train_tokenizer(TEXTS, vocab_size=300)
    wanted = [*CHAT_TOKENS, *tile_markers()]
    assert tokenizer.convert_ids_to_tokens(range(len(wanted))) == wanted
    assert tokenizer("".join(wanted))["input_ids"] == list(range(len(wanted)))
    assert tokenizer.decode(range(len(wanted)), skip_special_tokens=True) == ""
    assert wanted[:7] == [
        *("<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<image>"),
        "<global-img>",
    ]
    assert wanted[7:] == [f"<row_{r}_col_{c}>" for r in range(1, 5) for c in range(1, 5)]


def test_pad_and_end_tokens_are_set_and_nothing_is_added():
    tokenizer = train_tokenizer(TEXTS, vocab_size=300)
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|pad|>", "<|end|>")
    assert tokenizer.bos_token is None
    ids = tokenizer("fox")["input_ids"]
    assert not set(ids) & {tokenizer.pad_token_id, tokenizer.eos_token_id}


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_side_is_configurable(side):
    tokenizer = train_tokenizer(TEXTS, vocab_size=300, padding_side=side)
    padded = tokenizer(["a", "a b"], padding=True)
    row = padded["input_ids"][0]
    assert row[0 if side == "left" else -1] == tokenizer.pad_token_id
    assert set(padded) == {"input_ids", "attention_mask"}


def test_vocab_size_is_an_upper_bound_and_other_tokens_can_be_chosen():
    special = ["<image>", "<|end|>", "<|pad|>", "<mine>"]
    tokenizer = train_tokenizer(TEXTS, vocab_size=270, special_tokens=special)
    assert len(tokenizer) <= 270
    assert tokenizer.convert_tokens_to_ids(special) == [0, 1, 2, 3]
    assert len(train_tokenizer(TEXTS, vocab_size=4000)) < 4000


def test_training_is_deterministic_and_takes_a_generator():
    first = train_tokenizer(TEXTS, vocab_size=350)
    second = train_tokenizer((text for text in TEXTS), vocab_size=350)
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()


def test_a_tokenizer_survives_saving_and_auto_loading(tmp_path):
    tokenizer = train_tokenizer(TEXTS, vocab_size=350, padding_side="left")
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "<|user|>the quick 日本<image><|end|><row_4_col_4>"
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert (loaded.pad_token, loaded.eos_token, loaded.padding_side) == (
        *("<|pad|>", "<|end|>"),
        "left",
    )
    assert loaded.model_input_names == tokenizer.model_input_names
    assert loaded.decode(loaded(text)["input_ids"], skip_special_tokens=True) == "the quick 日本"


@pytest.mark.parametrize("texts", [[], [""], iter(())])
def test_empty_texts_are_refused(texts):
    with pytest.raises(ValueError, match="`texts` holds no text"):
        train_tokenizer(texts)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"texts": "one string"}, "`texts` is one string"),
        ({"texts": ["a", 7]}, "`texts` item 1 is int 7"),
        ({"texts": TEXTS, "vocab_size": 100}, "`vocab_size` is 100; allowed: 279 or more"),
        ({"texts": TEXTS, "special_tokens": ["<image>"]}, "lacks ['<|pad|>', '<|end|>']"),
        ({"texts": TEXTS, "special_tokens": [*CHAT_TOKENS, "<image>"]}, "names a token twice"),
        ({"texts": TEXTS, "padding_side": "up"}, "`padding_side` is 'up'"),
    ],
)
def test_bad_arguments_are_refused_by_name(arguments, message):
    with pytest.raises(ValueError) as caught:
        train_tokenizer(**arguments)
    assert message in str(caught.value)

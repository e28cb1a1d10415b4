# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""A tokenizer for boxes as text: a coordinate is one token, and so is the JSON between two.

`[{"bbox_2d": [125, 250, 375, 500], "label": "red circle"}]` has 12 tokens, which stand for exactly
this text: what reads JSON reads it. A byte-level tokenizer trained on such answers has about 23.
"""

from collections.abc import Iterable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from .tokenizer import CHAT_TOKENS, END, PAD

UNKNOWN = "<|unknown|>"
NUMBERS = tuple(str(number) for number in range(1001))
OPEN, BETWEEN, CLOSE = '[{"bbox_2d": [', '"}, {"bbox_2d": [', '"}]'
JSON_PIECES = (OPEN, '], "label": "', BETWEEN, CLOSE, ", ", "[]")
_WORD = r" ?[^\W\d_]+"


def box_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Return a tokenizer with a token for each number from 0 to 1000 and each word of the texts.

    Args:
        texts: questions and labels; what is no word, a number or a piece of JSON gets one token for
            each character. Words and characters of other texts are unknown.
    """
    pieces = "|".join(_quoted(piece) for piece in JSON_PIECES)
    split = pre_tokenizers.Split(Regex(rf"{pieces}|\d+|{_WORD}|."), behavior="isolated")
    found = {piece for text in texts for piece, _ in split.pre_tokenize_str(text)}
    found |= {piece.strip() for piece in found} - {""}  # the first word of a label has no blank
    words = sorted(found.difference(NUMBERS, JSON_PIECES))
    vocabulary = (*CHAT_TOKENS, UNKNOWN, *JSON_PIECES, *NUMBERS, *words)
    tokenizer = Tokenizer(
        models.WordLevel({word: at for at, word in enumerate(vocabulary)}, unk_token=UNKNOWN)
    )
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(
        [AddedToken(each, special=True) for each in (*CHAT_TOKENS, UNKNOWN)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        extra_special_tokens=[each for each in CHAT_TOKENS if each not in (PAD, END)],
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def _quoted(text: str) -> str:
    """Quote the characters that mean something in a pattern."""
    return "".join(f"\\{each}" if each in "[]{}" else each for each in text)

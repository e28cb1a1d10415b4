# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Train a tokenizer on your own texts: byte-level BPE with the tokens of the chat format.

Every byte is in the vocabulary, so any string can be encoded and decoded. Special tokens get the
first ids, in the order given, and are never split or merged. Each piece of text between them gets a
leading space, removed again in decoding. A word is then the same token at the beginning of an
answer as in the middle of a question, and has to be learned once.
"""

from collections.abc import Iterable, Iterator, Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

PAD, END, IMAGE = "<|pad|>", "<|end|>", "<image>"
CHAT_TOKENS = (PAD, END, "<|system|>", "<|user|>", "<|assistant|>", IMAGE)


def tile_markers(rows: int = 4, cols: int = 4) -> tuple[str, ...]:
    """Return the markers of tiles: `<global-img>` for the thumbnail, `<row_1_col_1>` and so on."""
    grid = [f"<row_{row}_col_{col}>" for row in range(1, rows + 1) for col in range(1, cols + 1)]
    return ("<global-img>", *grid)


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int = 2048,
    special_tokens: Sequence[str] = (*CHAT_TOKENS, *tile_markers()),
    padding_side: str = "left",
    min_frequency: int = 2,
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer; the same texts in the same order give the same tokenizer.

    Args:
        texts: the texts to learn merges from, read once.
        vocab_size: upper bound, special tokens and the 256 bytes included.
        special_tokens: never split, ids from 0; must hold the pad, end and image tokens.
        padding_side: `"left"`, which batched generation needs, or `"right"`.
        min_frequency: how often a pair must occur to be merged.

    Raises:
        ValueError: no text (or only empty ones), a text that is no string, or a `vocab_size`
            without room for the bytes and the special tokens.
    """
    if missing := [token for token in (PAD, END, IMAGE) if token not in special_tokens]:
        raise ValueError(f"`special_tokens` lacks {missing}; add them.")
    if len(set(special_tokens)) < len(special_tokens):
        raise ValueError(f"`special_tokens` names a token twice: {list(special_tokens)}.")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    smallest = len(alphabet) + len(special_tokens)
    if vocab_size < smallest:
        raise ValueError(
            f"`vocab_size` is {vocab_size}; allowed: {smallest} or more ({len(alphabet)} bytes and "
            f"{len(special_tokens)} special tokens)."
        )
    if padding_side not in ("left", "right"):
        raise ValueError(f"`padding_side` is {padding_side!r}; allowed: left, right.")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    strip = decoders.Strip(" ", 1, 0)
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), strip])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=list(special_tokens),
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(_checked(texts), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        extra_special_tokens=[token for token in special_tokens if token not in (PAD, END)],
        padding_side=padding_side,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def _checked(texts: Iterable[str]) -> Iterator[str]:
    """Yield the texts that are not empty; raise `ValueError` if there are none."""
    if isinstance(texts, str):
        raise ValueError("`texts` is one string; pass an iterable of strings, such as [text].")
    found = False
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(
                f"`texts` item {index} is {type(text).__name__} {text!r:.60}; allowed: strings."
            )
        if text:
            found = True
            yield text
    if not found:
        raise ValueError(
            "`texts` holds no text to train a tokenizer on; check the data set's text column."
        )

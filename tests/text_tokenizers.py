# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Tokenizers of several kinds, each trained with any names for its control tokens.

Two tokenizers of one kind with other names are equal but for these names: what one makes of a text
is a reference for the other.
"""

from collections.abc import Sequence

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

TEXTS = ["what color is the shape? blue", "is it red? yes, no", "<a|b> end user image s"] * 3
KINDS = (
    *("byte_level", "byte_level_prefix_space", "ignore_merges", "metaspace_first"),
    *("metaspace_always", "old_llama", "unigram", "wordpiece", "lowercase", "nfkc", "strips"),
)


def make_tokenizer(kind: str, names: Sequence[str], texts: Sequence[str] = TEXTS) -> Tokenizer:
    """A fast tokenizer whose special tokens are pad, end, unknown, then the rest of `names`.

    `<think>` is an added token, but no special one.
    """
    tokenizer = _without_flags(kind, names, texts)
    # what follows replaces the flags that the trainer gave them
    normalized = {"old_llama": names[7:8], "lowercase": names, "nfkc": names}.get(kind, ())
    swallows = {"lstrip": True, "rstrip": True} if kind == "strips" else {}
    tokens = [AddedToken(n, special=True, normalized=n in normalized, **swallows) for n in names]
    made = PreTrainedTokenizerFast(
        tokenizer_object=_with_flags(tokenizer, tokens),
        pad_token=tokens[0],
        eos_token=tokens[1],
        unk_token=tokens[2],
        clean_up_tokenization_spaces=False,
    )
    made.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    if kind == "metaspace_first":
        made.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{names[0]} $A", special_tokens=[(names[0], made.pad_token_id)]
        )
    return made


def _with_flags(tokenizer: Tokenizer, tokens: Sequence[AddedToken]) -> Tokenizer:
    """The tokenizer with other flags for its special tokens."""
    fresh = Tokenizer(tokenizer.model)
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        setattr(fresh, part, getattr(tokenizer, part))
    fresh.add_special_tokens(list(tokens))
    return fresh


def _without_flags(kind: str, names: Sequence[str], texts: Sequence[str]) -> Tokenizer:
    """Model, normalizer, pre-tokenizer and decoder of a kind."""
    if kind == "unigram":
        pieces = [*sorted({*"".join(texts)}), "▁", "▁is", "color", "END", "##s"]
        vocab = [(name, 0.0) for name in names] + [(p, -9.0 + len(p)) for p in pieces]
        tokenizer = Tokenizer(models.Unigram(vocab, unk_id=2))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        return tokenizer
    if kind == "wordpiece":
        signs = sorted({*"".join(texts)})
        pieces = [*names, *signs, *(f"##{sign}" for sign in signs), "is", "##lor", "blue"]
        vocab = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
        tokenizer = Tokenizer(models.WordPiece(vocab, unk_token=names[2]))
        tokenizer.normalizer = normalizers.BertNormalizer()
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer.decoder = decoders.WordPiece()
        return tokenizer
    options = {"special_tokens": list(names), "show_progress": False}
    tokenizer = Tokenizer(
        models.BPE(unk_token=names[2], ignore_merges=kind in ("ignore_merges", "strips"))
    )
    if kind in ("metaspace_first", "metaspace_always"):
        scheme = kind.rpartition("_")[2]
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
        tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    elif kind == "old_llama":
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        tokenizer.decoder = decoders.Replace("▁", " ")
    else:
        prefix = kind == "byte_level_prefix_space"
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
        tokenizer.decoder = decoders.ByteLevel()
        options["initial_alphabet"] = pre_tokenizers.ByteLevel.alphabet()
        if kind in ("lowercase", "nfkc"):
            tokenizer.normalizer = {
                "lowercase": normalizers.Lowercase(),
                "nfkc": normalizers.NFKC(),
            }[kind]
    trainer = trainers.BpeTrainer(vocab_size=330, min_frequency=2, **options)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer

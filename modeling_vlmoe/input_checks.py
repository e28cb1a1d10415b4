# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Refuse inputs whose shapes do not fit each other.

Shapes are compared as Python integers, without a look at any value: that costs microseconds and no
synchronization with a device. A compiled, exported or traced program, whose sizes may be symbols,
goes without.

Shapes: batch, length (of this call), past (tokens that the cache holds), tiles.
"""

import torch
from transformers.cache_utils import Cache

Pattern = tuple[int | str | tuple[int, ...], ...]  # of each size: one, a name for any, or several


def check_token_inputs(
    input_ids: torch.Tensor | None,
    inputs_embeds: torch.Tensor | None,
    attention_mask: torch.Tensor | dict | None,
    position_ids: torch.Tensor | None,
    past_key_values: Cache | None,
    mm_token_type_ids: torch.Tensor | None,
    hidden_size: int,
) -> int:
    """Check the inputs that have an entry for each token, and return the batch size.

    Raise `ValueError` naming both inputs and their shapes, or none or both of ids and embeddings.
    """
    named = (("input_ids", input_ids), ("inputs_embeds", inputs_embeds))
    tokens = [(name, given) for name, given in named if given is not None]
    if len(tokens) != 1:
        raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
    [(name, given)] = tokens
    if _shapes_are_symbols():
        return given.shape[0]
    width = () if name == "input_ids" else (hidden_size,)
    _require(name, given, ("batch", "length", *width))
    batch, length = given.shape[:2]
    beside = f"`{name}` is {tuple(given.shape)}; "
    if isinstance(attention_mask, torch.Tensor):
        _check_mask(attention_mask, batch, length, past_key_values, beside)
    _require("position_ids", position_ids, ((batch, 1), length), beside=beside)
    if not _follow_virtual_tokens(mm_token_type_ids, inputs_embeds, attention_mask):
        _require("mm_token_type_ids", mm_token_type_ids, (batch, length), beside=beside)
    return batch


def _check_mask(
    mask: torch.Tensor, batch: int, length: int, cache: Cache | None, beside: str
) -> None:
    past = 0 if cache is None else cache.get_seq_length()
    keys = length
    if isinstance(past, int):  # a static cache counts on its device
        keys += past
    if cache is not None:
        beside += f"the cache holds {past if isinstance(past, int) else 'some'} tokens; "
    # A cache may have been cropped, or see a window only.
    if (cache is not None or mask.dim() == 4) and mask.shape[-1] > keys:
        keys = mask.shape[-1]
    patterns: tuple[Pattern, ...] = (batch, keys), ((batch, 1), "heads or 1", length, keys)
    _require("attention_mask", mask, *patterns, beside=beside)


def _follow_virtual_tokens(
    types: torch.Tensor | None, embeds: torch.Tensor | None, mask: torch.Tensor | dict | None
) -> bool:
    """Whether embeddings start with virtual tokens that the token types do not know.

    PEFT's prompt tuning puts them before each row, and lengthens the mask but not the types.
    """
    if types is None or embeds is None or not isinstance(mask, torch.Tensor):
        return False
    fits = types.dim() == mask.dim() == 2 and types.shape[0] == embeds.shape[0]
    return fits and types.shape[1] < embeds.shape[1] == mask.shape[1]


def check_labels(labels: torch.Tensor, logits: torch.Tensor) -> None:
    """Raise `ValueError` unless there is a label for each position whose logits were computed."""
    if not _shapes_are_symbols() and labels.shape != logits.shape[:2]:
        raise ValueError(
            f"`labels` is {tuple(labels.shape)}; expected: {tuple(logits.shape[:2])}, a label for "
            f"each position of the logits {tuple(logits.shape)}. With `logits_to_keep` shorten "
            "them too."
        )


def check_pixels(
    pixel_values: torch.Tensor,
    pixel_attention_mask: torch.Tensor | None,
    image_index: torch.Tensor | None,
    expected: tuple[int, int | None, int | None],
) -> None:
    """Check the image inputs of `get_image_features`.

    `expected` is (channels, height, width) of a tile; None for an open size. Raise `ValueError`
    naming both inputs and their shapes, or the index that is out of range.
    """
    if _shapes_are_symbols():
        return
    channels, height, width = expected
    tile = channels, height or "height", width or "width"
    _require("pixel_values", pixel_values, ("batch", "tiles", *tile), ("tiles", *tile))
    shape = tuple(pixel_values.shape)
    beside, padded = f"`pixel_values` is {shape}; ", len(shape) == 5
    if padded:
        mask_shape = (*shape[:2], *shape[3:])
        _require("pixel_attention_mask", pixel_attention_mask, mask_shape, beside=beside)
        flat = "`pixel_values` (tiles, channels, height, width)"
        _require("image_index", image_index, beside=beside, expected=flat)
        return
    none = "None for `pixel_values` without a batch dimension"
    _require("pixel_attention_mask", pixel_attention_mask, beside=beside, expected=none)
    _require("image_index", image_index, ("batch", "tiles of a row"), beside=beside)
    # On another device a look at the values would wait for it; there the indexing itself stops.
    if image_index is None or image_index.device.type != "cpu":
        return
    if (image_index >= len(pixel_values)).any():
        raise ValueError(
            f"`image_index` {tuple(image_index.shape)} holds {int(image_index.max())}; "
            f"`pixel_values` is {shape}: allowed: -1 (none) to {len(pixel_values) - 1}."
        )


def check_rows_of_images(
    pixel_values: torch.Tensor | None, image_index: torch.Tensor | None, batch: int
) -> None:
    """Raise `ValueError` unless the images have as many rows as the tokens."""
    if _shapes_are_symbols():
        return
    for name, given, ranks in (("pixel_values", pixel_values, 5), ("image_index", image_index, 2)):
        if given is not None and given.dim() == ranks and given.shape[0] != batch:
            shape = tuple(given.shape)
            raise ValueError(f"`{name}` is {shape}, with {shape[0]} rows; the tokens have {batch}.")


def _require(
    name: str, given: torch.Tensor | None, *patterns: Pattern, beside: str = "", expected: str = ""
) -> None:
    """Refuse a tensor whose shape is that of no pattern; `beside` names what it has to fit."""
    if given is not None and not any(_fits(tuple(given.shape), pattern) for pattern in patterns):
        allowed = expected or " or ".join(map(_text, patterns))
        raise ValueError(f"`{name}` is {tuple(given.shape)}; {beside}expected: {allowed}.")


def _fits(shape: tuple[int, ...], pattern: Pattern) -> bool:
    return len(shape) == len(pattern) and all(
        size in wanted if isinstance(wanted, tuple) else isinstance(wanted, str) or size == wanted
        for size, wanted in zip(shape, pattern, strict=True)
    )


def _text(pattern: Pattern) -> str:
    sizes = [" or ".join(map(str, s)) if isinstance(s, tuple) else str(s) for s in pattern]
    return f"({', '.join(sizes)})"


def _shapes_are_symbols() -> bool:
    return torch.compiler.is_compiling() or torch.jit.is_tracing()

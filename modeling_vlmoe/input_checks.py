# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""What the models refuse at their door: inputs whose shapes do not fit each other.

Shapes are compared as Python integers, without a look at any value: that costs microseconds and no
synchronisation with a device. A compiled, exported or traced program, whose sizes may be symbols,
goes without.

Shapes: batch, length (of this call), past (tokens that the cache holds), tiles.
"""

from typing import Any

import torch
from transformers.cache_utils import Cache


def check_token_inputs(
    input_ids: Any,
    inputs_embeds: Any,
    attention_mask: Any = None,
    position_ids: Any = None,
    past_key_values: Cache | None = None,
    mm_token_type_ids: Any = None,
    hidden_size: int | None = None,
) -> int:
    """Check the inputs with an entry for each token.

    Args:
        input_ids: (batch, length), or None.
        inputs_embeds: (batch, length, hidden), or None.
        attention_mask: (batch, past + length), or (batch or 1, heads or 1, length, past + length);
            another object than a tensor, such as a dict of masks, is not looked at.
        position_ids: (batch or 1, length).
        past_key_values: the cache, for `past`.
        mm_token_type_ids: (batch, length); with `inputs_embeds` also fewer, see
            `is_behind_virtual_tokens`.
        hidden_size: width of `inputs_embeds`.

    Returns: batch.

    Raises:
        ValueError: naming both inputs and their shapes, or none or both of ids and embeddings.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
    if _shapes_are_symbols():
        return (inputs_embeds if input_ids is None else input_ids).shape[0]
    if input_ids is not None:
        name, given, wanted = "input_ids", input_ids, "(batch, length)"
    else:
        name, given, wanted = "inputs_embeds", inputs_embeds, f"(batch, length, {hidden_size})"
    of_embeds = inputs_embeds is not None and hidden_size is not None
    if given.dim() != wanted.count(",") + 1 or (of_embeds and given.shape[-1] != hidden_size):
        raise ValueError(f"`{name}` is {_shape(given)}; expected: {wanted}.")
    batch, length = given.shape[:2]
    reference = f"`{name}` is {_shape(given)}"
    if isinstance(attention_mask, torch.Tensor):
        _check_mask(attention_mask, batch, length, past_key_values, reference)
    if position_ids is not None:
        fits = position_ids.dim() == 2 and tuple(position_ids.shape) in _rows(batch, length)
        _require(fits, "position_ids", position_ids, f"({batch} or 1, {length})", reference)
    if mm_token_type_ids is not None:
        fits = tuple(mm_token_type_ids.shape) == (batch, length)
        behind = is_behind_virtual_tokens(inputs_embeds, mm_token_type_ids, attention_mask)
        allowed = f"({batch}, {length})"
        _require(fits or behind, "mm_token_type_ids", mm_token_type_ids, allowed, reference)
    return batch


def is_behind_virtual_tokens(inputs_embeds: Any, types: Any, attention_mask: Any) -> bool:
    """Whether embeddings start with virtual tokens that the token types do not know.

    PEFT's prompt tuning puts them before each row, and lengthens the mask but not the types.
    """
    return (
        inputs_embeds is not None
        and isinstance(attention_mask, torch.Tensor)
        and types.dim() == attention_mask.dim() == 2
        and types.shape[0] == inputs_embeds.shape[0]
        and types.shape[1] < inputs_embeds.shape[1] == attention_mask.shape[1]
    )


def check_labels(labels: torch.Tensor, logits: torch.Tensor) -> None:
    """Check that there is a label for each position whose logits were computed.

    Raises:
        ValueError: naming both shapes.
    """
    if not _shapes_are_symbols() and labels.shape != logits.shape[:2]:
        raise ValueError(
            f"`labels` is {_shape(labels)}; expected: {_shape(logits[..., 0])}, a label for each "
            f"position of the logits {_shape(logits)}. With `logits_to_keep` shorten them too."
        )


def check_pixels(
    pixel_values: torch.Tensor,
    pixel_attention_mask: torch.Tensor | None,
    image_index: torch.Tensor | None,
    expected: tuple[int, int | None, int | None],
) -> None:
    """Check the image inputs of `get_image_features`.

    Args:
        pixel_values, pixel_attention_mask, image_index: as there.
        expected: channels, height, width of a tile; None for a size that is open.

    Raises:
        ValueError: naming both inputs and their shapes, or the index that is out of range.
    """
    if _shapes_are_symbols():
        return
    fits = pixel_values.dim() in (4, 5) and all(
        wanted in (None, given)
        for wanted, given in zip(expected, pixel_values.shape[-3:], strict=True)
    )
    if not fits:
        tile = ", ".join(
            str(wanted or name)
            for wanted, name in zip(expected, ("", "height", "width"), strict=True)
        )
        raise ValueError(
            f"`pixel_values` is {_shape(pixel_values)}; expected: (batch, tiles, {tile}) or "
            f"(tiles, {tile})."
        )
    reference = f"`pixel_values` is {_shape(pixel_values)}"
    padded = pixel_values.dim() == 5
    if pixel_attention_mask is not None:
        fitting = (*pixel_values.shape[:2], *pixel_values.shape[3:])
        fits = padded and tuple(pixel_attention_mask.shape) == fitting
        allowed = str(fitting) if padded else "None for `pixel_values` without a batch dimension"
        _require(fits, "pixel_attention_mask", pixel_attention_mask, allowed, reference)
    if image_index is None:
        return
    fits = image_index.dim() == 2 and not padded
    allowed = "(batch, tiles of a row), with `pixel_values` (tiles, channels, height, width)"
    _require(fits, "image_index", image_index, allowed, reference)
    # On another device a look at the values would wait for it; there the indexing itself stops.
    if image_index.device.type == "cpu" and (image_index >= len(pixel_values)).any():
        raise ValueError(
            f"`image_index` {_shape(image_index)} holds {int(image_index.max())}; {reference}: "
            f"allowed: -1 (none) to {len(pixel_values) - 1}."
        )


def check_rows_of_images(pixel_values: Any, image_index: Any, batch: int) -> None:
    """Check that the images have as many rows as the tokens.

    Raises:
        ValueError: naming both shapes.
    """
    if _shapes_are_symbols():
        return
    for name, given, ranks in (("pixel_values", pixel_values, 5), ("image_index", image_index, 2)):
        if given is not None and given.dim() == ranks and given.shape[0] != batch:
            raise ValueError(
                f"`{name}` is {_shape(given)}, with {given.shape[0]} rows; the tokens have {batch}."
            )


def _check_mask(
    mask: torch.Tensor, batch: int, length: int, cache: Cache | None, reference: str
) -> None:
    past = 0 if cache is None else cache.get_seq_length()
    known = isinstance(past, int)  # a static cache counts on its device
    keys = past + length if known else length
    if mask.dim() == 2:
        fits = mask.shape[0] == batch and _is_long_enough(mask.shape[1], keys, cache)
        allowed = f"({batch}, {keys})"
    else:
        shape = mask.shape
        fits = mask.dim() == 4 and shape[0] in (1, batch) and shape[2] == length
        fits = fits and shape[3] >= keys
        allowed = f"({batch}, {keys}), or ({batch} or 1, heads or 1, {length}, {keys} or more)"
    if cache is not None:
        reference += f", the cache holds {past if known else 'some'} tokens"
    _require(fits, "attention_mask", mask, allowed, reference)


def _is_long_enough(given: int, keys: int, cache: Cache | None) -> bool:
    """A cache may be cropped, or be one that sees a window only: then a mask may be longer."""
    return given == keys or (cache is not None and given > keys)


def _rows(batch: int, length: int) -> tuple[tuple[int, int], ...]:
    return (batch, length), (1, length)


def _require(fits: bool, name: str, given: torch.Tensor, allowed: str, reference: str) -> None:
    if not fits:
        raise ValueError(f"`{name}` is {_shape(given)}; {reference}; expected: {allowed}.")


def _shape(tensor: torch.Tensor) -> str:
    return str(tuple(tensor.shape))


def _shapes_are_symbols() -> bool:
    return torch.compiler.is_compiling() or torch.jit.is_tracing()

# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Refuse weights that hold NaN or infinite numbers."""

from collections.abc import Iterable

import torch


def require_finite(tensors: Iterable[tuple[str, torch.Tensor]], source: str) -> None:
    """Raise if a tensor holds NaN or infinite numbers; one pass over all of them.

    Args:
        tensors: with their names; of quantized ones the scales are looked at.
        source: where they come from, for the message.

    Raises:
        ValueError: naming the first such tensor.
    """
    bad = [name for name, tensor in tensors if not _is_finite(tensor)]
    if bad:
        raise ValueError(
            f"{source}: the tensor {bad[0]} holds NaN or infinite numbers"
            f"{f', and {len(bad) - 1} more do' if len(bad) > 1 else ''}. Take an older checkpoint, "
            "or copy or download the weights again."
        )


def _is_finite(tensor: torch.Tensor) -> bool:
    if hasattr(tensor, "__tensor_flatten__"):  # such as torchao's, of numbers and scales
        names, _ = tensor.__tensor_flatten__()
        return all(_is_finite(getattr(tensor, name)) for name in names)
    if tensor.is_meta or not tensor.is_floating_point() or not tensor.numel():
        return True
    wide = tensor.detach() if tensor.dtype.itemsize > 1 else tensor.detach().float()
    return bool(torch.stack(wide.aminmax()).isfinite().all())

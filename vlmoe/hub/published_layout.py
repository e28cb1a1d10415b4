# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""The tensors of a model's files: names and shapes as the model's family publishes them.

Transformers keeps the experts of a layer in one bank, `gate_up_proj` (E, 2 I, H) and `down_proj`
(E, H, I). `save_pretrained` writes them under the names of the family's published checkpoints, most
often one tensor per expert and projection. All of these are views of the bank. They are found by
transformers' own conversion, run on a model without memory.

Qwen3-VL-MoE is the exception: `save_pretrained` writes its banks as they are in memory, and the
family publishes them as (E, H, 2 I) and (E, I, H). Transformers loads both, by their shape. Servers
transpose every bank of that family, so that they need the published layout.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

Tensor = torch.Tensor
TRANSPOSED_TYPE = "qwen3_vl_moe"
BANKS = (".mlp.experts.gate_up_proj", ".mlp.experts.down_proj")


@dataclass(frozen=True)
class PublishedView:
    """A tensor of a file as a view of a tensor of the model.

    Attributes:
        source: name of the model's tensor.
        source_shape: its shape.
        shape, stride, offset: of the view, where the model's tensor is contiguous.
        dtype: of both.
    """

    source: str
    source_shape: tuple[int, ...]
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype

    def of(self, tensor: Tensor) -> Tensor:
        """Return the view of the model's whole tensor."""
        return _strided(tensor, self.shape, self.stride, self.offset)

    @property
    def experts(self) -> range:
        """Return the experts of a bank that the view holds: one, or all."""
        whole = math.prod(self.shape) == math.prod(self.source_shape)
        first = self.offset // self._expert_size
        return range(self.source_shape[0]) if whole else range(first, first + 1)

    def of_expert(self, expert: int, tensor: Tensor) -> Tensor:
        """Return the view's part of one expert.

        Args:
            expert: one of `experts`.
            tensor: the expert's slice of the bank.
        """
        if len(self.experts) == 1 and len(self.shape) < len(self.source_shape):
            start = self.offset - expert * self._expert_size
            return _strided(tensor, self.shape, self.stride, start)
        return _strided(tensor, self.shape[1:], self.stride[1:], 0)

    @property
    def _expert_size(self) -> int:
        return math.prod(self.source_shape[1:])


def _strided(
    tensor: Tensor, shape: tuple[int, ...], stride: tuple[int, ...], offset: int
) -> Tensor:
    """Return a view, by its place in the tensor: `as_strided` counts from the storage's start."""
    whole = tensor.contiguous()
    return whole.as_strided(shape, stride, whole.storage_offset() + offset)


class _KeepViews(TorchFunctionMode):
    """While active, `contiguous` does not copy, so that a converted tensor stays a view."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Return the tensor itself for `contiguous`."""
        return args[0] if func is torch.Tensor.contiguous else func(*args, **(kwargs or {}))


def published_views(
    model: PreTrainedModel, dtypes: Mapping[str, torch.dtype] | None = None
) -> dict[str, PublishedView]:
    """Return the tensors of the model's files, in the order in which they are saved.

    Tied weights are stored once.

    Args:
        model: the values of its weights are not read; it may be on the meta device.
        dtypes: of tensors, by their name in the model; by default the model's own.

    Raises:
        ValueError: a tensor of the files is no view of one of the model's.
    """
    tied, own = set(model.all_tied_weights_keys), dtypes or {}
    state = {
        name: torch.empty(tensor.shape, dtype=own.get(name, tensor.dtype), device="meta")
        for name, tensor in model.state_dict().items()
        if name not in tied
    }
    names = {tensor.untyped_storage()._cdata: name for name, tensor in state.items()}
    with _KeepViews():
        saved = revert_weight_conversion(model, dict(state))
    views = {}
    for name, tensor in saved.items():
        source = names.get(tensor.untyped_storage()._cdata)
        if source is None:
            raise ValueError(
                f"{name} of {type(model).__name__} is computed when it is saved, so that it cannot "
                "be written piece by piece; save the model with save_pretrained."
            )
        if is_transposed_bank(model.config, name):
            tensor = tensor.mT
        shape, stride = tuple(tensor.shape), tensor.stride()
        whole = tuple(state[source].shape)
        views[name] = PublishedView(
            source, whole, shape, stride, int(tensor.storage_offset()), tensor.dtype
        )
    return views


def is_transposed_bank(config: PreTrainedConfig, name: str) -> bool:
    """Tell whether a tensor of the files is a bank that is published transposed."""
    return config.model_type == TRANSPOSED_TYPE and name.endswith(BANKS)


def saved_bank_shape(config: PreTrainedConfig, name: str) -> tuple[int, int, int]:
    """Return the shape of such a bank as `save_pretrained` writes it."""
    text = config.get_text_config()
    experts, hidden, width = text.num_experts, text.hidden_size, text.moe_intermediate_size
    is_down = name.endswith(BANKS[1])
    return (experts, hidden, width) if is_down else (experts, 2 * width, hidden)


def ambiguous_banks(config: PreTrainedConfig) -> str | None:
    """Return why the layout of Qwen3-VL-MoE's banks cannot be seen from their shape, or None."""
    if config.model_type != TRANSPOSED_TYPE:
        return None
    text = config.get_text_config()
    hidden, width = text.hidden_size, text.moe_intermediate_size
    for field, size in (
        ("moe_intermediate_size", width),
        ("twice the moe_intermediate_size", 2 * width),
    ):
        if size == hidden:
            return (
                f"{field} is {size}, as hidden_size is: transformers cannot tell a bank of experts "
                "from its transpose, and loads the published layout wrongly"
            )
    return None

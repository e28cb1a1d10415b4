# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""How many tokens each expert gets, layer by layer, split by image and text tokens.

Counted by forward hooks on the routers, so that neither logits nor choices are kept; hooks see
every forward, also those of `generate`. Padding is left out. An evenly loaded layer gives each
expert `k / experts` of the tokens: its fair share of the assignments is `1 / experts`.

Shapes: L sparse layers, E experts, k experts per token.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

ROUTER_CLASS = "VLMoERouter"


@dataclass
class ExpertLoad:
    """Counts of assignments of tokens to experts."""

    image_counts: torch.Tensor  # (L, E) long, on the CPU
    text_counts: torch.Tensor  # (L, E) long, on the CPU

    @property
    def counts(self) -> torch.Tensor:
        """Counts of all tokens, (L, E)."""
        return self.image_counts + self.text_counts

    def as_dict(self) -> dict[str, Any]:
        """Shares for a JSON file: for image, text and all tokens `(L, E)` shares of each layer's
        assignments."""
        shares = {"image": self.image_counts, "text": self.text_counts, "all": self.counts}
        return {
            "fair_share": 1 / self.counts.shape[1],
            **{f"{name}_share": load_shares(counts).tolist() for name, counts in shares.items()},
            "max_over_mean": (load_shares(self.counts).amax(1) * self.counts.shape[1]).tolist(),
            "unused_experts": (self.counts == 0).sum(1).tolist(),
        }


def load_shares(counts: torch.Tensor) -> torch.Tensor:
    """Counts `(L, E)` to the share of its layer's assignments that each expert got; zeros where a
    layer saw no token."""
    return counts.double() / counts.sum(1, keepdim=True).clamp(min=1)


@contextmanager
def record_expert_load(model: nn.Module) -> Iterator[ExpertLoad]:
    """Count the experts that tokens are routed to in every forward of `model` inside the block.

    Yields:
        An `ExpertLoad` that grows with each forward.

    Raises:
        ValueError: the model has no sparse layer.

    Example:
        >>> with record_expert_load(model) as load:
        ...     model(**batch)
        >>> load.image_counts.shape
        torch.Size([2, 8])
    """
    routers = [module for module in model.modules() if type(module).__name__ == ROUTER_CLASS]
    if not routers:
        raise ValueError(f"{type(model).__name__} has no {ROUTER_CLASS} module: it has no experts.")
    recorder = _LoadRecorder(model, routers)
    try:
        yield recorder.load
    finally:
        recorder.remove()


class _LoadRecorder:
    """Hooks on the model, which tell what kind of token each position holds, and on its routers,
    which count."""

    def __init__(self, model: nn.Module, routers: list[nn.Module]):
        experts = routers[0].get_parameter("weight").shape[0]
        counts = torch.zeros(len(routers), experts, dtype=torch.long)
        self.load = ExpertLoad(image_counts=counts, text_counts=counts.clone())
        self._model = model
        self._parameters = inspect.signature(_unwrapped(model).forward)
        self._is_image = self._is_text = torch.zeros(0, dtype=torch.bool)  # (batch * length,) each
        self._counted: set[int] = set()
        handles = [model.register_forward_pre_hook(self._before_forward, with_kwargs=True)]
        handles += [
            router.register_forward_hook(self._counter(layer))
            for layer, router in enumerate(routers)
        ]
        self._handles = handles

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _before_forward(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        inputs = self._parameters.bind_partial(*args, **kwargs).arguments
        tokens = inputs.get("input_ids")
        if tokens is None:
            tokens = inputs["inputs_embeds"][..., 0]
        is_image = self._image_tokens(inputs, tokens)
        real = self._real_tokens(inputs, tokens)
        self._is_image, self._is_text = (is_image & real).flatten(), (~is_image & real).flatten()
        self._counted.clear()

    def _image_tokens(self, inputs: dict[str, Any], tokens: torch.Tensor) -> torch.Tensor:
        """(batch, length): True for image tokens; a token decoded with a cache is text."""
        if inputs.get("input_ids") is not None:
            return tokens == _unwrapped(self._model).config.image_token_id
        types = inputs.get("mm_token_type_ids")
        if types is not None and types.shape == tokens.shape:
            return types == 1
        return torch.zeros_like(tokens, dtype=torch.bool)

    def _real_tokens(self, inputs: dict[str, Any], tokens: torch.Tensor) -> torch.Tensor:
        """(batch, length): True for tokens that are not padding."""
        mask = inputs.get("attention_mask")
        if mask is None:
            return torch.ones_like(tokens, dtype=torch.bool)
        if not isinstance(mask, torch.Tensor) or mask.dim() != 2:
            raise ValueError(
                "Expert load needs a (batch, length) attention mask to leave out padding."
            )
        return mask[:, -tokens.shape[1] :].bool()

    def _counter(self, layer: int) -> Callable[..., None]:
        def count(router: nn.Module, args: tuple, output: tuple[torch.Tensor, ...]) -> None:
            if layer in self._counted:  # gradient checkpointing runs the same forward again
                return
            self._counted.add(layer)
            chosen, experts = output[2], self.load.counts.shape[1]  # (batch * length, k)
            for counts, mask in (
                (self.load.image_counts, self._is_image),
                (self.load.text_counts, self._is_text),
            ):
                counts[layer] += torch.bincount(
                    chosen[mask.to(chosen.device)].flatten(), minlength=experts
                ).cpu()

        return count


def _unwrapped(model: nn.Module) -> Any:
    """The model inside DistributedDataParallel."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model

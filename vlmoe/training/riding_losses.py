# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Router losses under a foreign loss: their gradient rides on the hidden states.

    with RouterLossRide(model, row_weights) as ride:
        loss = foreign_loss(model(**batch))
    ride.carried_by(loss).backward()  # the gradient of loss + router losses

Where another library computes the loss, router losses cannot always be added to it: GradCache calls
`backward` on embeddings alone, and runs the model again inside of the backward pass. So
`VLMoEModel.forward` passes its hidden states through an autograd function that changes nothing, and
hands the router losses their gradient as soon as one arrives at the hidden states, as in DeepSeek's
AddAuxiliaryLoss
(https://huggingface.co/deepseek-ai/DeepSeek-V2/blob/main/modeling_deepseek.py).

That gradient is the one that arrives at the foreign loss: whatever gradient accumulation or a
GradScaler multiply the loss by, the router losses are multiplied by it, too.
"""

from types import TracebackType
from typing import Any, Self

import torch
from torch import nn

from ..modeling_vlmoe.model_outputs import VLMoEModelOutputWithPast
from ..modeling_vlmoe.modeling_vlmoe import VLMoEModel


class RouterLossRide:
    """Lets the router losses of forward passes ride, inside a `with` block, for one loss.

    The block holds the forward passes. GradCache makes them in the backward pass, which then
    belongs into the block.

    Args:
        model: holds one `VLMoEModel`, which may be wrapped, as by PEFT.
        row_weights: (batch,) weights of the rows of the first forward pass, which is the only one
            that carries losses; or the weight of each row in every pass that has a gradient.

    Attributes:
        total: the router losses that ride, with their coefficients, a scalar without graph; None if
            there are none, as without coefficients or trainable routers.
    """

    def __init__(self, model: nn.Module, row_weights: torch.Tensor | float):
        self.total: torch.Tensor | None = None
        self._backbone = backbone_of(model)
        self._row_weights: torch.Tensor | float | None = row_weights
        self._scale: torch.Tensor | None = None
        self._boarded = self._arrived = 0

    def __enter__(self) -> Self:
        """Begin; raises `RuntimeError` if the losses of the model ride already."""
        if self._backbone.router_loss_ride is not None:
            raise RuntimeError("The router losses of this model ride already, for another loss.")
        if self._backbone.wants_router_losses():
            self._backbone.router_loss_ride = self
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """End."""
        self._backbone.router_loss_ride = None

    def carried_by(self, loss: torch.Tensor) -> torch.Tensor:
        """Return the loss, which tells in its backward pass what the router losses are scaled by.

        To be called before the backward pass; else that raises `RuntimeError`.
        """
        return _Carrier.apply(loss, self)

    def require_arrival(self) -> None:
        """Check, after the backward pass, that the gradient reached the router losses.

        Raises:
            RuntimeError: it did not, since the loss does not depend on `last_hidden_state`.
        """
        if self._boarded and not self._arrived:
            raise RuntimeError(
                "The router losses trained nothing: no gradient of the loss arrived at the "
                "`last_hidden_state` of VLMoEModel, on which they ride. Let the loss depend on it, "
                "or set router_aux_loss_coef and router_z_loss_coef to 0."
            )

    @torch.compiler.disable
    def board(self, output: VLMoEModelOutputWithPast, real: torch.Tensor) -> None:
        """Put the router losses of one forward pass on its hidden states; `VLMoEModel` calls it.

        Args:
            output: of the backbone, with router logits.
            real: (batch, length), True for real tokens.

        Raises:
            ValueError: there is not one weight for each row.
            RuntimeError: the router logits have no graph.
        """
        row_weights = self._weights_of_pass(real)
        if row_weights is None:
            return
        if len(row_weights) != len(real):
            raise ValueError(
                f"{len(row_weights)} row weights are for a batch of {len(row_weights)} rows; the "
                f"model was called with {len(real)}."
            )
        total = self._backbone.router_losses(
            output.router_logits,
            real,
            row_weights,
            mm_token_type_ids=output.mm_token_type_ids,
            vision_router_logits=output.vision_router_logits,
            shown_tiles=output.shown_tiles,
        ).total
        if total is None:
            return
        hidden = output.last_hidden_state
        if hidden.requires_grad:
            if not total.requires_grad:
                raise RuntimeError("The router logits have no graph, so that no loss trains them.")
            self._boarded += 1
            output.last_hidden_state = _Ride.apply(hidden, total, self)
        value = total.detach()
        self.total = value if self.total is None else self.total + value

    def arrive(self) -> torch.Tensor:
        """Return the gradient of the router losses, a scalar."""
        if self._scale is None:
            raise RuntimeError(
                "The scale of the router losses is not known: let `carried_by(loss)` of their "
                "RouterLossRide be what calls `backward`."
            )
        self._arrived += 1
        return self._scale

    def depart(self, scale: torch.Tensor) -> None:
        """Keep the gradient that arrives at the loss, a scalar."""
        self._scale = scale

    def _weights_of_pass(self, real: torch.Tensor) -> torch.Tensor | None:
        weights = self._row_weights
        if isinstance(weights, float):
            if not torch.is_grad_enabled():  # GradCache's first pass
                return None
            return torch.full(real.shape[:1], weights, device=real.device)
        self._row_weights = None  # later passes are those of a reference, or for metrics
        return weights


class _Ride(torch.autograd.Function):
    """Passes hidden states through; its backward pass gives the router losses their gradient."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, total: torch.Tensor, ride: RouterLossRide
    ) -> torch.Tensor:
        ctx.ride, ctx.like = ride, total.detach()
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        return grad, ctx.ride.arrive().to(ctx.like), None


class _Carrier(torch.autograd.Function):
    """Passes a loss through; its backward pass keeps the gradient that arrives."""

    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor, ride: RouterLossRide) -> torch.Tensor:
        ctx.ride = ride
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        ctx.ride.depart(grad)
        return grad, None


def backbone_of(model: nn.Module) -> VLMoEModel:
    """Return the `VLMoEModel` inside of a model or a wrapper.

    Raises:
        TypeError: there is none.
    """
    for module in model.modules():
        if isinstance(module, VLMoEModel):
            return module
    raise TypeError(f"{type(model).__name__} holds no VLMoEModel, whose router losses could ride.")

# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Cross-entropy plus router losses for any sparse model of transformers, in plain `Trainer`.

    Trainer(model, args, ..., compute_loss_func=SparseLoss(model, balance=0.001))

`Trainer` then takes the labels away, so that the model adds no loss of its own, and hands over
`num_items_in_batch`, the label tokens of the whole optimizer step. Each row is weighted by its
share of these, in the cross-entropy and in the router losses, and a row's router losses do not
depend on the rows beside it: the gradient of an optimizer step is the same however its rows are
split over micro-batches and ranks. Transformers' own balancing losses pool rows and layers and
depend on the split; LLaVA, InternVL and Gemma 4 have none at all.

The losses are those of modeling_vlmoe/router_losses.py, with scope `"sequence"`: fractions count
the k best scores, without a selection bias, as in DeepSeek-V3 (https://arxiv.org/abs/2412.19437,
eq. 18). ERNIE's banks for text and for images are balanced apart, each with the share of its
tokens.
"""

from collections import defaultdict
from typing import Any, Protocol, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from ..modeling_vlmoe.label_loss import label_loss
from ..modeling_vlmoe.model_outputs import VLMoEModelOutputWithPast
from ..modeling_vlmoe.modeling_vlmoe import VLMoEForConditionalGeneration
from ..modeling_vlmoe.modeling_vlmoe_text import real_tokens
from ..modeling_vlmoe.router_losses import RouterLosses, load_balancing_loss, router_z_loss
from ..routing.constant_weights import warn_of_constant_weights
from ..routing.kinds import Inputs
from ..routing.record import Listener, Routing
from ..routing.routed_layers import Place, RoutedLayer, routed_layers
from ..routing.scoring import Scoring, router_scoring
from .router_outputs import NOT_SEEN, RouterOutputs

NEEDS_LABELS = ("paligemma",)
"""Model types that build their attention mask from labels in their forward pass."""


class SparseLoss:
    """A `compute_loss_func` for `Trainer`: cross-entropy, load balancing loss, router z-loss.

    Without `num_items_in_batch`, as in evaluation, the label tokens of the batch take its place. A
    batch without label tokens has loss 0. Where no router trains, as with LoRA on other modules,
    the loss is the cross-entropy: router losses would train only what lies below the routers.

    On VLMoE it is the loss of its own forward pass, with all terms of its config; coefficients that
    are given are written to the config.

    Args:
        model: the model that is trained, also one that PEFT wraps; not yet compiled or wrapped by
            DistributedDataParallel or FSDP.
        balance: coefficient of the load balancing loss; by default `router_aux_loss_coef` of the
            text config.
        z: coefficient of the router z-loss; by default `router_z_loss_coef` of the text config, or
            0 where there is none.

    Attributes:
        last: the router losses of the last call, before coefficients, for logging.
        loss_weights: (batch,), those of the rows of the next call, for a caller such as `Trainer`
            that hands over labels alone.
        row_losses: (batch,), the cross-entropy of each row of the last call, summed, without
            gradient; None where that had no `loss_weights`.

    Raises:
        ValueError: the model has no experts, needs labels in its forward pass, or its routers'
            probabilities do not follow from their outputs; a coefficient is negative or missing.
        TypeError: it holds no model of transformers.
    """

    def __init__(self, model: nn.Module, balance: float | None = None, z: float | None = None):
        self._head = _pretrained(model)
        if self._head.config.model_type in NEEDS_LABELS:
            raise ValueError(
                f"{type(self._head).__name__} needs `labels` in its forward pass, and SparseLoss "
                "takes them away: train it with its own loss."
            )
        text = self._head.config.get_text_config()
        balance = _coefficient(balance, "balance", text, "router_aux_loss_coef")
        z = _coefficient(z, "z", text, "router_z_loss_coef", 0.0)
        self._router_losses: _PlaceLosses = (
            _OfVLMoE(self._head, balance, z)
            if isinstance(self._head, VLMoEForConditionalGeneration)
            else _OfNative(self._head, routed_layers(model), balance, z)
        )
        self.last = RouterLosses()
        self.loss_weights: torch.Tensor | None = None
        self.row_losses: torch.Tensor | None = None

    def __call__(
        self,
        outputs: ModelOutput,
        labels: torch.Tensor | None,
        num_items_in_batch: torch.Tensor | int | None = None,
        loss_weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the loss of one micro-batch, a scalar.

        Args:
            outputs: of the model, with `logits` (batch, length, vocabulary).
            labels: (batch, length) token ids; -100 where there is no loss.
            num_items_in_batch: label tokens of the whole optimizer step, on all ranks, each counted
                with its row's weight.
            loss_weights: (batch,), how much a label token of each row counts; by default 1.

        Raises:
            ValueError: there are no labels, or not one for each position; or not one weight for
                each row.
            RuntimeError: the routers of this pass were not seen, or their logits have no graph.
        """
        if labels is None:
            raise ValueError("The batch has no `labels`: SparseLoss needs them.")
        logits = outputs["logits"]
        items = num_items_in_batch, self.loss_weights if loss_weights is None else loss_weights
        self.loss_weights = None
        of_labels = label_loss(self._head.loss_function, logits, labels, *items)
        self.row_losses = of_labels.row_losses
        losses = self._router_losses(labels, of_labels.row_shares)
        self.last = RouterLosses(*(_detached(each) for each in vars(losses).values()))
        return losses.added_to(of_labels.loss)

    def remove(self) -> None:
        """Stop listening to the model."""
        self._router_losses.remove()


class _PlaceLosses(Protocol):
    def __call__(self, labels: torch.Tensor, row_weights: torch.Tensor) -> RouterLosses: ...

    def remove(self) -> None: ...


class _OfNative:
    """Router losses of transformers' own sparse models, from the logits of their routers."""

    def __init__(self, head: PreTrainedModel, layers: list[RoutedLayer], balance: float, z: float):
        self._head, self._layers = head, layers
        self._balance, self._z = balance, z
        self._scoring = {layer.name: router_scoring(layer) for layer in layers}
        if z and any(scoring.kind == "probabilities" for scoring in self._scoring.values()):
            raise ValueError(
                f"The routers of {type(head).__name__} return probabilities, which have no z-loss: "
                "set z to 0."
            )
        warn_of_constant_weights(head)
        self._outputs = RouterOutputs(head, layers)

    def __call__(self, labels: torch.Tensor, row_weights: torch.Tensor) -> RouterLosses:
        """Sum over places (banks) of the mean over their layers."""
        seen = self._outputs.take()
        if not (self._balance or self._z) or not _any_trains(self._layers):
            return RouterLosses()
        real = self._outputs.real
        if real.shape != labels.shape:
            raise ValueError(
                f"`labels` is {tuple(labels.shape)}; the model routed {tuple(real.shape)} tokens."
            )
        groups: dict[tuple[Place, Scoring], list[RoutedLayer]] = defaultdict(list)
        for layer in self._layers:
            groups[layer.place, self._scoring[layer.name]].append(layer)
        places = [layer.place for layer in self._layers]
        losses = RouterLosses()
        for (place, scoring), layers in groups.items():
            members = self._outputs.members(layers[0])
            logits = self._logits(seen, layers, members)
            if not logits:
                continue
            mask = members & real
            # a bank's share of the row's tokens, and this group's of the place's layers
            share = mask.sum(-1) / real.sum(-1).clamp(min=1) * (len(logits) / places.count(place))
            scores = tuple(scoring.logits(each) for each in logits)
            self._add(losses, scores, scoring, mask, row_weights * share.to(row_weights.device))
        return losses

    def _logits(
        self, seen: dict[str, torch.Tensor], layers: list[RoutedLayer], members: torch.Tensor
    ) -> list[torch.Tensor]:
        found = [self._outputs.spread(each, seen.get(each.name), members) for each in layers]
        logits = [each for each in found if each is not None]
        learns = self._head.training and torch.is_grad_enabled()
        if learns and not all(each.requires_grad for each in logits):
            raise RuntimeError(
                "The router logits have no graph, so that the balancing loss would train nothing: "
                "set `use_reentrant` to False in `gradient_checkpointing_kwargs`."
            )
        return logits

    def _add(
        self,
        losses: RouterLosses,
        logits: tuple[torch.Tensor, ...],
        scoring: Scoring,
        mask: torch.Tensor,
        row_weights: torch.Tensor,
    ) -> None:
        terms = []
        if self._balance:
            aux_loss = load_balancing_loss(
                logits,
                scoring.top_k,
                mask,
                row_weights,
                scoring.of_logits,
                n_group=scoring.n_group,
                topk_group=scoring.topk_group,
            )
            losses.aux_loss = _sum(losses.aux_loss, aux_loss)
            terms.append(self._balance * aux_loss)
        if self._z:
            z_loss = router_z_loss(logits, mask, row_weights)
            losses.z_loss = _sum(losses.z_loss, z_loss)
            terms.append(self._z * z_loss)
        for term in terms:
            losses.total = _sum(losses.total, term)

    def remove(self) -> None:
        """Stop listening."""
        self._outputs.remove()


class _OfVLMoE:
    """Router losses of VLMoE: its own function, from the output of its backbone."""

    def __init__(self, head: VLMoEForConditionalGeneration, balance: float, z: float):
        text_config = head.config.text_config
        text_config.router_aux_loss_coef, text_config.router_z_loss_coef = balance, z
        self._head = head
        self._last: tuple[Any, VLMoEModelOutputWithPast] | None = None
        self._attention_mask: Any = None
        self._listener = Listener(head.model, [self], layers=[])

    def __call__(self, labels: torch.Tensor, row_weights: torch.Tensor) -> RouterLosses:
        """As the forward pass with labels computes them."""
        last, self._last = self._last, None
        if last is None:
            raise RuntimeError(NOT_SEEN.format(name=type(self._head).__name__))
        attention_mask, routed = last
        if not self._head.model.wants_router_losses():
            return RouterLosses()
        return self._head.router_losses(
            routed.router_logits,
            real_tokens(attention_mask, labels),
            row_weights,
            mm_token_type_ids=routed.mm_token_type_ids,
            vision_router_logits=routed.vision_router_logits,
            shown_tiles=routed.shown_tiles,
        )

    def wants(self, backbone: PreTrainedModel, inputs: Inputs) -> dict[str, object]:
        """Ask for router logits; not in generation."""
        if inputs.get("past_key_values") is not None:
            return {}
        wanted = {"output_router_logits": self._head.model.wants_router_losses()}
        return wanted | {"use_cache": inputs.get("use_cache", False)}  # a loss needs no cache

    def begin(self, backbone: PreTrainedModel, inputs: Inputs) -> bool:
        """Forget the pass before; pass over generation."""
        self._last = None
        self._attention_mask = inputs.get("attention_mask")
        return inputs.get("past_key_values") is None

    def read(self, layer: RoutedLayer, routing: Routing) -> None:
        """Pass over the banks: under re-entrant checkpointing their logits have no graph."""

    def read_outside(self, layer: RoutedLayer, routing: Routing) -> None:
        """Pass over the banks."""

    def end(self, output: object) -> None:
        """Keep the output."""
        self._last = self._attention_mask, cast(VLMoEModelOutputWithPast, output)

    def remove(self) -> None:
        """Stop listening."""
        self._listener.remove()


def _pretrained(model: nn.Module) -> PreTrainedModel:
    """Return the model of transformers inside of PEFT's wrapper."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            return module
    raise TypeError(f"{type(model).__name__} holds no PreTrainedModel.")


def _coefficient(
    given: float | None, name: str, text: Any, field: str, default: float | None = None
) -> float:
    value = given if given is not None else getattr(text, field, default)
    if value is None:
        raise ValueError(f"{type(text).__name__} has no {field}: give `{name}`.")
    if value < 0:
        raise ValueError(f"`{name}` is {value}; a coefficient is 0 or more.")
    return float(value)


def _any_trains(layers: list[RoutedLayer]) -> bool:
    weights = [weight for layer in layers for weight in layer.router.parameters()]
    return any(w.requires_grad for w in weights) or not weights  # FSDP may have taken them


def _sum(total: torch.Tensor | None, term: torch.Tensor) -> torch.Tensor:
    return term if total is None else total + term.to(total.device)


def _detached(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.detach()

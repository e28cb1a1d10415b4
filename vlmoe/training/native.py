# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""What `VLMoETrainer` does differently for a model of transformers' own classes."""

import logging
from collections.abc import Callable, Collection
from typing import TypedDict

from torch import nn
from transformers import PreTrainedModel, TrainingArguments

from ..data.conversations import parse_row
from ..data.rows import Rows
from ..hub.experts_implementation import suit_experts
from ..routing.constant_weights import warn_of_constant_weights
from ..routing.record import has_experts
from ..routing.routed_layers import is_vlmoe, routed_layers, selection_bias
from .sparse_loss import SparseLoss

logger = logging.getLogger(__name__)

DEFAULT_BALANCE = 0.001
"""Coefficient of the load balancing loss for a family whose config has none: that of Qwen3-MoE."""


class NativeArguments(TypedDict, total=False):
    """Arguments of `Trainer`."""

    compute_loss_func: Callable


def has_moving_bias(model: PreTrainedModel) -> bool:
    """Return whether training moves selection biases: by a VLMoE's config, by another's class."""
    if is_vlmoe(model):
        return bool(getattr(model.config.get_text_config(), "router_bias_update_rate", 0))
    return has_experts(model) and any(
        selection_bias(layer) is not None for layer in routed_layers(model)
    )


def require_images_for_fsdp(model: nn.Module, rows: Rows, arguments: TrainingArguments) -> None:
    """Refuse rows without images where FSDP cuts a vision-language model of transformers.

    Its vision tower does not run on a batch without images. Ranks that run it would wait for the
    weights of those that do not.

    Raises:
        ValueError: a row has no image; it is named.
    """
    if not (arguments.fsdp and arguments.world_size > 1) or is_vlmoe(model):
        return
    if not hasattr(getattr(model, "config", None), "vision_config"):
        return
    for position in range(len(rows)):
        row = parse_row(rows[position], position)
        if not row.images and not row.videos:
            raise ValueError(
                f"{row.name} has no image, and FSDP needs one in each batch of each rank: the "
                f"vision tower of {type(model).__name__} would run on some ranks alone. Leave such "
                "rows out, or train by DistributedDataParallel, without `fsdp`."
            )


def native_arguments(
    model: PreTrainedModel, arguments: TrainingArguments, given: Collection[str]
) -> NativeArguments:
    """Return the arguments of `Trainer` for a model of transformers; none for a VLMoE.

    Experts whose sizes the default implementation refuses are computed by `auto` from here on.

    Args:
        model: that is trained.
        arguments: changed where they would not fit: a batch without images leaves the vision tower
            without gradients, which DistributedDataParallel must look for.
        given: names of arguments of `Trainer` that the caller gives.
    """
    if is_vlmoe(model):
        return {}
    suit_experts(model)
    if hasattr(model.config, "vision_config") and arguments.ddp_find_unused_parameters is False:
        arguments.ddp_find_unused_parameters = None  # Trainer's own choice
    if "compute_loss_func" in given:  # a `SparseLoss` warns by itself
        warn_of_constant_weights(model)
        return {}
    try:
        routed_layers(model)
    except ValueError as error:
        logger.warning("%s It is trained by its own loss.", error)
        return {}
    coefficient = getattr(model.config.get_text_config(), "router_aux_loss_coef", None)
    balance = DEFAULT_BALANCE if coefficient is None else coefficient
    return {"compute_loss_func": SparseLoss(model, balance)}

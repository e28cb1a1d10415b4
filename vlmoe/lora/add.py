# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Put a LoRA adapter on the experts of a model, in one call."""

from collections.abc import Mapping, Sequence
from typing import Any

from peft import PeftModel, get_peft_model
from transformers import PreTrainedModel
from transformers.utils import logging

from ..modeling_vlmoe.modeling_vlmoe_text import VLMoEPreTrainedModel
from .config import expert_lora_config
from .wrappers import enable_routed_lora

logger = logging.get_logger(__name__)


def add_expert_lora(
    model: PreTrainedModel,
    r: int = 8,
    *,
    experts: Sequence[str] | Mapping[str, int] = ("gate_up_proj", "down_proj"),
    attention: bool = False,
    router: bool = False,
    shared_experts: bool = False,
    connector: bool = False,
    dropout: float = 0.0,
    train_experts: Mapping[int, Sequence[int]] | None = None,
    **options: Any,
) -> PeftModel:
    """Adapt a model's experts by LoRA, computed by the routed path; all else is frozen.

    It makes the config (`expert_lora_config`), wraps the model (`peft.get_peft_model`) and switches
    the routed path on (`enable_routed_lora`). The matched parameters are logged.

    Args:
        model: one with fused experts (VLMoE, Qwen3-VL-MoE, Gemma 4 MoE, Mixtral, ...); its
            modules are wrapped in place.
        r: rank.
        experts: which parameters of the experts; a mapping gives each its own rank.
        attention, router, shared_experts, connector: whether to adapt these too.
        dropout: probability of dropping elements of the adapters' inputs in training.
        train_experts: by number of the layer, the experts that train; by default all do.
        options: `lora_alpha`, `rank_scaling` and further fields of `LoraConfig`; see
            `expert_lora_config`.

    Raises:
        ValueError: as `expert_lora_config` and `enable_routed_lora`.
    """
    config = expert_lora_config(
        model,
        r,
        experts=experts,
        attention=attention,
        router=router,
        shared_experts=shared_experts,
        connector=connector,
        **options,
    )
    adapted = get_peft_model(model, config)
    try:
        enable_routed_lora(adapted, dropout=dropout, train_experts=train_experts)
    except ValueError:
        adapted.unload()
        raise
    if not router:
        _log_balance_losses(model)
    return adapted


def _log_balance_losses(model: PreTrainedModel) -> None:
    """Log the effect of frozen routers on the balance losses."""
    if isinstance(model, VLMoEPreTrainedModel):
        logger.info("The routers are frozen: no router losses are computed. The config keeps them.")
    elif getattr(model.config.get_text_config(), "output_router_logits", False):
        logger.warning(
            "The routers are frozen, but %s adds its balance loss wherever `output_router_logits` "
            "is set: it would train the adapters below them. Set it to False in the model's config "
            "(in TRL give router_aux_loss_coef=0), or adapt the routers too by `router=True`.",
            type(model).__name__,
        )
    else:
        logger.info("The routers are frozen, and `output_router_logits` is off: no balance loss.")

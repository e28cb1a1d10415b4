# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""How many parameters a token passes through."""

from typing import Any

from .sparse_moe import VLMoEExperts


def active_parameters(vlmoe: Any) -> dict[str, int]:
    """Parameter counts: `total`, and those one `image_token`, one `text_token` passes through.

    An image token passes through the vision tower (less what its features do not depend on), the
    connector and the decoder, a text token through its row of the embedding and the decoder. Of a
    sparse layer's routed experts k count, whichever experts the modality may use.

    Args:
        vlmoe: a `VLMoEForConditionalGeneration`.
    """
    model, text_config = vlmoe.model, vlmoe.config.text_config
    experts = sum(
        parameter.numel()
        for module in vlmoe.modules()
        if isinstance(module, VLMoEExperts)
        for parameter in module.parameters(recurse=False)
    )
    idle_experts = experts - experts * text_config.num_experts_per_tok // text_config.num_experts
    embedding = model.language_model.embed_tokens.weight.numel()
    decoder = (
        model.language_model.num_parameters()
        - embedding
        - idle_experts
        + vlmoe.lm_head.weight.numel()
    )
    vision = sum(
        parameter.numel()
        for module in (model.vision_tower, model.multi_modal_projector)
        for parameter in module.parameters()
    )
    vision -= sum(
        model.vision_tower.get_parameter(name).numel() for name in model.unused_vision_parameters
    )
    return {
        "total": sum(parameter.numel() for parameter in vlmoe.parameters()),
        "image_token": vision + decoder,
        "text_token": text_config.hidden_size + decoder,
    }

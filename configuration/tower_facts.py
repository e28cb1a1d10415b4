# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""The one table of vision towers: facts that their own configurations do not hold."""

from dataclasses import dataclass

from transformers import PreTrainedConfig
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)

_STANDARD = (IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD)
_IMAGENET = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)


@dataclass(frozen=True)
class TowerFacts:
    """Facts about one type of tower; the defaults hold for every type that is not in the table.

    Attributes:
        prefix_tokens: tokens before the patches, registers aside.
        pixel_statistics: mean and standard deviation of the pixels in pretraining.
        has_fixed_size: refuses images of another size than `image_size`.
        takes_patch_mask: can leave patches out by a `patch_attention_mask`.
        may_have_experts: vision_experts.py has a sparse version.
    """

    prefix_tokens: int = 0
    pixel_statistics: tuple[list[float], list[float]] = _STANDARD
    has_fixed_size: bool = False
    takes_patch_mask: bool = False
    may_have_experts: bool = False


_CLASS_TOKEN = TowerFacts(prefix_tokens=1)
_DINO = TowerFacts(prefix_tokens=1, pixel_statistics=_IMAGENET)
_PATCH_MASK = TowerFacts(takes_patch_mask=True)

TOWERS = {
    "beit": _CLASS_TOKEN,
    "chinese_clip_vision_model": _CLASS_TOKEN,
    "clip_vision_model": TowerFacts(
        prefix_tokens=1,
        pixel_statistics=(OPENAI_CLIP_MEAN, OPENAI_CLIP_STD),
        has_fixed_size=True,
        may_have_experts=True,
    ),
    "data2vec-vision": _CLASS_TOKEN,
    "deit": TowerFacts(prefix_tokens=2),
    "dinov2": _DINO,
    "dinov2_with_registers": _DINO,
    "dinov3_vit": _DINO,
    "idefics3_vision": _PATCH_MASK,
    "internvl_vision": _DINO,
    "mlcd": _CLASS_TOKEN,
    "mlcd_vision_model": _CLASS_TOKEN,
    "siglip_vision_model": TowerFacts(has_fixed_size=True, may_have_experts=True),
    "smolvlm_vision": _PATCH_MASK,
    "vit": _CLASS_TOKEN,
    "vit_msn": _CLASS_TOKEN,
}
TOWERS_WITH_EXPERTS = [name for name, facts in TOWERS.items() if facts.may_have_experts]


def tower_facts(vision_config: PreTrainedConfig) -> TowerFacts:
    """Return the facts about the tower of a vision config."""
    return TOWERS.get(vision_config.model_type, TowerFacts())


def tower_image_size(vision_config: PreTrainedConfig) -> tuple[int, int]:
    """Return height and width of the images that a tower takes.

    Raise `ValueError` if the tower takes any size, so that its configuration names none.
    """
    size = getattr(vision_config, "image_size", None)
    if size is None:
        raise ValueError(
            f"A {vision_config.model_type} tower has no `image_size`; build the processor with "
            "VLMoEProcessor(image_processor, tokenizer, image_seq_len=...)."
        )
    return (size, size) if isinstance(size, int) else (size[0], size[1])

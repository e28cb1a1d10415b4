# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""The options of the commands as arguments of `vlmoe.training.build`."""

from vlmoe.processing.image_sources import DEFAULT_LIMITS, ImageLimits
from vlmoe.processing.processing_vlmoe import VLMoEProcessor
from vlmoe.training import build
from vlmoe.training.build import ModelAndProcessor

from .options import ImageOptions, RuntimeOptions


def model_for_answers(source: str, options: RuntimeOptions) -> ModelAndProcessor:
    """Load a saved model in evaluation mode; see `build.model_for_answers`."""
    return build.model_for_answers(
        source,
        device=options.device,
        dtype=options.dtype,
        attn_implementation=options.attn_implementation,
        experts_implementation=options.experts_implementation,
    )


def image_limits(options: ImageOptions, default: ImageLimits = DEFAULT_LIMITS) -> ImageLimits:
    """Return the limits that the options name, else those of `default`.

    Raises:
        ValueError: a limit is below 1.
    """
    pixels, side = options.max_image_pixels, options.max_image_side
    return ImageLimits(
        default.max_pixels if pixels is None else pixels, default.max_side if side is None else side
    )


def set_image_limits(processor: VLMoEProcessor, options: ImageOptions) -> None:
    """Give the processor the limits of the options, where they name some; raise as they do."""
    limits = image_limits(options, processor.image_limits)
    processor.max_image_pixels, processor.max_image_side = limits.max_pixels, limits.max_side

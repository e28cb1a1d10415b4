# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Groups of options that `vlmoe inspect` passes on together."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ImageOptions:
    """Which images of a dataset are opened."""

    allow_outside_images: bool = False
    allow_image_urls: bool = False
    max_image_pixels: int | None = None
    max_image_side: int | None = None


@dataclass(frozen=True)
class RuntimeOptions:
    """How to run a saved model; None is the default of `vlmoe.training.build`."""

    device: str | None = None
    dtype: str | None = None
    attn_implementation: str | None = None
    experts_implementation: str | None = None


@dataclass(frozen=True)
class InspectOptions:
    """Whose routing to show, and on what."""

    model: str
    dataset: str | None = None
    split: str = "test"
    max_rows: int = 200
    batch_size: int = 32
    image: list[str] | None = None
    max_new_tokens: int = 32
    before: str | None = None
    output_dir: str = "outputs/inspect"

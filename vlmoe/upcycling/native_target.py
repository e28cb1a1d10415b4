# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""The sparse class of the dense model's own family as the target of a conversion."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
)

from ..hub.active_parameters import native_active_parameters
from .exactness import TOLERANCE
from .native_config import native_config
from .native_pairs import Pair
from .native_plan import NativePlan
from .native_sample import IMAGES, drawn_inputs, processed_inputs
from .options import Upcycling
from .origins import Origin
from .target import Processor, Sample, Target

Tensor = torch.Tensor
SILENT_TOLERANCE = 1e-4


@dataclass
class NativeTarget(Target):
    """Convert to the sparse class of the dense model's family; see `Target`.

    Attributes:
        dense_config: the dense model's.
        pair: the pair of text models.
        lost_fields: of the dense configuration, which the sparse one does not have; none changes
            the function.
        drawn_images: how many a sample that was made here shows.
    """

    name = "native"
    config: PreTrainedConfig
    options: Upcycling
    dense_config: PreTrainedConfig
    pair: Pair
    lost_fields: dict[str, Any] = field(default_factory=dict)
    drawn_images: int | None = None

    @classmethod
    def for_dense(cls, dense: PreTrainedConfig, options: Upcycling) -> Self:
        """Find the sparse class and its configuration.

        Raises:
            ValueError: there is no exact version, or it does not have what the options ask for.
        """
        made = native_config(dense, options)
        return cls(made.config, options, dense, made.pair, made.lost)

    @property
    def lost(self) -> dict[str, Any]:
        """Return the dense fields that the sparse class does not have."""
        return self.lost_fields

    @property
    def tolerance(self) -> float:
        """Of the error of the logits in fp32; a norm before a norm changes them by its epsilon."""
        return SILENT_TOLERANCE if self.pair.silent_branch else TOLERANCE

    @property
    def exactness(self) -> str:
        """Return how far the sparse model keeps the dense function."""
        if self.pair.silent_branch:
            return "adds a silent MoE branch, exact in the limit only"
        return self.options.exactness

    @property
    def model_class(self) -> type[PreTrainedModel]:
        """Return the class that plain Auto classes load."""
        with_images = type(self.config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
        mapping = (
            MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING if with_images else MODEL_FOR_CAUSAL_LM_MAPPING
        )
        return mapping[type(self.config)]

    def plan(
        self, skeleton: Mapping[str, Tensor], weights: Mapping[str, Tensor], dtype: torch.dtype
    ) -> dict[str, Origin]:
        """Find the origin of each of the sparse model's tensors; see `NativePlan`."""
        std = self.options.router_std
        std = self.config.get_text_config().initializer_range if std is None else std
        return NativePlan(weights, self.pair, self.options, std, dtype).of(skeleton)

    def sample(self, dense: PreTrainedModel, processor: Processor | None) -> Sample:
        """Encode drawn pictures and fixed texts, or draw pixels and random tokens."""
        takes_images = getattr(self.config, "image_token_id", None) is not None
        self.drawn_images = sum(IMAGES) if takes_images else 0
        if processor is None:
            return drawn_inputs(dense)
        return processed_inputs(processor, dense)

    def inputs(self, model: PreTrainedModel, sample: Sample) -> dict[str, Tensor]:
        """Return the sample: dense and sparse class take the same."""
        return dict(sample)

    def sample_size(self, sample: Sample) -> dict[str, int]:
        """Count rows, images (in a sample that was given, runs of image tokens), and tokens."""
        ids, real = sample["input_ids"], sample["attention_mask"].bool()
        images = self.drawn_images
        if images is None:
            is_image = (ids == getattr(self.config, "image_token_id", None)) & real
            images = int(is_image[:, 0].sum() + (is_image[:, 1:] & ~is_image[:, :-1]).sum())
        return {"rows": len(ids), "images": images, "tokens": int(real.sum())}

    def dense_parameters(
        self, dense: PreTrainedModel, weights: Mapping[str, Tensor]
    ) -> dict[str, int]:
        """Count the dense model's parameters."""
        return native_active_parameters(dense)

    def sparse_parameters(self, model: PreTrainedModel) -> dict[str, int]:
        """Count the parameters; of a bank, those of the experts that a token is routed to."""
        return native_active_parameters(model)

# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""What a conversion asks of the class that it converts to.

Two targets implement it: vlmoe_target.py for our class, native_target.py for the sparse class of
the dense model's own family.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..data.native_chat import Processor
from .exactness import TOLERANCE
from .options import Upcycling
from .origins import Origin

Tensor = torch.Tensor
Sample = Mapping[str, Tensor]
ProcessorFor = Callable[[PreTrainedConfig], Processor]


class Target(ABC):
    """The sparse side of a conversion.

    Attributes:
        name: "vlmoe" or "native".
        config: of the sparse model.
        options: of the conversion.
    """

    name: ClassVar[str]
    config: PreTrainedConfig
    options: Upcycling

    @property
    @abstractmethod
    def model_class(self) -> type[PreTrainedModel]:
        """Return the class of the sparse model."""

    @property
    def tolerance(self) -> float:
        """Of the error of the logits in fp32."""
        return TOLERANCE

    @property
    def exactness(self) -> str:
        """Return how far the sparse model keeps the dense function."""
        return self.options.exactness

    @abstractmethod
    def plan(
        self, skeleton: Mapping[str, Tensor], weights: Mapping[str, Tensor], dtype: torch.dtype
    ) -> dict[str, Origin]:
        """Return the origin of every tensor of the sparse model.

        Args:
            skeleton: the sparse model's parameters and saved buffers; their values are not read.
            weights: the dense model's, under its own names; their values are not read.
            dtype: of tensors that are new.

        Raises:
            ValueError: a tensor of the dense model has no place, or one of the sparse model no
                origin.
        """

    @abstractmethod
    def sample(self, dense: PreTrainedModel, processor: Processor | None) -> Sample:
        """Make the inputs on which both models are compared, with the processor if there is one."""

    @abstractmethod
    def inputs(self, model: PreTrainedModel, sample: Sample) -> dict[str, Tensor]:
        """Return the sample as the class of the dense or the sparse model takes it."""

    @abstractmethod
    def sample_size(self, sample: Sample) -> dict[str, int]:
        """Count rows, images and tokens."""

    @abstractmethod
    def dense_parameters(
        self, dense: PreTrainedModel, weights: Mapping[str, Tensor]
    ) -> dict[str, int]:
        """Count the dense model's parameters, as `sparse_parameters` does."""

    @abstractmethod
    def sparse_parameters(self, model: PreTrainedModel) -> dict[str, int]:
        """Count the parameters: `total`, and those that a token uses."""

    @property
    def lost(self) -> dict[str, Any]:
        """Return the dense configuration's fields that the sparse one does not have."""
        return {}

    def frozen(self, model: PreTrainedModel) -> list[str]:
        """Name the parameters that no output depends on."""
        return []

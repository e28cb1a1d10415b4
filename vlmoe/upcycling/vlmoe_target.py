# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""`VLMoEForConditionalGeneration` as the target of a conversion."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from ..configuration.configuration_vlmoe import VLMoEConfig
from ..hub.active_parameters import active_parameters
from ..modeling_vlmoe.modeling_vlmoe import VLMoEForConditionalGeneration
from ..modeling_vlmoe.vision_tower import unused_vision_parameters
from .exactness import inputs_for
from .options import Upcycling
from .origins import Origin
from .sample import drawn_sample, prepared_sample
from .target import Processor, Sample, Target
from .weight_plan import DECODER, EMBEDDING, HEAD, dense_pieces, plan_weights

Tensor = torch.Tensor
CONNECTOR, TOWER = "model.multi_modal_projector.", "model.vision_tower."


@dataclass
class VLMoETarget(Target):
    """Convert to VLMoE; see `Target`.

    Attributes:
        new_parts: as in `plan_weights`; if there are some, the models are compared on text alone.
    """

    name = "vlmoe"
    config: VLMoEConfig
    options: Upcycling
    new_parts: tuple[str, ...] = ()

    @property
    def model_class(self) -> type[PreTrainedModel]:
        """Return our class."""
        return VLMoEForConditionalGeneration

    def plan(
        self, skeleton: Mapping[str, Tensor], weights: Mapping[str, Tensor], dtype: torch.dtype
    ) -> dict[str, Origin]:
        """Find the origin of each of the sparse model's tensors; see `plan_weights`."""
        return plan_weights(skeleton, weights, self.config, self.options, dtype, self.new_parts)

    def sample(self, dense: PreTrainedModel, processor: Processor | None) -> Sample:
        """Encode drawn pictures and fixed texts, or draw pixels and random tokens."""
        with_images = not self.new_parts
        if processor is not None:
            return prepared_sample(processor, with_images=with_images)
        return drawn_sample(dense, self.config, with_images=with_images)

    def inputs(self, model: PreTrainedModel, sample: Sample) -> dict[str, Tensor]:
        """Return the sample as VLMoE or the dense family takes it."""
        return inputs_for(model, sample)

    def sample_size(self, sample: Sample) -> dict[str, int]:
        """Count rows, tiles that are no padding, and tokens."""
        tiles, real = sample.get("pixel_attention_mask"), sample["attention_mask"]
        shown = 0 if tiles is None else int(tiles.flatten(0, 1).flatten(1).any(-1).sum())
        return {"rows": len(real), "images": shown, "tokens": int(real.sum())}

    def dense_parameters(
        self, dense: PreTrainedModel, weights: Mapping[str, Tensor]
    ) -> dict[str, int]:
        """Count the parameters of the dense model, as `active_parameters` does."""
        config, pieces = self.config, dense_pieces(weights, self.config)
        sizes = {name: piece.of(weights).numel() for name, piece in pieces.items()}
        if config.tie_word_embeddings:
            sizes.pop(HEAD, None)
        vision = sum(n for name, n in sizes.items() if name.startswith((TOWER, CONNECTOR)))
        frozen = sum(sizes.get(f"{TOWER}{name}", 0) for name in unused_vision_parameters(config))
        decoder = sum(
            n for name, n in sizes.items() if name.startswith(DECODER) and name != EMBEDDING
        ) + sizes.get(HEAD, sizes[EMBEDDING])
        return {
            "total": sum(sizes.values()),
            "image_token": vision - frozen + decoder,
            "text_token": config.text_config.hidden_size + decoder,
        }

    def sparse_parameters(self, model: PreTrainedModel) -> dict[str, int]:
        """Count as `active_parameters` does."""
        return active_parameters(model)

    def frozen(self, model: PreTrainedModel) -> list[str]:
        """Name the vision parameters that the chosen features do not pass through."""
        return list(model.model.unused_vision_parameters)

# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Generation with images: the prompt is checked once, generated tokens are not.

Image tokens are suppressed, so that none is generated. In a chat a cache may be kept from turn to
turn: its tokens have seen their images, so of a whole chat's images only those of new tokens count.

Shapes: batch, length, hidden.
"""

import copy
from typing import Any

import torch
from transformers.generation import GenerationMixin
from transformers.generation.continuous_batching.requests import GenerationOutput
from transformers.generation.utils import GenerateOutput

from ..configuration.configuration_vlmoe import VLMoEConfig
from .image_tokens import check_image_tokens

Inputs = dict[str, Any]
_IMAGE_INPUTS = ("pixel_values", "pixel_attention_mask", "image_index")


class ImageGenerationMixin(GenerationMixin):
    """`generate` of a model that writes images over placeholders."""

    config: VLMoEConfig
    model: Any  # a VLMoEModel

    def generate(
        self, inputs: torch.Tensor | None = None, *args: Any, **kwargs: Any
    ) -> GenerateOutput | torch.LongTensor:
        """Generate as transformers does; with a kept cache the chat may come with all its images.

        Raises:
            ValueError: the images are not those of the prompt's image tokens.
        """
        return super().generate(inputs, *args, **self._images_of_new_tokens(inputs, kwargs))

    @torch.no_grad()
    def _images_of_new_tokens(self, inputs: torch.Tensor | None, kwargs: Inputs) -> Inputs:
        """Return `kwargs` of `generate`, with a kept cache reduced to images of new tokens."""
        embeds = kwargs.get("inputs_embeds")
        ids = None if embeds is not None else kwargs.get("input_ids", inputs)
        if ids is None and embeds is None:
            return kwargs  # generation starts from a token of the config
        types = kwargs.get("mm_token_type_ids") if ids is None else None
        is_image = self.model.is_image_token(ids, embeds, types)  # (batch, length)
        cache = kwargs.get("past_key_values")
        past = 0 if cache is None else int(cache.get_seq_length())
        # A longer mask means that only the new tokens are given.
        mask = kwargs.get("attention_mask")
        new = is_image.clone()
        if past and (mask is None or mask.shape[-1] == is_image.shape[1]):
            new[:, :past] = False
        encoded = (kwargs.get("mm_encoder_outputs") or {}).get("image")
        if encoded is None and kwargs.get("pixel_values") is None:
            check_image_tokens(new, 0)
            return kwargs
        if not past:
            return kwargs  # counted in the forward pass
        kwargs = dict(kwargs)
        images = {name: kwargs.pop(name, None) for name in _IMAGE_INPUTS}
        if encoded is None:
            encoded = self.model.get_image_features(**images, return_dict=True)
        features = encoded.pooler_output.flatten(0, 1)  # (image tokens, hidden)
        if len(features) == is_image.sum():
            features = features[new[is_image].to(features.device)]
        check_image_tokens(new, len(features), cache)
        encoded = copy.copy(encoded)
        encoded.pooler_output = features.unsqueeze(0)
        return kwargs | {"mm_encoder_outputs": {"image": encoded}}

    def adjust_generation_fn(self, *args: object, **kwargs: object) -> None:
        """Load the generation config as transformers does, and suppress image tokens in it."""
        super().adjust_generation_fn(*args, **kwargs)
        self.suppress_image_tokens()

    def suppress_image_tokens(self) -> None:
        """Never generate an image token, unless the generation config chooses what to suppress.

        No image would follow, and every later call on the text would fail.
        """
        generation = self.generation_config
        if generation is not None and generation.suppress_tokens is None:
            generation.suppress_tokens = [self.config.image_token_id]

    # transformers asks for the name `inputs_embeds`
    def prepare_inputs_for_generation(
        self, input_ids: torch.Tensor, inputs_embeds: torch.Tensor | None = None, **kwargs: Any
    ) -> Inputs:
        """Prepare as transformers does; generated tokens are not searched for image tokens.

        Token types are dropped where there are ids: an assistant model gets those of the prompt for
        the prompt and the tokens after it.
        """
        kwargs["inputs_embeds"] = inputs_embeds
        prepared = super().prepare_inputs_for_generation(input_ids, **kwargs)
        if prepared.get("input_ids") is not None:
            prepared.pop("mm_token_type_ids", None)
        if not kwargs.get("is_first_iteration"):
            prepared.setdefault("mm_encoder_outputs", {})
        return prepared

    def generate_batch(
        self, inputs: list[list[int]], *args: object, **kwargs: object
    ) -> dict[str, GenerationOutput]:
        """Generate by continuous batching, which passes on token ids and no images.

        Raises:
            ValueError: a prompt holds image tokens, or images are given.
        """
        with_images = [i for i, ids in enumerate(inputs) if self.config.image_token_id in ids]
        if with_images or kwargs.keys() & {"pixel_values", "mm_encoder_outputs"}:
            raise ValueError(
                "Continuous batching takes token ids only: prompts with images "
                f"({with_images}) would be answered without looking at them. Use generate()."
            )
        return super().generate_batch(inputs, *args, **kwargs)

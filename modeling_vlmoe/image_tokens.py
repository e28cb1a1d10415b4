# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Where the image tokens of a batch are, and whether the images given are theirs.

- They are found in `input_ids`; without ids by the image token's embedding, and by
  `mm_token_type_ids` where noise (NEFTune) hides it.
- Image tokens without images are refused, as images without image tokens are: the decoder would
  silently read the placeholder's embedding. A token decoded with a cache is text.

Shapes: batch, length, hidden.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import Cache
from transformers.utils import torch_compilable_check
from transformers.utils.import_utils import is_torchdynamo_compiling

from ..configuration.configuration_vlmoe import VLMoEConfig
from ..configuration.configuration_vlmoe_text import Modality


class ImageTokensMixin:
    """The methods of `VLMoEModel` that look for image tokens."""

    config: VLMoEConfig
    get_input_embeddings: Callable[[], nn.Module]

    def is_image_token(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        mm_token_type_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(batch, length): True for image tokens.

        Token types may lack the virtual tokens at a row's start, which are text.
        """
        if input_ids is not None:
            return input_ids == self.config.image_token_id
        assert inputs_embeds is not None
        # A row of one token: hooks, such as NEFTune's, expect rows. Not `weight[...]`, which may be
        # sharded or offloaded.
        token = torch.full((1, 1), self.config.image_token_id, device=inputs_embeds.device)
        found = (inputs_embeds == self.get_input_embeddings()(token)).all(-1)
        if mm_token_type_ids is None:
            return found
        missing = inputs_embeds.shape[1] - mm_token_type_ids.shape[1]
        return found | (F.pad(mm_token_type_ids, (missing, 0)) == Modality.image.value)

    def token_types(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        mm_token_type_ids: torch.Tensor | None = None,
        are_merged: bool = False,
    ) -> torch.Tensor | None:
        """(batch, length): 1 for image tokens, 0 for text; None if nothing depends on it.

        Raise `ValueError` where routing depends on it and cannot be known: `are_merged` says that
        the embeddings hold image features already, as vLLM's do.
        """
        text = self.config.text_config
        if not text.needs_token_types:
            return None
        if are_merged and input_ids is None and mm_token_type_ids is None and text.has_modalities:
            raise ValueError(
                "This model routes image tokens in their own way (`modality_experts`, "
                "`router_modality_bias`), and vLLM does not say which tokens are of images: its "
                "answers would be wrong. Serve it with transformers."
            )
        return self.is_image_token(input_ids, inputs_embeds, mm_token_type_ids).long()

    def get_placeholder_mask(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor,
        image_features: torch.Tensor,
        mm_token_type_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
    ) -> torch.Tensor:
        """(batch, length, 1): True where an image token goes.

        Raise `ValueError` unless there are as many as `image_features`, (image tokens, hidden).
        """
        mask = self.is_image_token(input_ids, inputs_embeds, mm_token_type_ids)
        # While compiling, padding tiles are still among the features.
        if not is_torchdynamo_compiling():
            by_embedding = input_ids is None and mm_token_type_ids is None
            check_image_tokens(mask, len(image_features), past_key_values, by_embedding)
        return mask.unsqueeze(-1)

    def check_no_image_tokens(
        self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor
    ) -> None:
        """Refuse image tokens where no images are given (`ValueError`).

        Token types do not count here: embeddings may hold the images already. A batch of text then
        waits for its device once, as a batch with images does.
        """
        has_values = not (inputs_embeds.is_meta or is_torchdynamo_compiling())
        if inputs_embeds.shape[1] > 1 and has_values:
            check_image_tokens(self.is_image_token(input_ids, inputs_embeds), 0)


def check_image_tokens(
    is_image: torch.Tensor, features: int, cache: Cache | None = None, by_embedding: bool = False
) -> None:
    """Raise `ValueError` unless there are `features` image tokens.

    `is_image` (batch, length) is True for those of this call, `cache` is what earlier calls left;
    `by_embedding`: they were found by comparing embeddings.
    """
    tokens = is_image.sum()
    torch_compilable_check(
        tokens == features,
        lambda: (
            "Image features and image tokens do not match: the text has "
            f"{int(tokens)} image tokens ({is_image.sum(-1).tolist()} by row), the images give "
            f"{features} features. {_remedy(features, cache, by_embedding)}"
        ),
    )


def _remedy(features: int, cache: Cache | None, by_embedding: bool) -> str:
    past = 0 if cache is None else int(cache.get_seq_length())
    if features == 0:
        return "Give `pixel_values` too, as the processor makes them, or leave image tokens out."
    if past:
        return (
            f"The cache holds {past} tokens already, with their images: give the images of the new "
            "tokens only, or, to `generate`, all tokens and all images."
        )
    if by_embedding:
        return (
            "In `inputs_embeds` they were found by the image token's embedding, which noise "
            "(NEFTune) hides: give `mm_token_type_ids` or `input_ids`."
        )
    return "Make both with the processor, and do not truncate its output."

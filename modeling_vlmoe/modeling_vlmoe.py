# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""VLMoE, from picture and text to loss. Read this file first, top to bottom.

    pixel_values -> vision tower -> connector -> image tokens
                                                     |  written over the <image> placeholders
    input_ids -> embeddings -------------------------+-> decoder (experts) -> logits
    labels -----------------------------------------------> cross-entropy + router losses

- The tower is any vision encoder of `AutoModel` (connector.py selects its features), the decoder is
  modeling_vlmoe_text.py, its experts are in sparse_moe.py and router.py, their losses in
  router_losses.py.
- Experts dispatch through `@use_experts_implementation` (transformers looks for these words in this
  file).

Shapes: batch, length, hidden, experts; tiles = images, or crops that the tower sees one by one.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import (
    BaseModelOutputWithPooling,
    ModelOutput,
    MoeModelOutputWithPast,
)
from transformers.modeling_utils import slice_logits_to_keep
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, logging, torch_compilable_check
from transformers.utils.import_utils import is_torchdynamo_compiling

from ..configuration.configuration_vlmoe import VLMoEConfig
from .active_parameters import active_parameters
from .connector import (
    VLMoEConnector,
    blank_image,
    make_vision_tower,
    unused_vision_modules,
    unused_vision_parameters,
    vision_features,
)
from .modeling_vlmoe_text import VLMoEPreTrainedModel, VLMoETextModel
from .router_losses import RouterLosses, router_losses

logger = logging.get_logger(__name__)


@dataclass
class VLMoEModelOutputWithPast(MoeModelOutputWithPast):
    """Output of `VLMoEModel`; `image_hidden_states` is (image tokens of the batch, hidden)."""

    image_hidden_states: torch.Tensor | None = None


@dataclass
class VLMoECausalLMOutputWithPast(ModelOutput):
    """Output of `VLMoEForConditionalGeneration`.

    Attributes:
        loss: cross-entropy plus the router losses times their coefficients, a scalar; only with
            `labels`.
        aux_loss, z_loss: load balancing loss and router z-loss before their coefficients, scalars;
            only with `labels` and a coefficient.
        entropy_loss: the entropy terms of the modalities, with their coefficients, a scalar; only
            with `labels` and a coefficient.
        logits: (batch, length, vocab).
        past_key_values: the cache, if one is in use.
        hidden_states: (batch, length, hidden) for the embeddings and each layer, if asked for.
        attentions: (batch, heads, length, length) for each layer, if asked for.
        router_logits: (batch * length, experts), fp32, for each sparse layer, if asked for.
        image_hidden_states: (image tokens of the batch, hidden).
    """

    loss: torch.Tensor | None = None
    aux_loss: torch.Tensor | None = None
    z_loss: torch.Tensor | None = None
    entropy_loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    router_logits: tuple[torch.Tensor, ...] | None = None
    image_hidden_states: torch.Tensor | None = None


def _select_real(rows: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Drop the rows that are padding; while compiling, where shapes are static, move them last."""
    if is_torchdynamo_compiling():
        return rows[torch.argsort(~real, stable=True)]
    return rows[real]


class VLMoEModel(VLMoEPreTrainedModel):
    """Vision tower, connector and decoder, without the language modelling head."""

    def __init__(self, config: VLMoEConfig):
        super().__init__(config)
        self.vision_tower = make_vision_tower(config)
        self.multi_modal_projector = VLMoEConnector(config)
        self.language_model = VLMoETextModel(config.text_config)
        self.unused_vision_parameters = unused_vision_parameters(config)
        if self.unused_vision_parameters:
            self.freeze_unused_vision_parameters()
            modules = unused_vision_modules(self.vision_tower, self.unused_vision_parameters)
            logger.warning(
                "Frozen, as the chosen vision features do not pass through them: "
                f"{', '.join(modules)}"
            )
        self.post_init()

    def freeze_unused_vision_parameters(self) -> None:
        """Freeze what the chosen vision features do not depend on; loading needs it once more."""
        for name in self.unused_vision_parameters:
            self.vision_tower.get_parameter(name).requires_grad_(False)

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        pixel_attention_mask: torch.Tensor | None = None,
        image_index: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """Encode images and project them to image tokens.

        Args:
            pixel_values: (batch, tiles, 3, height, width), padded, or (tiles, 3, height, width),
                tiles in row order.
            pixel_attention_mask: (batch, tiles, height, width), 1 for real pixels; a tile without
                any is padding.
            image_index: (batch, tiles of a row): which tiles of flat `pixel_values` each row shows,
                in order; -1 is padding. Rows that show the same image share one encoding of it.

        Returns:
            `pooler_output`: (tiles shown, image tokens, hidden), in row order. One tensor, as
                a list would tie an exported graph to a number of tiles.
            `last_hidden_state`, `hidden_states`, `attentions`: those of the tower, of real tiles.
        """
        tiles = (
            pixel_values.flatten(0, 1) if pixel_values.dim() == 5 else pixel_values
        )  # (tiles, 3, height, width)
        if pixel_attention_mask is not None:
            tiles = _select_real(tiles, pixel_attention_mask.flatten(0, 1).flatten(1).any(-1))
        if tiles.shape[0] == 0:  # rows without images, cut from a batch with images
            return BaseModelOutputWithPooling(
                pooler_output=tiles.new_empty(0, 0, self.config.text_config.hidden_size)
            )
        features, outputs = vision_features(
            self.vision_tower, tiles.to(self.vision_tower.dtype), self.config, **kwargs
        )
        features = self.multi_modal_projector(features)  # (tiles, image tokens, hidden)
        if image_index is not None:
            shown = image_index.flatten()
            features = features[_select_real(shown, shown >= 0)]
        return BaseModelOutputWithPooling(
            last_hidden_state=outputs.last_hidden_state,
            pooler_output=features,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def get_placeholder_mask(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor,
        image_features: torch.Tensor,
    ) -> torch.Tensor:
        """(batch, length, 1): True where an image token goes.

        Raises:
            ValueError: the number of placeholders is not the number of image features (image
                tokens, hidden).
        """
        mask = self._is_image_token(input_ids, inputs_embeds)
        if (
            not is_torchdynamo_compiling()
        ):  # while compiling, padding tiles are still among the features
            tokens, features = mask.sum(), image_features.shape[0]
            torch_compilable_check(
                tokens == features,
                lambda: (
                    "Image features and image tokens do not match: the text has "
                    f"{tokens} image tokens ({mask.sum(-1).tolist()} by row), the images give "
                    f"{features} features. Make both with the processor, "
                    "and do not truncate its output."
                ),
            )
        return mask.unsqueeze(-1)

    def _is_image_token(
        self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor
    ) -> torch.Tensor:
        """(batch, length): True for the image token, or for its embedding."""
        if input_ids is not None:
            return input_ids == self.config.image_token_id
        token = torch.full(
            (), self.config.image_token_id, dtype=torch.long, device=inputs_embeds.device
        )
        return (inputs_embeds == self.get_input_embeddings()(token)).all(-1)

    def token_types(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: Any,  # a tensor where there are no ids
        mm_token_type_ids: torch.Tensor | None = None,
    ) -> torch.Tensor | None:
        """(batch, length): 1 for image tokens, 0 for text; None if nothing depends on it.

        Taken from `input_ids`, which cannot be wrong; without them from `mm_token_type_ids`, or
        else found by the image token's embedding. A token decoded with a cache is text.
        """
        if not self.config.text_config.needs_token_types:
            return None
        if input_ids is None and mm_token_type_ids is not None:
            return mm_token_type_ids
        return self._is_image_token(input_ids, inputs_embeds).long()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        pixel_attention_mask: torch.Tensor | None = None,
        image_index: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        router_losses_follow: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> VLMoEModelOutputWithPast:
        """Image and text to hidden states (batch, length, hidden).

        For the image inputs see `get_image_features`.

        `mm_token_type_ids` (batch, length): see `token_types`. `mm_encoder_outputs={"image": ...}`
        holds image features that were computed before. `router_losses_follow`: the caller adds the
        router losses to its loss; training without them is warned of once.
        """
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        encoded = (mm_encoder_outputs or {}).get("image")
        if pixel_values is not None:
            if encoded is not None:
                raise ValueError(
                    "You cannot specify both pixel_values and mm_encoder_outputs['image']"
                )
            encoded = self.get_image_features(
                pixel_values, pixel_attention_mask, image_index, return_dict=True
            )
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        mm_token_type_ids = self.token_types(input_ids, inputs_embeds, mm_token_type_ids)

        image_features = None
        if encoded is not None:
            image_features = encoded.pooler_output.flatten(0, 1).to(
                inputs_embeds.device, inputs_embeds.dtype
            )
            mask = self.get_placeholder_mask(input_ids, inputs_embeds, image_features)
            inputs_embeds = inputs_embeds.masked_scatter(mask, image_features)
        learning = self.training and torch.is_grad_enabled()
        if learning and not router_losses_follow:
            self._warn_of_missing_router_losses()
        if learning and (image_features is None or not len(image_features)):
            inputs_embeds = inputs_embeds + self._dummy_image_term().to(
                inputs_embeds.device, inputs_embeds.dtype
            )

        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            mm_token_type_ids=mm_token_type_ids,
            **kwargs,
        )
        return VLMoEModelOutputWithPast(**outputs, image_hidden_states=image_features)

    def _warn_of_missing_router_losses(self) -> None:
        """Say once that a foreign loss has no router losses; nothing is said while compiling."""
        text_config = self.config.text_config
        if text_config.has_router_losses and not is_torchdynamo_compiling():
            logger.warning_once(
                "Training without VLMoE's router losses, in spite of router_aux_loss_coef="
                f"{text_config.router_aux_loss_coef} and router_z_loss_coef="
                f"{text_config.router_z_loss_coef}: only the loss of "
                "VLMoEForConditionalGeneration, called with `labels`, has them. The loss really "
                "used is the caller's: with `label_smoothing_factor` (for which Trainer does not "
                "shift the labels of image-text models) or `compute_loss_func` that function "
                "alone; in TRL's SFTTrainer and DPOTrainer their loss and, times "
                "router_aux_loss_coef, Mixtral's balance loss, pooled over layers and rows, no "
                "z-loss. Use vlmoe.training.trl_trainers, or set their coefficients to 0."
            )

    def _dummy_image_term(self) -> torch.Tensor:
        """Zero, by way of the tower and the connector: without images a rank does the same work.

        Each vision parameter gets a zero gradient, so that DistributedDataParallel and FSDP do not
        wait for it.
        """
        image = blank_image(self.config, self.vision_tower)
        return self.get_image_features(image, return_dict=True).pooler_output.mean() * 0.0


class VLMoEForConditionalGeneration(VLMoEPreTrainedModel, GenerationMixin):
    """The whole model, with language modelling head and losses."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012

    def __init__(self, config: VLMoEConfig):
        super().__init__(config)
        self.model = VLMoEModel(config)
        self.lm_head = nn.Linear(
            config.text_config.hidden_size, config.text_config.vocab_size, bias=False
        )
        self.post_init()

    def get_image_features(
        self, pixel_values: torch.Tensor, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """See `VLMoEModel.get_image_features`."""
        return self.model.get_image_features(pixel_values, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        pixel_attention_mask: torch.Tensor | None = None,
        image_index: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        mm_token_type_ids: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        output_router_logits: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> VLMoECausalLMOutputWithPast:
        """Image and text to logits and, with `labels`, the loss.

        Args:
            labels: (batch, length) token ids; -100 where there is no loss.
            logits_to_keep: compute logits for the last that many positions only (0: all), or at the
                given indices.
            num_items_in_batch: label tokens of the whole optimizer step, as Trainer counts them; by
                default those of `labels`.

        For the other arguments see `VLMoEModel`. A batch without any label token has loss 0.
        """
        text_config = self.config.text_config
        if output_router_logits is None:
            output_router_logits = text_config.output_router_logits
        with_router_losses = labels is not None and text_config.has_router_losses
        if labels is not None:
            kwargs.setdefault("use_cache", False)  # a loss needs no cache
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            pixel_attention_mask=pixel_attention_mask,
            image_index=image_index,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            mm_token_type_ids=mm_token_type_ids,
            mm_encoder_outputs=mm_encoder_outputs,
            output_router_logits=output_router_logits or with_router_losses,
            router_losses_follow=with_router_losses,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        if text_config.logits_scaling != 1:
            logits = logits / text_config.logits_scaling

        loss, losses = None, RouterLosses()
        if labels is not None:
            loss, losses = self._losses(
                logits,
                labels,
                attention_mask,
                outputs.router_logits if with_router_losses else None,
                self.model.token_types(input_ids, inputs_embeds, mm_token_type_ids),
                num_items_in_batch,
                **kwargs,
            )
        return VLMoECausalLMOutputWithPast(
            loss=loss,
            aux_loss=losses.aux_loss,
            z_loss=losses.z_loss,
            entropy_loss=losses.entropy_loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits if output_router_logits else None,
            image_hidden_states=outputs.image_hidden_states,
        )

    def _losses(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor,
        attention_mask: torch.Tensor | None,
        router_logits: tuple[torch.Tensor, ...] | None,
        mm_token_type_ids: torch.Tensor | None,
        num_items_in_batch: torch.Tensor | int | None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, RouterLosses]:
        """The total loss, and the router losses in it."""
        labels_per_row = (labels[..., 1:] != -100).sum(-1)  # (batch,)
        if num_items_in_batch is None:
            num_items_in_batch = labels_per_row.sum()
        num_items = torch.as_tensor(num_items_in_batch, device=logits.device).clamp(min=1)
        loss = self.loss_function(
            logits,
            labels,
            vocab_size=self.config.text_config.vocab_size,
            num_items_in_batch=num_items,
            **kwargs,
        )
        if not router_logits:
            return loss, RouterLosses()
        token_mask = torch.ones_like(labels, dtype=torch.bool)
        if isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2:
            token_mask = attention_mask[:, -labels.shape[1] :].bool()
        row_weights = labels_per_row.to(num_items.device) / num_items
        losses = self.router_losses(router_logits, token_mask, row_weights, mm_token_type_ids)
        return loss + losses.total.to(loss.device), losses

    def router_losses(
        self,
        router_logits: tuple[torch.Tensor, ...],
        token_mask: torch.Tensor,
        row_weights: torch.Tensor,
        mm_token_type_ids: torch.Tensor | None = None,
    ) -> RouterLosses:
        """The router losses that the config asks for; see router_losses.py for the arguments."""
        training = self.training and torch.is_grad_enabled()
        return router_losses(
            self.config.text_config,
            router_logits,
            token_mask,
            row_weights,
            mm_token_type_ids,
            training,
        )

    def generate_batch(self, inputs: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        """Continuous batching as in transformers, which hands on token ids and no images.

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

    def active_parameters(self) -> dict[str, int]:
        """See active_parameters.py."""
        return active_parameters(self)


__all__ = ["VLMoEForConditionalGeneration", "VLMoEModel"]

# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""VLMoE, from picture and text to loss. Read this file first, top to bottom.

    pixel_values -> vision tower -> connector -> image tokens
                                                     |  written over the <image> placeholders
    input_ids -> embeddings -------------------------+-> decoder (experts) -> logits
    labels -----------------------------------------------> cross-entropy + router losses

- The tower is any vision encoder of `AutoModel` (connector.py selects its features), the decoder is
  modeling_vlmoe_text.py, its experts are in sparse_moe.py and router.py, their losses in
  router_losses.py.
- Tower and connector may have experts, too: vision_experts.py, and tile_routing.py for what
  follows from them in training.
- Experts dispatch through `@use_experts_implementation` (transformers looks for these words in this
  file).

Shapes: batch, length, hidden, experts; tiles = images, or crops that the tower sees one by one.
"""

from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import slice_logits_to_keep
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, logging
from transformers.utils.import_utils import is_torchdynamo_compiling

from ..configuration.configuration_vlmoe import VLMoEConfig
from .active_parameters import active_parameters
from .connector import (
    TOWERS_WITH_PATCH_MASK,
    VLMoEConnector,
    blank_image,
    encode_tiles,
    expected_pixels,
    make_vision_tower,
    patch_mask,
    unused_vision_modules,
    unused_vision_parameters,
)
from .from_dense import FromDenseMixin
from .image_generation import ImageGenerationMixin
from .image_tokens import ImageTokensMixin
from .input_checks import check_labels, check_pixels, check_rows_of_images, check_token_inputs
from .model_outputs import (
    VLMoECausalLMOutputWithPast,
    VLMoEImageFeatures,
    VLMoEModelOutputWithPast,
)
from .modeling_vlmoe_text import VLMoEPreTrainedModel, VLMoETextModel
from .router_losses import RouterLosses, router_losses, sum_of_losses
from .vision_experts import sparse_vision_blocks
from .vision_router_losses import shown_tiles, take_vision_notes, vision_router_losses

logger = logging.get_logger(__name__)


def _select_real(rows: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Drop the rows that are padding; while compiling, where shapes are static, move them last."""
    if is_torchdynamo_compiling():
        return rows[torch.argsort(~real, stable=True)]
    return rows[real]


class VLMoEModel(ImageTokensMixin, VLMoEPreTrainedModel):
    """Vision tower, connector and decoder, without the language modelling head."""

    _keys_to_ignore_on_load_unexpected = [r"^lm_head\."]  # noqa: RUF012 - of the whole model

    def __init__(self, config: VLMoEConfig):
        super().__init__(config)
        self.vision_tower = make_vision_tower(config)
        self.multi_modal_projector = VLMoEConnector(config)
        self.language_model = VLMoETextModel(config.text_config)
        self.unused_vision_parameters = unused_vision_parameters(config)
        if self.unused_vision_parameters:
            self.freeze_unused_vision_parameters()
            modules = unused_vision_modules(self.vision_tower, self.unused_vision_parameters)
            logger.warning_once(
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
    ) -> VLMoEImageFeatures:
        """Encode images and project them to image tokens.

        Args:
            pixel_values: (batch, tiles, 3, height, width), padded, or (tiles, 3, height, width),
                tiles in row order.
            pixel_attention_mask: (batch, tiles, height, width), 1 for real pixels; a tile without
                any is padding. Within a tile it counts for towers that can leave patches out:
                Idefics3's and SmolVLM's.
            image_index: (batch, tiles of a row): which tiles of flat `pixel_values` each row shows,
                in order; -1 is padding. Rows that show the same image share one encoding of it.

        See `VLMoEImageFeatures` for what is returned.
        """
        if not is_torchdynamo_compiling():
            self.config.check_routing()
        expected = expected_pixels(self.config, kwargs.get("interpolate_pos_encoding", False))
        check_pixels(pixel_values, pixel_attention_mask, image_index, expected)
        tiles = (
            pixel_values.flatten(0, 1) if pixel_values.dim() == 5 else pixel_values
        )  # (tiles, 3, height, width)
        if pixel_attention_mask is not None:
            pixel_mask = pixel_attention_mask.flatten(0, 1)  # (tiles, height, width)
            real = pixel_mask.flatten(1).any(-1)
            tiles = _select_real(tiles, real)
            vision = self.config.vision_config
            if vision.model_type in TOWERS_WITH_PATCH_MASK:
                pixel_mask = _select_real(pixel_mask, real)
                kwargs |= {"patch_attention_mask": patch_mask(pixel_mask, vision.patch_size)}
        if tiles.shape[0] == 0:  # rows without images, cut from a batch with images
            return VLMoEImageFeatures(
                pooler_output=tiles.new_empty(0, 0, self.config.text_config.hidden_size)
            )
        encoded = encode_tiles(
            self.vision_tower, self.multi_modal_projector, tiles, self.config, **kwargs
        )
        if image_index is not None:
            shown = image_index.flatten()
            encoded.pooler_output = encoded.pooler_output[_select_real(shown, shown >= 0)]
        return encoded

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

        For the image inputs see `get_image_features`, for `mm_token_type_ids` (batch, length)
        `token_types`. `mm_encoder_outputs={"image": ...}` holds image features that were computed
        before; if it is given, even empty, tokens without images are not searched for image tokens.
        `router_losses_follow`: the caller adds the router losses to its loss; training without them
        is warned of once.

        Raises:
            ValueError: shapes do not fit each other, or the images are not those of the image
                tokens.
        """
        given = input_ids, inputs_embeds, attention_mask, position_ids, past_key_values
        hidden_size = self.config.text_config.hidden_size
        batch = check_token_inputs(*given, mm_token_type_ids, hidden_size)
        check_rows_of_images(pixel_values, image_index, batch)
        learning = self.training and torch.is_grad_enabled()
        record = learning or kwargs.get("output_router_logits", False)
        images = pixel_values, pixel_attention_mask, image_index, mm_encoder_outputs
        encoded = self._encoded_images(*images, record)
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        told = mm_token_type_ids
        mm_token_type_ids = self.token_types(input_ids, inputs_embeds, told)

        image_features = image_tokens = None
        if encoded is not None:
            image_features = encoded.pooler_output.flatten(0, 1).to(inputs_embeds)
            image_tokens = self.get_placeholder_mask(
                input_ids, inputs_embeds, image_features, told, past_key_values
            )
            inputs_embeds = inputs_embeds.masked_scatter(image_tokens, image_features)
        elif mm_encoder_outputs is None and "attention_instances" not in kwargs:
            # `generate` has looked at the prompt; vLLM, whose attention this is, merges by itself.
            self.check_no_image_tokens(input_ids, inputs_embeds)
        if learning and not router_losses_follow:
            self._warn_of_missing_router_losses()
        if learning and (image_features is None or not len(image_features)):
            encoded, image_index = self._encode_blank_image(), None
            inputs_embeds = inputs_embeds + (encoded.pooler_output.mean() * 0.0).to(inputs_embeds)
        vision_router_logits, shown = self._vision_routing(
            encoded, image_index, image_tokens, batch
        )

        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            mm_token_type_ids=mm_token_type_ids,
            **kwargs,
        )
        foreign = learning and not router_losses_follow and outputs.router_logits
        if foreign and not self.wants_router_losses():
            # TRL adds a balance loss to any of them; of frozen routers it shall train nothing.
            outputs.router_logits = tuple(each.detach() for each in outputs.router_logits)
        return VLMoEModelOutputWithPast(
            **outputs,
            image_hidden_states=image_features,
            vision_router_logits=vision_router_logits,
            shown_tiles=shown,
        )

    def _encoded_images(
        self,
        pixel_values: torch.Tensor | None,
        pixel_attention_mask: torch.Tensor | None,
        image_index: torch.Tensor | None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None,
        record: bool,
    ) -> Any:
        """The images' features, computed before or now, with the routing if `record`; or None."""
        encoded = (mm_encoder_outputs or {}).get("image")
        if pixel_values is None:
            return encoded
        if encoded is not None:
            raise ValueError("You cannot specify both pixel_values and mm_encoder_outputs['image']")
        images = pixel_values, pixel_attention_mask, image_index
        return self.get_image_features(*images, output_router_logits=record, return_dict=True)

    def _vision_routing(
        self,
        encoded: VLMoEImageFeatures | None,
        image_index: torch.Tensor | None,
        image_tokens: torch.Tensor | None,
        batch: int,
    ) -> tuple[tuple[torch.Tensor, ...] | None, torch.Tensor | None]:
        """Router logits of tower and connector, if recorded, and `shown_tiles`; takes notes."""
        router_logits = getattr(encoded, "router_logits", None)
        if encoded is None or router_logits is None or encoded.chosen_experts is None:
            return None, None
        if image_tokens is None:
            image_tokens = router_logits[0].new_zeros(batch, 1, 1, dtype=torch.bool)
        tiles, tokens_per_tile = router_logits[0].shape[0], encoded.pooler_output.shape[1]
        shown = shown_tiles(tiles, tokens_per_tile, image_tokens[..., 0], image_index)
        if self.training and torch.is_grad_enabled():
            blocks = sparse_vision_blocks(self.vision_tower, self.multi_modal_projector)
            take_vision_notes(blocks, router_logits, encoded.chosen_experts, shown)
        return router_logits, shown

    def wants_router_losses(self) -> bool:
        """Whether a router loss has a coefficient and a router trains, or an adapter on one.

        Frozen routers cannot be balanced: the losses would reach only what lies below them.
        """
        if not self.config.text_config.has_router_losses:
            return False
        decoder: Any = self.language_model.layers
        blocks = [layer.mlp for layer in decoder if hasattr(layer, "mlp")]
        blocks += sparse_vision_blocks(self.vision_tower, self.multi_modal_projector)
        routers = [block.router for block in blocks if hasattr(block, "router")]
        trains = [weight.requires_grad for router in routers for weight in router.parameters()]
        return any(trains) or not trains  # FSDP may have taken all parameters into one

    def _warn_of_missing_router_losses(self) -> None:
        """Say once that a foreign loss has no router losses; nothing is said while compiling."""
        text_config = self.config.text_config
        if self.wants_router_losses() and not is_torchdynamo_compiling():
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

    def _encode_blank_image(self) -> VLMoEImageFeatures:
        """An image that no row shows: without images a rank does the same work.

        The decoder's input takes its features times zero, so that each vision parameter gets a zero
        gradient, and DistributedDataParallel and FSDP do not wait for it.
        """
        image = blank_image(self.config, self.vision_tower)
        return self.get_image_features(image, output_router_logits=True, return_dict=True)


class VLMoEForConditionalGeneration(FromDenseMixin, VLMoEPreTrainedModel, ImageGenerationMixin):
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
        self.suppress_image_tokens()

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
        with_router_losses = labels is not None and self.model.wants_router_losses()
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
            check_labels(labels, logits)
            loss, losses = self._losses(
                logits,
                labels,
                attention_mask,
                outputs if with_router_losses else None,
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
            vision_router_logits=outputs.vision_router_logits if output_router_logits else None,
        )

    def _losses(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor,
        attention_mask: torch.Tensor | None,
        routed: VLMoEModelOutputWithPast | None,
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
        if routed is None or not (routed.router_logits or routed.vision_router_logits):
            return loss, RouterLosses()
        token_mask = torch.ones_like(labels, dtype=torch.bool)
        if isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2:
            token_mask = attention_mask[:, -labels.shape[1] :].bool()
        row_weights = labels_per_row.to(num_items.device) / num_items
        losses = self.router_losses(
            routed.router_logits,
            token_mask,
            row_weights,
            mm_token_type_ids=mm_token_type_ids,
            vision_router_logits=routed.vision_router_logits,
            shown_tiles=routed.shown_tiles,
        )
        return loss + losses.total.to(loss.device), losses

    def router_losses(
        self,
        router_logits: tuple[torch.Tensor, ...],
        token_mask: torch.Tensor,
        row_weights: torch.Tensor,
        mm_token_type_ids: torch.Tensor | None = None,
        vision_router_logits: tuple[torch.Tensor, ...] | None = None,
        shown_tiles: torch.Tensor | None = None,
    ) -> RouterLosses:
        """The router losses that the config asks for: those of decoder, tower and connector, added.

        For the arguments see router_losses.py, and tile_routing.py for the last two.
        """
        config, training = self.config, self.training and torch.is_grad_enabled()
        places = []
        if router_logits:
            args = router_logits, token_mask, row_weights, mm_token_type_ids, training
            places.append(router_losses(config.text_config, *args))
        if vision_router_logits and shown_tiles is not None:
            vision = config, vision_router_logits, shown_tiles, row_weights, training
            places += vision_router_losses(*vision)
        return sum_of_losses(places)

    def active_parameters(self) -> dict[str, int]:
        """See active_parameters.py."""
        return active_parameters(self)


__all__ = ["VLMoEForConditionalGeneration", "VLMoEModel"]

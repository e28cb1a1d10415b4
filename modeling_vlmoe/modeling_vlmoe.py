# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""VLMoE, from picture and text to loss. Read this file first, top to bottom.

    pixel_values -> vision tower -> connector -> image tokens
                                                     |  written over the <image> placeholders
    input_ids -> embeddings -------------------------+-> decoder (experts) -> logits
    labels -----------------------------------------------> cross-entropy + router losses

- The tower is any vision encoder of `AutoModel` (vision_tower.py selects its features), the decoder
  is modeling_vlmoe_text.py, its experts are in sparse_moe.py and router.py, their losses in
  router_losses.py.
- Tower and connector may have experts, too (vision_experts.py), with losses of their own
  (vision_router_losses.py).
- Experts run through `@use_experts_implementation` (transformers looks for these words in this
  file).

Shapes: batch, length, hidden, experts; tiles = images, or crops that the tower sees one by one.
"""

from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_outputs import MoeModelOutputWithPast
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, logging
from transformers.utils.import_utils import is_torchdynamo_compiling

from ..configuration.configuration_vlmoe import VLMoEConfig
from ..configuration.hub_code import toolkit_module
from ..configuration.tower_facts import tower_facts
from .connector import VLMoEConnector
from .from_dense import FromDenseMixin
from .image_generation import ImageGenerationMixin
from .image_tokens import ImageTokensMixin
from .input_checks import check_pixels, check_rows_of_images, check_token_inputs
from .label_loss import label_loss, require_labels
from .model_outputs import (
    VLMoECausalLMOutputWithPast,
    VLMoEImageFeatures,
    VLMoEModelOutputWithPast,
    slice_logits_to_keep,
)
from .modeling_vlmoe_text import VLMoEPreTrainedModel, VLMoETextModel, real_tokens
from .router_losses import RouterLosses, decoder_router_losses, sum_of_losses
from .vision_experts import sparse_vision_blocks
from .vision_router_losses import shown_tiles, vision_router_losses
from .vision_tower import (
    blank_image,
    expected_pixels,
    make_vision_tower,
    patch_mask,
    unused_vision_modules,
    unused_vision_parameters,
    vision_features,
)

logger = logging.get_logger(__name__)


def _select_real(rows: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Drop the rows that are padding; while compiling, where shapes are static, move them last."""
    if is_torchdynamo_compiling():
        return rows[torch.argsort(~real, stable=True)]
    return rows[real]


def keep_vision_in_graph(embeds: torch.Tensor, blank: VLMoEImageFeatures | None) -> torch.Tensor:
    """Add zero times the features of a blank image, if there is one.

    So every vision parameter gets a zero gradient, and no rank of DistributedDataParallel or FSDP
    waits for one.
    """
    return embeds if blank is None else embeds + (blank.pooler_output.mean() * 0.0).to(embeds)


def _let_toolkit_listen(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """From the first pass of training on, count choices and check logits with hooks.

    Not in code from the Hub, where the package may be missing.
    """
    is_own = __name__.startswith("vlmoe.")
    if is_own and not is_torchdynamo_compiling() and model.learns and model.routing_watch is None:
        toolkit_module("routing.watch", "Training").watch_routing(model).begin(args, kwargs)


class VLMoEModel(ImageTokensMixin, VLMoEPreTrainedModel):
    """Vision tower, connector and decoder, without the language modeling head."""

    routing_watch: Any = None  # a `TrainingWatch`; its hooks keep all notes about the routing
    router_loss_ride: Any = None  # a `RouterLossRide`, while a trainer asks for it
    _keys_to_ignore_on_load_unexpected = [r"^lm_head\."]  # noqa: RUF012 - of the whole model

    def __init__(self, config: VLMoEConfig):
        super().__init__(config)
        self.vision_tower = make_vision_tower(config)
        self.multi_modal_projector = VLMoEConnector(config)
        self.language_model = VLMoETextModel(config.text_config)
        self.awaits_router_losses = False  # between a forward pass of training and its losses
        self.has_learned = False  # since the toolkit last updated the bias or checked the routing
        self.is_unheard = False  # the last pass of training, until `routing_watch` hears its end
        self.register_forward_pre_hook(_let_toolkit_listen, with_kwargs=True)
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
        """Freeze the parameters that get no gradient; to be repeated after loading."""
        for name in self.unused_vision_parameters:
            self.vision_tower.get_parameter(name).requires_grad_(False)

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        pixel_attention_mask: torch.Tensor | None = None,
        image_index: torch.Tensor | None = None,
        output_router_logits: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> VLMoEImageFeatures:
        """Encode images and project them to image tokens.

        Args:
            pixel_values: (batch, tiles, 3, height, width), padded, or (tiles, 3, height, width),
                tiles in row order.
            pixel_attention_mask: (batch, tiles, height, width), 1 for real pixels; a tile without
                any is padding. Within a tile only Idefics3's and SmolVLM's towers read it.
            image_index: (batch, tiles of a row): which tiles of flat `pixel_values` each row shows,
                in order; -1 is padding. Rows that show the same image share one encoding of it.
            output_router_logits: also return the routing of tower and connector.
        """
        config = self.config
        if not is_torchdynamo_compiling():
            config.check_routing()
        expected = expected_pixels(config, kwargs.get("interpolate_pos_encoding", False))
        check_pixels(pixel_values, pixel_attention_mask, image_index, expected)
        tiles, masks = self._real_tiles(pixel_values, pixel_attention_mask)
        if tiles.shape[0] == 0:  # rows without images, cut from a batch with images
            return VLMoEImageFeatures(
                pooler_output=tiles.new_empty(0, 0, config.text_config.hidden_size)
            )
        if output_router_logits and config.vision_num_experts:
            kwargs |= {"output_router_logits": True}
        tiles = tiles.to(self.vision_tower.dtype)
        features, outputs = vision_features(self.vision_tower, tiles, config, **masks, **kwargs)
        image_tokens, *of_connector = self.multi_modal_projector(features)
        router_logits = None
        if output_router_logits:
            of_tower = outputs.router_logits if config.vision_num_experts else ()
            router_logits = (*of_tower, *of_connector) or None
        if image_index is not None:
            shown = image_index.flatten()
            image_tokens = image_tokens[_select_real(shown, shown >= 0)]
        return VLMoEImageFeatures(
            last_hidden_state=outputs.last_hidden_state,
            pooler_output=image_tokens,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=router_logits,
        )

    def _real_tiles(
        self, pixel_values: torch.Tensor, pixel_attention_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Drop padding: (tiles, 3, height, width), and the tower's mask if it takes one."""
        tiles = pixel_values.flatten(0, 1) if pixel_values.dim() == 5 else pixel_values
        if pixel_attention_mask is None:
            return tiles, {}
        pixel_mask = pixel_attention_mask.flatten(0, 1)  # (tiles, height, width)
        real = pixel_mask.flatten(1).any(-1)
        vision, tiles = self.config.vision_config, _select_real(tiles, real)
        if not tower_facts(vision).takes_patch_mask:
            return tiles, {}
        mask = patch_mask(_select_real(pixel_mask, real), vision.patch_size)
        return tiles, {"patch_attention_mask": mask}

    def encode_images(
        self,
        pixel_values: torch.Tensor | None,
        pixel_attention_mask: torch.Tensor | None,
        image_index: torch.Tensor | None,
        mm_encoder_outputs: dict[str, VLMoEImageFeatures] | None,
        output_router_logits: bool,
    ) -> tuple[VLMoEImageFeatures | None, bool]:
        """Encode the batch's images, or take the given features; also return whether there are any.

        In training a batch without images gets a blank one, so that all ranks do the same work.
        """
        encoded = (mm_encoder_outputs or {}).get("image")
        record = self.learns or output_router_logits
        if pixel_values is not None:
            if encoded is not None:
                raise ValueError(
                    "You cannot specify both pixel_values and mm_encoder_outputs['image']"
                )
            images = pixel_values, pixel_attention_mask, image_index
            encoded = self.get_image_features(
                *images, output_router_logits=record, return_dict=True
            )
        if not self.learns or (encoded is not None and encoded.pooler_output.numel()):
            return encoded, encoded is not None
        blank = blank_image(self.config, self.vision_tower)
        features = self.get_image_features(blank, output_router_logits=True, return_dict=True)
        return features, False

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
        mm_encoder_outputs: dict[str, VLMoEImageFeatures] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> VLMoEModelOutputWithPast:
        """Image and text to hidden states (batch, length, hidden).

        For the image inputs see `get_image_features`, for `mm_token_type_ids` (batch, length)
        `token_types`. `mm_encoder_outputs={"image": ...}` holds image features that were computed
        before; if it is given, even empty, tokens without images are not searched for image tokens.
        Raise `ValueError` if shapes do not fit, or images and image tokens do not match.
        """
        if self.router_loss_ride is not None:
            kwargs["output_router_logits"] = True
        tokens = input_ids, inputs_embeds, attention_mask, position_ids, past_key_values
        batch = check_token_inputs(*tokens, mm_token_type_ids, self.config.text_config.hidden_size)
        check_rows_of_images(pixel_values, image_index, batch)
        # Before the embedding, so that all ranks of FSDP gather parameters in one order.
        given = pixel_values, pixel_attention_mask, image_index, mm_encoder_outputs
        images, are_real = self.encode_images(*given, kwargs.get("output_router_logits", False))
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        is_vllm = "attention_instances" in kwargs  # which merges images and text by itself
        token_types = self.token_types(input_ids, inputs_embeds, mm_token_type_ids, is_vllm)
        features = is_image = None
        if images is not None and are_real:
            features = images.pooler_output.flatten(0, 1).to(inputs_embeds)
            is_image = self.get_placeholder_mask(
                input_ids, inputs_embeds, features, mm_token_type_ids, past_key_values
            )
            inputs_embeds = inputs_embeds.masked_scatter(is_image, features)
        else:
            if mm_encoder_outputs is None and not is_vllm:  # `generate` has checked the prompt
                self.check_no_image_tokens(input_ids, inputs_embeds)
            inputs_embeds = keep_vision_in_graph(inputs_embeds, images)
        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            mm_token_type_ids=token_types,
            **kwargs,
        )
        shown = self._shown_tiles(images, is_image, image_index if are_real else None, batch)
        if self.learns:
            self._end_training_pass(outputs)
        output = VLMoEModelOutputWithPast(
            **outputs,
            image_hidden_states=features,
            vision_router_logits=None if shown is None else getattr(images, "router_logits", None),
            shown_tiles=shown,
            mm_token_type_ids=token_types,
        )
        if self.router_loss_ride is not None:
            self.router_loss_ride.board(output, real_tokens(attention_mask, inputs_embeds))
        return output

    def _shown_tiles(
        self,
        images: VLMoEImageFeatures | None,
        is_image: torch.Tensor | None,
        image_index: torch.Tensor | None,
        batch: int,
    ) -> torch.Tensor | None:
        """(2, shown): which row shows which tile; None without routing of tower or connector."""
        router_logits = getattr(images, "router_logits", None)
        if images is None or router_logits is None:
            return None
        if is_image is None:
            is_image = router_logits[0].new_zeros(batch, 1, 1, dtype=torch.bool)
        tiles, tokens_per_tile = router_logits[0].shape[0], images.pooler_output.shape[1]
        return shown_tiles(tiles, tokens_per_tile, is_image[..., 0], image_index)

    def _end_training_pass(self, outputs: MoeModelOutputWithPast) -> None:
        """Watch for losses without router losses."""
        self.has_learned = self.is_unheard = True
        if outputs.router_logits and not self.wants_router_losses():
            # TRL adds a balance loss to all that it finds; through frozen ones it would train
            # only what lies below them.
            outputs.router_logits = tuple(each.detach() for each in outputs.router_logits)
        if not is_torchdynamo_compiling() and outputs.last_hidden_state.requires_grad:
            self.awaits_router_losses = True  # until `router_losses` is called
            outputs.last_hidden_state.register_hook(self._warn_of_missing_router_losses)

    def wants_router_losses(self) -> bool:
        """Whether a router loss has a coefficient, and a router or an adapter on one trains.

        Frozen routers cannot be balanced: the losses would reach only what lies below them.
        """
        if not self.config.text_config.has_router_losses:
            return False
        layers: Any = self.language_model.layers
        blocks = [layer.mlp for layer in layers if hasattr(layer, "mlp")]
        blocks += sparse_vision_blocks(self.vision_tower, self.multi_modal_projector)
        routers = [block.router for block in blocks if hasattr(block, "router")]
        trains = [weight.requires_grad for router in routers for weight in router.parameters()]
        return any(trains) or not trains  # FSDP may have taken all parameters into one

    def router_losses(
        self,
        router_logits: tuple[torch.Tensor, ...],
        token_mask: torch.Tensor,
        row_weights: torch.Tensor,
        mm_token_type_ids: torch.Tensor | None = None,
        vision_router_logits: tuple[torch.Tensor, ...] | None = None,
        shown_tiles: torch.Tensor | None = None,
    ) -> RouterLosses:
        """Add up the router losses of decoder, tower and connector that the config asks for.

        For the arguments see router_losses.py, and vision_router_losses.py for the last two.
        """
        config = self.config
        if not is_torchdynamo_compiling():
            self.awaits_router_losses = False
        places = []
        if router_logits:
            tokens = token_mask, row_weights, mm_token_type_ids
            places.append(
                decoder_router_losses(config.text_config, router_logits, *tokens, self.learns)
            )
        if vision_router_logits and shown_tiles is not None:
            vision = config, vision_router_logits, shown_tiles, row_weights, self.learns
            places += vision_router_losses(*vision)
        return sum_of_losses(places)

    def _warn_of_missing_router_losses(self, grad: torch.Tensor) -> None:
        """Warn once if the gradient that arrives comes from a loss without router losses."""
        if self.awaits_router_losses and self.wants_router_losses():
            config = self.config.text_config
            logger.warning_once(
                f"Router losses are enabled (router_aux_loss_coef={config.router_aux_loss_coef}, "
                f"router_z_loss_coef={config.router_z_loss_coef}) but were not computed, because "
                "the loss is not that of VLMoEForConditionalGeneration called with `labels`. With "
                "TRL use VLMoESFTTrainer or VLMoEDPOTrainer; with label smoothing or a custom loss "
                "add model.router_losses(...). Set both coefficients to 0 to silence this warning."
            )


class VLMoEForConditionalGeneration(FromDenseMixin, VLMoEPreTrainedModel, ImageGenerationMixin):
    """The whole model, with language modeling head and losses."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012

    def __init__(self, config: VLMoEConfig):
        super().__init__(config)
        self.model = VLMoEModel(config)
        text = config.text_config
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()
        self.suppress_image_tokens()

    def get_image_features(
        self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> VLMoEImageFeatures:
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
        mm_encoder_outputs: dict[str, VLMoEImageFeatures] | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        output_router_logits: bool | None = None,
        loss_weights: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> VLMoECausalLMOutputWithPast:
        """Image and text to logits and, with `labels`, the loss.

        Args:
            labels: (batch, length) token ids; -100 where there is no loss.
            logits_to_keep: positions that get logits: the last so many (0: all), or indices.
            num_items_in_batch: label tokens of the whole optimizer step, as Trainer counts them; by
                default those of `labels`.
            loss_weights: (batch,), how much a label token of each row counts, by default 1; then
                `num_items_in_batch` is the sum of these weights over label tokens (label_loss.py).

        For the other arguments see `VLMoEModel`. A batch without any label token has loss 0.
        """
        if output_router_logits is None:
            output_router_logits = self.config.text_config.output_router_logits
        with_router_losses = labels is not None and self.model.wants_router_losses()
        if labels is not None:
            kwargs.setdefault("use_cache", False)  # a loss needs no cache
        require_labels(labels, loss_weights)
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
            **kwargs,
        )
        batch = labels, attention_mask, num_items_in_batch, loss_weights
        return self._predict(
            outputs, logits_to_keep, *batch, with_router_losses, output_router_logits, **kwargs
        )

    def _predict(
        self,
        outputs: VLMoEModelOutputWithPast,
        logits_to_keep: int | torch.Tensor,
        labels: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        num_items_in_batch: torch.Tensor | int | None,
        loss_weights: torch.Tensor | None,
        with_router_losses: bool,
        output_router_logits: bool,
        **kwargs: Unpack[TransformersKwargs],
    ) -> VLMoECausalLMOutputWithPast:
        """Compute logits and, with `labels`, the total loss from the output of the backbone."""
        text_config = self.config.text_config
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        if text_config.logits_scaling != 1:
            logits = logits / text_config.logits_scaling
        loss, row_losses, losses = None, None, RouterLosses()
        if labels is not None:
            items = num_items_in_batch, loss_weights
            of_labels = label_loss(self.loss_function, logits, labels, *items, **kwargs)
            loss, row_losses = of_labels.loss, of_labels.row_losses
            if with_router_losses:
                losses = self.router_losses(
                    outputs.router_logits,
                    real_tokens(attention_mask, labels),
                    row_weights=of_labels.row_shares,
                    mm_token_type_ids=outputs.mm_token_type_ids,
                    vision_router_logits=outputs.vision_router_logits,
                    shown_tiles=outputs.shown_tiles,
                )
                loss = losses.added_to(loss)
        return VLMoECausalLMOutputWithPast(
            loss=loss,
            aux_loss=losses.aux_loss,
            z_loss=losses.z_loss,
            entropy_loss=losses.entropy_loss,
            row_losses=row_losses,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits if output_router_logits else None,
            image_hidden_states=outputs.image_hidden_states,
            vision_router_logits=outputs.vision_router_logits if output_router_logits else None,
        )

    def router_losses(self, *args: Any, **kwargs: Any) -> RouterLosses:
        """See `VLMoEModel.router_losses`; raise `RuntimeError` while they ride."""
        if self.model.router_loss_ride is not None:
            raise RuntimeError(
                "The router losses ride on the hidden states and would count twice: call the "
                "model without `labels`."
            )
        return self.model.router_losses(*args, **kwargs)

    def active_parameters(self) -> dict[str, int]:
        """Count parameters: `total`, and those that an `image_token`, a `text_token` passes."""
        counting = toolkit_module("hub.active_parameters", "Counting active parameters")
        return counting.active_parameters(self)


__all__ = ["VLMoEForConditionalGeneration", "VLMoEModel"]

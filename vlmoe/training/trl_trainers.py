# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""TRL's SFTTrainer and DPOTrainer with VLMoE's own losses.

    VLMoESFTTrainer(model, SFTConfig(out, assistant_only_loss=True), train_dataset=rows,
                    processing_class=processor).train()
    VLMoEDPOTrainer(model, reference, DPOConfig(out), train_dataset=pairs,
                    processing_class=processor).train()

- TRL puts a fused head in the place of the model's `forward`: it calls the backbone without labels,
  so that the router losses of `VLMoEForConditionalGeneration` are not computed, and adds Mixtral's
  balance loss instead, which is pooled over layers and over the rows of a micro-batch and knows no
  z-loss.
- Here the fused head stays, since it saves the (batch, length, vocab) logits and feeds TRL's
  metrics. Our losses ride on the hidden states of the very same backbone call (riding_losses.py),
  with the coefficients of the model's config (for the balance loss `args.router_aux_loss_coef`,
  where it is given), and are in the loss that is logged. TRL's pooled loss is off.
- Subclasses, as TRL advises: a `compute_loss_func` is deprecated there, costs a second forward
  pass, sees neither router logits nor attention mask, and does not exist in DPOTrainer.
- Batches come from our own collators: the labels of every other way of training, an image that
  several rows share is encoded once, and a row that is longer than `max_length` (TRL's default is
  1024) or than the model has positions is an error that names it.
"""

import copy
from abc import ABC, abstractmethod

import torch
from transformers import DataCollator
from transformers.utils import ModelOutput

from ..data.collator import IGNORE_INDEX, VLMoECollator, VLMoEPreferenceCollator
from ..data.long_rows import length_limit
from ..hub.provenance import RunOrigin
from ..modeling_vlmoe.modeling_vlmoe import VLMoEForConditionalGeneration
from .card import ModelCardMixin
from .riding_losses import RouterLossRide
from .strict_resume import StrictResumeMixin

try:
    from trl import DPOTrainer, SFTTrainer
    from trl.trainer.dpo_trainer import DataCollatorForVisionPreference
    from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling
except ImportError as error:
    raise ImportError("vlmoe.training.trl_trainers needs TRL: pip install trl") from error

Inputs = dict[str, torch.Tensor]
LossAndOutputs = torch.Tensor | tuple[torch.Tensor, ModelOutput]


class RouterLossTrainer(StrictResumeMixin, ModelCardMixin, ABC):
    """Adds the router losses, and our model card, to a TRL trainer, the next class in line.

    `own_collator` takes the place of `trl_collator`, TRL's choice for rows with `images`.
    """

    trl_collator: type
    own_collator: type[VLMoECollator]
    data_collator: DataCollator

    def __init__(self, *args: object, origin: RunOrigin | None = None, **kwargs: object) -> None:
        """Arguments of the TRL trainer; raises `ValueError` where rows are packed into one."""
        super().__init__(*args, origin=origin, **kwargs)
        if self.args.padding_free or getattr(self.args, "packing", False):
            raise ValueError(
                "padding_free and packing put several samples into one row, but the router losses "
                "are per sample; set both to False."
            )
        self.aux_loss_enabled = False  # TRL's pooled loss
        text_config = self._vlmoe().config.text_config
        text_config.router_aux_loss_coef = self.router_aux_loss_coef
        text_config.output_router_logits = False  # SFTTrainer sets it, and it would be saved
        is_default = isinstance(self.data_collator, self.trl_collator)
        # Our collators have labels on assistant turns only; in DPOTrainer there is no choice.
        if is_default and getattr(self.args, "assistant_only_loss", True):
            self.data_collator = self.own_collator(
                self.processing_class,
                self._longest_row(),
                pad_to_multiple_of=self.args.pad_to_multiple_of,
            )
        elif is_default:  # it hands the rows' images to the processor
            self.data_collator.processor = copy.copy(self.processing_class)
            self.data_collator.processor.opens_urls = False

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: Inputs,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> LossAndOutputs:
        """TRL's loss plus the router losses times their coefficients."""
        with RouterLossRide(self._vlmoe(), self.row_weights(inputs, num_items_in_batch)) as ride:
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss, *outputs = result if return_outputs else (result,)
        if ride.total is not None:
            loss = ride.carried_by(loss) + ride.total.to(loss.device)
        self._ride = ride
        return (loss, *outputs) if return_outputs else loss

    def training_step(self, *args: object, **kwargs: object) -> torch.Tensor:
        """Do TRL's, and check that the router losses were trained."""
        loss = super().training_step(*args, **kwargs)
        self._ride.require_arrival()
        return loss

    @abstractmethod
    def row_weights(
        self, inputs: Inputs, num_items_in_batch: torch.Tensor | int | None
    ) -> torch.Tensor:
        """(batch,): the share of each row in TRL's loss, and so in the router losses."""

    def _longest_row(self) -> int | None:
        """Return the tokens that the arguments and the model's positions allow."""
        limits = [self.args.max_length, length_limit(self._vlmoe().config)]
        return min((limit for limit in limits if limit is not None), default=None)

    def _vlmoe(self) -> VLMoEForConditionalGeneration:
        """Return the model itself, also from inside PEFT's."""
        for module in self.model.modules():
            if isinstance(module, VLMoEForConditionalGeneration):
                return module
        raise TypeError(
            f"{type(self).__name__} trains VLMoEForConditionalGeneration, got "
            f"{type(self.model).__name__}."
        )


class VLMoESFTTrainer(RouterLossTrainer, SFTTrainer):
    """TRL's SFTTrainer for VLMoE; see the module docstring.

    Rows are as for `VLMoECollator`, which collates them if they have `images` (an empty list for a
    text-only row) and `assistant_only_loss=True`; `data_collator` replaces it. A row weighs in the
    router losses by its share of the label tokens of the optimizer step, as it does in the
    cross-entropy, so that gradient accumulation changes nothing.
    """

    trl_collator = DataCollatorForVisionLanguageModeling
    own_collator = VLMoECollator

    def row_weights(
        self, inputs: Inputs, num_items_in_batch: torch.Tensor | int | None
    ) -> torch.Tensor:
        """(batch,): label tokens of each row over those of the optimizer step, of all ranks."""
        labels_per_row = (inputs["labels"][:, 1:] != IGNORE_INDEX).sum(-1)
        if num_items_in_batch is None:
            return labels_per_row / labels_per_row.sum().clamp(min=1)
        weights = labels_per_row / torch.as_tensor(num_items_in_batch).clamp(min=1)
        if self.args.average_tokens_across_devices:  # gradients are averaged over ranks
            weights = weights * (self.accelerator.num_processes // self.get_tp_size())
        return weights


class VLMoEDPOTrainer(RouterLossTrainer, DPOTrainer):
    """TRL's DPOTrainer for VLMoE; see the module docstring.

    Rows are as for `VLMoEPreferenceCollator`, which collates them if they have `images`. Chosen and
    rejected rows alike weigh 1 / (rows of the micro-batch) in the router losses: the preference
    loss, too, is the mean over the pairs of a micro-batch, and Trainer takes the mean of both over
    the micro-batches of an optimizer step. Only the policy has router losses, not the reference.
    """

    trl_collator = DataCollatorForVisionPreference
    own_collator = VLMoEPreferenceCollator

    def row_weights(
        self, inputs: Inputs, num_items_in_batch: torch.Tensor | int | None
    ) -> torch.Tensor:
        """(2 * pairs,): equal shares."""
        rows = inputs["input_ids"].shape[0]
        return torch.full((rows,), 1 / rows, device=inputs["input_ids"].device)

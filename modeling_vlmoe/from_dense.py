# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""How a model is made from dense ones: the front door to upcycling/."""

from importlib import import_module
from typing import Any


def _upcycling() -> Any:
    """What converts dense models; it is of the package and does not travel with a model's code."""
    try:
        return import_module("vlmoe.modeling_vlmoe.upcycling.conversion")
    except ImportError as error:
        raise ImportError("Upcycling needs the package: pip install vlmoe") from error


class FromDenseMixin:
    """`from_dense` and `from_vision_text` of the model with a language modelling head."""

    upcycling_report: Any = None  # an UpcyclingReport

    @classmethod
    def from_dense(
        cls, dense: Any, num_experts: int = 8, num_experts_per_tok: int = 2, **options: Any
    ) -> Any:
        """A sparse model that computes what a dense vision-language model computes.

        Args:
            dense: Llava, InternVL, Idefics3 or SmolVLM, or a VLMoE without experts: a loaded model,
                a local folder or a Hub id.
            num_experts, num_experts_per_tok: copies of the dense MLP in each sparse layer, and
                those that a token is sent to.
            **options: `sample`, inputs to compare the two models on, as `VLMoEProcessor` makes them
                (by default drawn pictures and random words); the other options of `Upcycling` in
                modeling_vlmoe/upcycling/options.py, such as `expert_split`, `expert_init`,
                `sparse_layers`; and fields of the configuration, such as `router_aux_loss_coef`.

        The result's `upcycling_report` holds the measured error; `save_pretrained` saves it.

        Raises:
            ValueError: the model does not fit exactly, or an option is not allowed.
            UpcyclingError: the logits differ by more than 1e-5 of their largest, in fp32.
        """
        return _upcycling().from_dense(cls, dense, num_experts, num_experts_per_tok, **options)

    @classmethod
    def from_vision_text(
        cls,
        vision: Any,
        text: Any,
        num_experts: int = 8,
        num_experts_per_tok: int = 2,
        **options: Any,
    ) -> Any:
        """A sparse model from a vision encoder and a language model, with a new connector.

        What it says of text is what the language model says; images it has to learn.

        Args:
            vision: a vision encoder, or a dual one such as CLIP, whose vision half is taken.
            text: a causal language model. Like `vision` a loaded model, a local folder or a Hub id.
            num_experts, num_experts_per_tok: as in `from_dense`.
            **options: `image_token_id`, by default a new token after the last; `connector`, a dict
                of `VLMoEConfig`'s fields for features and connector; else as in `from_dense`.

        Embeddings of new tokens are the mean of the others, and generation suppresses the tokens.
        """
        return _upcycling().from_vision_text(
            cls, vision, text, num_experts, num_experts_per_tok, **options
        )

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, with the report of an upcycling, if there was one."""
        if self.upcycling_report is not None:
            self.upcycling_report.save(args[0] if args else kwargs["save_directory"])
        return super().save_pretrained(*args, **kwargs)  # type: ignore[misc]

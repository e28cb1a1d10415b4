# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Convert a dense vision-language model, or an encoder and a language model, to a sparse one.

`Conversion` goes through three states, so that the two models need not be in memory together: the
dense model answers a sample; then each tensor of the sparse model can be made; then the sparse
model answers the sample too, and the report is written.
"""

import copy
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any, Self

import torch
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from ..hub.experts_implementation import refused_sizes, suit_experts
from ..modeling_vlmoe.modeling_vlmoe import VLMoEForConditionalGeneration
from ..modeling_vlmoe.vision_tower import unused_vision_parameters
from ..modeling_vlmoe.whole_weights import NotWholeError, weight_problems
from .dense_configs import text_fields, vision_fields, vlmoe_fields
from .dense_models import Dense, dense_config, is_tied, kind_of, load_dense
from .exactness import HALF, Outputs, UpcyclingError, experts_computed_by, outputs_of
from .native_target import NativeTarget
from .options import Upcycling
from .origins import Origin
from .report import UpcyclingReport
from .target import Processor, ProcessorFor, Sample, Target
from .vlmoe_target import CONNECTOR, TOWER, VLMoETarget

Tensor = torch.Tensor
CONNECTOR_FIELDS = (
    "vision_feature_layer",
    "vision_use_last_hidden_state",
    "vision_feature_select_strategy",
    "pixel_shuffle_factor",
    "projector_layer_norm",
    "projector_num_layers",
    "projector_hidden_act",
    "multimodal_projector_bias",
)


@dataclass
class Conversion:
    """A conversion in progress; see `begin`.

    Attributes:
        source, model_type: as in the report.
        target: the class and configuration to convert to.
        generation_config: for the sparse model.
        dtype: of the dense weights.
        weights: the dense model's tensors, under its own names; released before the sparse model
            is loaded.
        sample: the inputs on which both models are compared.
        reference: the dense model's outputs in fp32 and, if that is another, in its own dtype.
        parameters: of the dense model.
        processor: for the sparse model, if one was asked for.
    """

    source: str
    model_type: str
    target: Target
    generation_config: GenerationConfig | None
    dtype: torch.dtype
    weights: dict[str, Tensor]
    sample: Sample
    reference: tuple[Outputs, Outputs | None]
    parameters: dict[str, int]
    processor: Processor | None = None

    @classmethod
    def begin(
        cls,
        dense: Dense,
        options: Upcycling,
        *,
        target: str = VLMoETarget.name,
        sample: Sample | None = None,
        processor_for: ProcessorFor | None = None,
    ) -> Self:
        """Read a dense model and run it on a sample.

        Args:
            dense: a loaded model, a folder or a Hub id.
            options: of the conversion.
            target: "vlmoe", or "native" for the sparse class of the dense model's family.
            sample: inputs for the comparison; for VLMoE as `VLMoEProcessor` makes them.
            processor_for: makes the sparse model's processor from its configuration. Without a
                `sample` the processor encodes drawn pictures and fixed texts; without both, pixels
                are drawn and tokens are random.

        Raises:
            ValueError: the model does not fit exactly; the message gives the reason.
        """
        made: Target
        if target == NativeTarget.name:
            made = NativeTarget.for_dense(dense_config(dense), options)
            model, source, _ = load_dense(dense, kind_of(made.dense_config))
            _require_head(model)
            tied = set(model.all_tied_weights_keys)
            weights = {name: t for name, t in model.state_dict().items() if name not in tied}
        else:
            model, source, _ = load_dense(dense)
            fields = vlmoe_fields(model.config, is_tied(model))
            made = VLMoETarget(options.sparse_config(fields), options)
            weights = dict(model.state_dict())
        return cls._of(model, source, made, weights, sample, processor_for)

    @classmethod
    def begin_vision_text(
        cls,
        vision: Dense,
        text: Dense,
        options: Upcycling,
        *,
        image_token_id: int | None = None,
        connector: Mapping[str, Any] | None = None,
        sample: Sample | None = None,
        processor_for: ProcessorFor | None = None,
    ) -> Self:
        """Read a vision encoder and a language model, and run the latter on a sample of texts.

        For the arguments see `VLMoEForConditionalGeneration.from_vision_text` and `begin`.
        """
        encoder, vision_source, missing = load_dense(vision, "vision")
        if hasattr(encoder, "vision_model"):  # of a dual encoder, such as CLIP
            encoder = encoder.vision_model
            missing = {name.removeprefix("vision_model.") for name in missing}
        model, text_source, _ = load_dense(text, "text")
        old_size = model.get_input_embeddings().weight.shape[0]
        image_token_id = old_size if image_token_id is None else image_token_id
        text_config = text_fields(model.config, is_tied(model))
        text_config["vocab_size"] = max(old_size, image_token_id + 1)
        for name in connector or {}:
            if name not in CONNECTOR_FIELDS:
                allowed = ", ".join(CONNECTOR_FIELDS)
                raise ValueError(f"`connector` has the field {name!r}; allowed: {allowed}.")
        dense = dict(connector or {}) | {
            "text_config": text_config,
            "vision_config": vision_fields(encoder.config),
            "image_token_id": image_token_id,
            "tie_word_embeddings": is_tied(model),
        }
        tower = encoder.state_dict()
        weights = {f"{TOWER}{name}": tensor.to(model.dtype) for name, tensor in tower.items()}
        weights |= model.state_dict()
        config = options.sparse_config(dense)
        if needed := missing & set(tower) - set(unused_vision_parameters(config)):
            raise NotWholeError(vision_source, type(encoder).__name__, weight_problems(needed, ()))
        begun = cls._of(
            model,
            f"{vision_source} + {text_source}",
            VLMoETarget(config, options, new_parts=(CONNECTOR,)),
            weights,
            sample,
            processor_for,
        )
        generation = copy.deepcopy(begun.generation_config) or GenerationConfig()
        new = range(old_size, text_config["vocab_size"])
        generation.suppress_tokens = sorted({image_token_id, *new})
        begun.generation_config = generation
        return begun

    @classmethod
    def _of(
        cls,
        model: PreTrainedModel,
        source: str,
        target: Target,
        weights: dict[str, Tensor],
        sample: Sample | None,
        processor_for: ProcessorFor | None,
    ) -> Self:
        _require_exact_split(target.options.expert_split, model.dtype)
        was_training = model.training
        model.eval()
        processor = None if processor_for is None else processor_for(target.config)
        if sample is None:
            sample = target.sample(model, processor)
        inputs = target.inputs(model, sample)
        in_fp32 = outputs_of(model, inputs, in_fp32=True)
        stored = None
        if model.dtype != torch.float32:
            stored = outputs_of(model, inputs, in_fp32=False)
        model.train(was_training)
        target.config.dtype = model.dtype
        return cls(
            source=source,
            model_type=model.config.model_type,
            target=target,
            generation_config=getattr(model, "generation_config", None),
            dtype=model.dtype,
            weights=weights,
            sample=sample,
            reference=(in_fp32, stored),
            parameters=target.dense_parameters(model, weights),
            processor=processor,
        )

    @property
    def config(self) -> PreTrainedConfig:
        """Of the sparse model."""
        return self.target.config

    def plan(self, skeleton: Mapping[str, Tensor]) -> dict[str, Origin]:
        """Find the origin of each of the sparse model's tensors; see `Target.plan`."""
        return self.target.plan(skeleton, self.weights, self.dtype)

    @torch.no_grad()
    def fill(self, model: PreTrainedModel) -> dict[str, Origin]:
        """Copy the weights into a sparse model, and return their origins."""
        tied = model.all_tied_weights_keys
        target = {name: t for name, t in model.state_dict().items() if name not in tied}
        plan = self.plan(target)
        for name, origin in plan.items():
            target[name].copy_(origin.tensor(self.weights))
        return plan

    def check(self, model: PreTrainedModel, plan: Mapping[str, Origin]) -> UpcyclingReport:
        """Run the sparse model on the sample and report.

        Raises:
            UpcyclingError: the options promise the dense function, and the logits differ by more
                than the target's tolerance, 1e-5 of their largest.
        """
        was_training = model.training
        model.eval()
        inputs = self.target.inputs(model, self.sample)
        dense, dense_stored = self.reference
        stored = None
        with experts_computed_by(model, "eager"):  # which takes any size and dtype
            sparse = outputs_of(model, inputs, in_fp32=True)
            if dense_stored is not None:
                sparse_stored = outputs_of(model, inputs, in_fp32=False)
                stored = {
                    "error": sparse_stored.error(dense_stored),
                    "dense_rounding": dense_stored.error(dense),
                }
                if not all(map(math.isfinite, stored.values())):
                    stored = None  # the activations overflow in that dtype
        model.train(was_training)
        error, exactness = sparse.error(dense), self.target.exactness
        if exactness != "not exact" and not error <= self.target.tolerance:
            raise UpcyclingError(
                f"The sparse model's logits differ from the dense model's by {error:.1e} of their "
                f"largest, in fp32; allowed: {self.target.tolerance:.0e}. The conversion of "
                f"{self.source} is not exact; please report it with the model's configuration."
            )
        tensors = model.state_dict()
        return UpcyclingReport(
            source=self.source,
            model_type=self.model_type,
            exactness=exactness,
            options=asdict(self.target.options),
            dtype=str(self.dtype).removeprefix("torch."),
            error=error,
            same_argmax=sparse.same_argmax(dense),
            loss={"dense": dense.loss, "sparse": sparse.loss},
            stored_dtype=stored,
            sample=self.target.sample_size(self.sample),
            parameters={"dense": self.parameters, "sparse": self.target.sparse_parameters(model)},
            frozen=self.target.frozen(model),
            tensors=[
                {
                    "name": name,
                    "shape": list(tensors[name].shape),
                    "kind": origin.kind,
                    "sources": [piece.name for piece in origin.sources],
                }
                for name, origin in plan.items()
            ],
            versions={name: version(name) for name in ("torch", "transformers")},
            target=self.target.name,
            lost_fields=self.target.lost,
            refused_sizes=refused_sizes(model),
        )


def _require_head(model: PreTrainedModel) -> None:
    if model.get_output_embeddings() is None:
        raise ValueError(
            f"{type(model).__name__} has no language modeling head; load the dense model with "
            "AutoModelForImageTextToText or AutoModelForCausalLM."
        )


def _require_exact_split(split: int, dtype: torch.dtype) -> None:
    """Refuse a split whose factor on `down_proj` the dtype would round."""
    if dtype in HALF and split & (split - 1):
        raise ValueError(
            f"`expert_split` is {split}: each shard's weights are multiplied by it, which {dtype} "
            "rounds; allowed: powers of two, or a source that is loaded in fp32."
        )


@dataclass(frozen=True)
class NativeUpcycling:
    """A native sparse model in memory, and the report of its conversion."""

    model: PreTrainedModel
    report: UpcyclingReport


def native_model(
    dense: Dense,
    num_experts: int,
    num_experts_per_tok: int,
    sample: Sample | None = None,
    **options: Any,
) -> NativeUpcycling:
    """Make, in memory, the sparse model of the dense model's own family, and check it.

    Args:
        dense: a loaded model, a folder or a Hub id.
        num_experts, num_experts_per_tok: copies of the dense MLP in each sparse layer, and those
            that each token is routed to.
        sample: inputs for the comparison, as the dense model takes them; else they are drawn.
        options: those of `Upcycling`.

    Raises:
        ValueError: there is no exact native version; the message gives the reason.
        UpcyclingError: the logits differ by more than 1e-5 of their largest, in fp32.
    """
    asked = Upcycling.of(num_experts, num_experts_per_tok, **options)
    conversion = Conversion.begin(dense, asked, target=NativeTarget.name, sample=sample)
    with torch.device("meta"):
        skeleton = conversion.target.model_class(conversion.config)
    tied = set(skeleton.all_tied_weights_keys)
    plan = conversion.plan({n: t for n, t in skeleton.state_dict().items() if n not in tied})
    own = {"memory_format": torch.contiguous_format}  # neither the dense model's memory nor a view
    made = {name: origin.tensor(conversion.weights).clone(**own) for name, origin in plan.items()}
    conversion.weights = {}
    model = conversion.target.model_class.from_pretrained(
        None, config=conversion.config, state_dict=made, dtype=conversion.dtype
    )
    # It was given under the names in memory; it is saved under the published ones all the same.
    model._weight_conversions = None
    model.name_or_path = model.config._name_or_path = ""  # "None" would be looked for on the Hub
    model.generation_config = copy.deepcopy(conversion.generation_config)
    report = conversion.check(model.eval(), plan)
    suit_experts(model)
    return NativeUpcycling(model, report)


def converted(
    model_class: type[VLMoEForConditionalGeneration], conversion: Conversion
) -> VLMoEForConditionalGeneration:
    """Make the sparse model in memory and check it; its report is its `upcycling_report`."""
    with no_init_weights():
        model = model_class._from_config(conversion.config, dtype=conversion.dtype)
    model.tie_weights()
    plan = conversion.fill(model)
    conversion.weights = {}
    if conversion.generation_config is not None:
        model.generation_config = copy.deepcopy(conversion.generation_config)
        model.suppress_image_tokens()
    model.eval()
    model.upcycling_report = conversion.check(model, plan)
    return model


def from_dense(
    model_class: type[VLMoEForConditionalGeneration],
    dense: Dense,
    num_experts: int,
    num_experts_per_tok: int,
    sample: Sample | None = None,
    **options: Any,
) -> VLMoEForConditionalGeneration:
    """Make a sparse model that computes what a dense vision-language model computes.

    `VLMoEForConditionalGeneration.from_dense` calls it with its class.

    Args:
        model_class: of the result.
        dense: Llava, InternVL, Idefics3 or SmolVLM, or a VLMoE without experts: a loaded model, a
            local folder or a Hub id.
        num_experts, num_experts_per_tok: copies of the dense MLP in each sparse layer, and those
            that a token is sent to.
        sample: inputs to compare the two models on, by default drawn pictures and random words.
        **options: those of `Upcycling` in options.py, and fields of the configuration.

    The result's `upcycling_report` holds the measured error; `save_pretrained` saves it.

    Raises:
        ValueError: the model does not fit exactly, or an option is not allowed.
        UpcyclingError: the logits differ by more than 1e-5 of their largest, in fp32.
    """
    asked = Upcycling.of(num_experts, num_experts_per_tok, **options)
    return converted(model_class, Conversion.begin(dense, asked, sample=sample))


def from_vision_text(
    model_class: type[VLMoEForConditionalGeneration],
    vision: Dense,
    text: Dense,
    num_experts: int,
    num_experts_per_tok: int,
    image_token_id: int | None = None,
    connector: Mapping[str, Any] | None = None,
    sample: Sample | None = None,
    **options: Any,
) -> VLMoEForConditionalGeneration:
    """Make a sparse model of a vision encoder and a language model, with a new connector.

    On text it computes what the language model computes; it has to learn to see.
    `VLMoEForConditionalGeneration.from_vision_text` calls it with its class.

    Args:
        model_class: of the result.
        vision: a vision encoder, or a dual one such as CLIP, whose vision half is taken.
        text: a causal language model, whose dtype the result has.
        num_experts, num_experts_per_tok: as in `from_dense`.
        image_token_id: by default a new token after the last.
        connector: fields of `VLMoEConfig` for features and connector.
        sample, **options: as in `from_dense`.

    Embeddings of new tokens are the mean of the others, and generation suppresses the tokens.
    """
    asked = Upcycling.of(num_experts, num_experts_per_tok, **options)
    begun = Conversion.begin_vision_text(
        vision, text, asked, image_token_id=image_token_id, connector=connector, sample=sample
    )
    return converted(model_class, begun)

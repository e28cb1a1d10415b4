# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Convert a dense vision-language model, or an encoder and a language model, to a sparse one.

`Conversion` goes through three states, so that the two models need not be in memory together: the
dense model answers a sample; then each tensor of the sparse model can be made; then the sparse
model answers the sample too, and the report is written.
"""

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any, Self

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from ..configuration.configuration_vlmoe import VLMoEConfig
from ..modeling_vlmoe.active_parameters import active_parameters
from ..modeling_vlmoe.modeling_vlmoe import VLMoEForConditionalGeneration
from ..modeling_vlmoe.vision_tower import unused_vision_parameters
from ..modeling_vlmoe.whole_weights import NotWholeError, weight_problems
from ..processing.processing_vlmoe import VLMoEProcessor
from .dense_configs import text_fields, vision_fields, vlmoe_fields
from .dense_models import Dense, is_tied, load_dense
from .exactness import TOLERANCE, Outputs, UpcyclingError, outputs_of
from .options import Upcycling
from .report import UpcyclingReport
from .sample import drawn_sample, prepared_sample
from .weight_plan import DECODER, EMBEDDING, HEAD, Origin, dense_pieces, plan_weights

Tensor = torch.Tensor
Sample = Mapping[str, Tensor]
ProcessorFor = Callable[[VLMoEConfig], VLMoEProcessor]
CONNECTOR, TOWER = "model.multi_modal_projector.", "model.vision_tower."
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
        config: of the sparse model.
        generation_config: for the sparse model.
        options: of the conversion.
        dtype: of the dense weights.
        weights: the dense model's tensors, under its own names; released before the sparse model
            is loaded.
        sample: the inputs on which both models are compared.
        reference: the dense model's outputs in fp32 and, if that is another, in its own dtype.
        parameters: of the dense model.
        processor: for the sparse model, if one was asked for.
        new_parts: as in `plan_weights`.
    """

    source: str
    model_type: str
    config: VLMoEConfig
    generation_config: GenerationConfig | None
    options: Upcycling
    dtype: torch.dtype
    weights: dict[str, Tensor]
    sample: Sample
    reference: tuple[Outputs, Outputs | None]
    parameters: dict[str, int]
    processor: VLMoEProcessor | None = None
    new_parts: tuple[str, ...] = ()

    @classmethod
    def begin(
        cls,
        dense: Dense,
        options: Upcycling,
        *,
        sample: Sample | None = None,
        processor_for: ProcessorFor | None = None,
    ) -> Self:
        """Read a dense vision-language model and run it on a sample.

        Args:
            dense: a loaded model, a folder or a Hub id.
            options: of the conversion.
            sample: inputs for the comparison, as `VLMoEProcessor` makes them.
            processor_for: makes the sparse model's processor from its configuration. Without a
                `sample` the processor encodes drawn pictures and fixed texts; without both, pixels
                are drawn and tokens are random.
        """
        model, source, _ = load_dense(dense)
        config = options.sparse_config(vlmoe_fields(model.config, is_tied(model)))
        weights = dict(model.state_dict())
        return cls._of(model, source, config, weights, options, sample, processor_for)

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
            config,
            weights,
            options,
            sample,
            processor_for,
            new_parts=(CONNECTOR,),
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
        config: VLMoEConfig,
        weights: dict[str, Tensor],
        options: Upcycling,
        sample: Sample | None,
        processor_for: ProcessorFor | None,
        new_parts: tuple[str, ...] = (),
    ) -> Self:
        was_training = model.training
        model.eval()
        processor = None if processor_for is None else processor_for(config)
        if sample is None and processor is not None:
            sample = prepared_sample(processor, with_images=not new_parts)
        elif sample is None:
            sample = drawn_sample(model, config, with_images=not new_parts)
        in_fp32 = outputs_of(model, sample, in_fp32=True)
        stored = None
        if model.dtype != torch.float32:
            stored = outputs_of(model, sample, in_fp32=False)
        model.train(was_training)
        config.dtype = model.dtype
        return cls(
            source=source,
            model_type=model.config.model_type,
            config=config,
            generation_config=getattr(model, "generation_config", None),
            options=options,
            dtype=model.dtype,
            weights=weights,
            sample=sample,
            reference=(in_fp32, stored),
            parameters=_count_dense(weights, config),
            processor=processor,
            new_parts=new_parts,
        )

    def plan(self, target: Mapping[str, Tensor]) -> dict[str, Origin]:
        """Find the origin of each of the sparse model's tensors; see `plan_weights`."""
        return plan_weights(
            target, self.weights, self.config, self.options, self.dtype, self.new_parts
        )

    @torch.no_grad()
    def fill(self, model: VLMoEForConditionalGeneration) -> dict[str, Origin]:
        """Copy the weights into a sparse model, and return their origins."""
        target = model.state_dict()
        plan = self.plan(target)
        for name, origin in plan.items():
            target[name].copy_(origin.tensor(self.weights))
        return plan

    def check(
        self, model: VLMoEForConditionalGeneration, plan: Mapping[str, Origin]
    ) -> UpcyclingReport:
        """Run the sparse model on the sample and report.

        Raises:
            UpcyclingError: the options promise the dense function, and the logits differ by more
                than 1e-5 of their largest.
        """
        was_training = model.training
        model.eval()
        implementation = model.config._experts_implementation
        model.set_experts_implementation("eager")  # which takes any size and dtype
        sparse = outputs_of(model, self.sample, in_fp32=True)
        dense, dense_stored = self.reference
        stored = None
        if dense_stored is not None:
            sparse_stored = outputs_of(model, self.sample, in_fp32=False)
            stored = {
                "error": sparse_stored.error(dense_stored),
                "dense_rounding": dense_stored.error(dense),
            }
            if not all(map(math.isfinite, stored.values())):
                stored = None  # the activations overflow in that dtype
        model.set_experts_implementation(implementation)
        model.train(was_training)
        error = sparse.error(dense)
        if self.options.exactness != "not exact" and not error <= TOLERANCE:
            raise UpcyclingError(
                f"The sparse model's logits differ from the dense model's by {error:.1e} of their "
                f"largest, in fp32; allowed: {TOLERANCE:.0e}. The conversion of {self.source} is "
                "not exact; please report it with the model's configuration."
            )
        tiles = self.sample.get("pixel_attention_mask")
        shown = 0 if tiles is None else int(tiles.flatten(0, 1).flatten(1).any(-1).sum())
        real, target = self.sample["attention_mask"], model.state_dict()
        return UpcyclingReport(
            source=self.source,
            model_type=self.model_type,
            exactness=self.options.exactness,
            options=asdict(self.options),
            dtype=str(self.dtype).removeprefix("torch."),
            error=error,
            same_argmax=sparse.same_argmax(dense),
            loss={"dense": dense.loss, "sparse": sparse.loss},
            stored_dtype=stored,
            sample={"rows": len(real), "images": shown, "tokens": int(real.sum())},
            parameters={"dense": self.parameters, "sparse": active_parameters(model)},
            frozen=list(model.model.unused_vision_parameters),
            tensors=[
                {
                    "name": name,
                    "shape": list(target[name].shape),
                    "kind": origin.kind,
                    "sources": [piece.name for piece in origin.sources],
                }
                for name, origin in plan.items()
            ],
            versions={name: version(name) for name in ("torch", "transformers")},
        )


def _count_dense(weights: Mapping[str, Tensor], config: VLMoEConfig) -> dict[str, int]:
    """Count the parameters of the dense model, as `active_parameters` does."""
    pieces = dense_pieces(weights, config)
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
    """Convert in memory; see `VLMoEForConditionalGeneration.from_dense`."""
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
    """Convert in memory; see `VLMoEForConditionalGeneration.from_vision_text`."""
    asked = Upcycling.of(num_experts, num_experts_per_tok, **options)
    begun = Conversion.begin_vision_text(
        vision, text, asked, image_token_id=image_token_id, connector=connector, sample=sample
    )
    return converted(model_class, begun)

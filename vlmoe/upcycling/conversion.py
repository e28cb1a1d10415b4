# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""From a dense vision-language model, or an encoder and a language model, to a sparse one.

`Conversion` goes through three states, so that the two models need not be in memory together: with
the dense model at hand it computes what that says of a sample; then each tensor of the sparse
model can be made; then the sparse model is checked against the sample and the report is written.
"""

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GenerationConfig,
    PreTrainedModel,
)
from transformers.initialization import no_init_weights

from ..configuration.configuration_vlmoe import VLMoEConfig
from ..hub.finite_weights import require_finite
from ..hub.meta_loading import meta_device_map, quietly
from ..modeling_vlmoe.active_parameters import active_parameters
from ..modeling_vlmoe.vision_tower import unused_vision_parameters
from ..modeling_vlmoe.whole_weights import (
    NotWholeError,
    damaged_file,
    untied,
    weight_problems,
)
from .dense_configs import text_fields, vision_fields, vlmoe_fields
from .exactness import TOLERANCE, Outputs, UpcyclingError, drawn_sample, outputs_of
from .options import Upcycling
from .report import UpcyclingReport
from .weight_plan import DECODER, EMBEDDING, HEAD, Origin, dense_pieces, plan_weights

Tensor = torch.Tensor
SampleFor = Callable[[VLMoEConfig], Mapping[str, Tensor] | None]
CONNECTOR, TOWER = "model.multi_modal_projector.", "model.vision_tower."
CONNECTOR_FIELDS = (
    *("vision_feature_layer", "vision_use_last_hidden_state", "vision_feature_select_strategy"),
    *("pixel_shuffle_factor", "projector_layer_norm", "projector_num_layers"),
    *("projector_hidden_act", "multimodal_projector_bias"),
)
MODEL_CLASSES = {
    "image-text": AutoModelForImageTextToText,
    "text": AutoModelForCausalLM,
    "vision": AutoModel,
}


def load_dense(source: Any, kind: str = "image-text") -> tuple[Any, str, set[str]]:
    """A dense model in evaluation mode, what to call it, and the tensors that were made up for it.

    The last are of vision encoders alone, which are often saved without their pooling head.

    Args:
        source: a loaded model, a folder or a Hub id.
        kind: "image-text", "text" or "vision".

    Raises:
        ValueError: the model is quantised, an adapter sits on it, its weights are not those that
            its config describes, or not finite.
        OSError: a file is missing or damaged.
    """
    if isinstance(source, (str, Path)):
        model, missing = _loaded(source, kind)
        require_finite(model.state_dict().items(), str(source))
        return model.eval(), str(source), missing
    name = type(source).__name__
    if not isinstance(source, PreTrainedModel):
        raise ValueError(
            f"`dense` is a {name}; allowed: a model of transformers, a folder or a Hub id. "
            "Merge an adapter first (merge_and_unload)."
        )
    _refuse_quantized(source.config, name)
    if not all(p.is_floating_point() and p.dtype.itemsize > 1 for p in source.parameters()):
        raise ValueError(f"{name} has weights of less than 16 bits; load it without quantisation.")
    for buffer_name, buffer in source.named_buffers():
        if buffer_name.endswith("inv_freq") and buffer.dtype != torch.float32:
            raise ValueError(
                f"{name}'s rotary table {buffer_name} was rounded to {buffer.dtype}, by `.to` or "
                "`.half`; load the model with from_pretrained(..., dtype=...), which keeps it."
            )
    require_finite(source.state_dict().items(), name)
    return source, name, set()


def _loaded(source: str | Path, kind: str) -> tuple[Any, set[str]]:
    """The model, and what was missing of a vision encoder; its folder may hold a whole model."""
    _refuse_quantized(AutoConfig.from_pretrained(source), str(source))
    load = MODEL_CLASSES[kind].from_pretrained
    judged = {"output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        with quietly():
            model, info = load(source, dtype="auto", device_map=meta_device_map(), **judged)
        missing, is_part = untied(model, info["missing_keys"]), kind == "vision"
        problems = weight_problems(
            () if is_part else missing,
            () if is_part else info["unexpected_keys"],
            info["mismatched_keys"],
        )
        if problems:
            raise NotWholeError(str(source), type(model).__name__, problems)
        return load(source, dtype="auto"), missing
    except SafetensorError as error:
        raise OSError(damaged_file(source, error)) from error


def _refuse_quantized(config: Any, name: str) -> None:
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        return
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    method = getattr(method, "quant_method", method)
    raise ValueError(
        f"{name} is quantised ({getattr(method, 'value', method)}): its weights cannot be copied "
        "into experts exactly. Start from the unquantised model."
    )


def _is_tied(model: Any) -> bool:
    """Whether the language modelling head is the token embedding."""
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


@dataclass
class Conversion:
    """A conversion on its way; see `begin`.

    Attributes:
        source, model_type: as in the report.
        config: of the sparse model.
        generation_config: for the sparse model.
        options: what was asked for.
        dtype: of the dense weights.
        weights: the dense model's tensors, under its own names; gone when the sparse model comes.
        sample: inputs that both models are asked.
        reference: what the dense model says of them, in fp32 and, if that is another, in its dtype.
        parameters: of the dense model.
        new_parts: as in `plan_weights`.
    """

    source: str
    model_type: str
    config: VLMoEConfig
    generation_config: Any
    options: Upcycling
    dtype: torch.dtype
    weights: dict[str, Tensor]
    sample: Mapping[str, Tensor]
    reference: tuple[Outputs, Outputs | None]
    parameters: dict[str, int]
    new_parts: tuple[str, ...] = ()

    @classmethod
    def begin(
        cls,
        dense: Any,
        options: Upcycling,
        sample_for: SampleFor = lambda config: None,
    ) -> "Conversion":
        """Read a dense vision-language model and ask it the sample.

        Args:
            dense: a loaded model, a folder or a Hub id.
            options: what is asked for.
            sample_for: from the sparse model's configuration makes inputs, as VLMoE's processor
                does; for None they are drawn pictures and random words.
        """
        model, source, _ = load_dense(dense)
        config = options.sparse_config(vlmoe_fields(model.config, _is_tied(model)))
        weights = dict(model.state_dict())
        return cls._of(model, source, config, weights, options, sample_for(config))

    @classmethod
    def begin_vision_text(
        cls,
        vision: Any,
        text: Any,
        options: Upcycling,
        image_token_id: int | None = None,
        connector: Mapping[str, Any] | None = None,
        sample_for: SampleFor = lambda config: None,
    ) -> "Conversion":
        """Read a vision encoder and a language model, and ask the latter the sample.

        For the arguments see `VLMoEForConditionalGeneration.from_vision_text` and `begin`.
        """
        encoder, vision_source, missing = load_dense(vision, "vision")
        if hasattr(encoder, "vision_model"):  # of a dual encoder, such as CLIP
            encoder = encoder.vision_model
            missing = {name.removeprefix("vision_model.") for name in missing}
        model, text_source, _ = load_dense(text, "text")
        old_size = model.get_input_embeddings().weight.shape[0]
        image_token_id = old_size if image_token_id is None else image_token_id
        text_config = text_fields(model.config, _is_tied(model))
        text_config["vocab_size"] = max(old_size, image_token_id + 1)
        for name in connector or {}:
            if name not in CONNECTOR_FIELDS:
                allowed = ", ".join(CONNECTOR_FIELDS)
                raise ValueError(f"`connector` has the field {name!r}; allowed: {allowed}.")
        dense = dict(connector or {}) | {
            "text_config": text_config,
            "vision_config": vision_fields(encoder.config),
            "image_token_id": image_token_id,
            "tie_word_embeddings": _is_tied(model),
        }
        tower = encoder.state_dict()
        weights = {f"{TOWER}{name}": tensor.to(model.dtype) for name, tensor in tower.items()}
        weights |= model.state_dict()
        config = options.sparse_config(dense)
        if needed := missing & set(tower) - set(unused_vision_parameters(config)):
            raise NotWholeError(vision_source, type(encoder).__name__, weight_problems(needed, ()))
        sample, source = sample_for(config), f"{vision_source} + {text_source}"
        begun = cls._of(model, source, config, weights, options, sample, (CONNECTOR,))
        generation = copy.deepcopy(begun.generation_config) or GenerationConfig()
        new = range(old_size, text_config["vocab_size"])
        generation.suppress_tokens = sorted({image_token_id, *new})
        begun.generation_config = generation
        return begun

    @classmethod
    def _of(
        cls,
        model: Any,
        source: str,
        config: VLMoEConfig,
        weights: dict[str, Tensor],
        options: Upcycling,
        sample: Mapping[str, Tensor] | None,
        new_parts: tuple[str, ...] = (),
    ) -> "Conversion":
        was_training = model.training
        model.eval()
        if sample is None:
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
            new_parts=new_parts,
        )

    def plan(self, target: Mapping[str, Tensor]) -> dict[str, Origin]:
        """The origin of each of the sparse model's tensors; see `plan_weights`."""
        return plan_weights(
            target, self.weights, self.config, self.options, self.dtype, self.new_parts
        )

    @torch.no_grad()
    def fill(self, model: Any) -> dict[str, Origin]:
        """Give a sparse model its weights, and return where they come from."""
        target = model.state_dict()
        plan = self.plan(target)
        for name, origin in plan.items():
            target[name].copy_(origin.tensor(self.weights))
        return plan

    def check(self, model: Any, tensors: list[dict[str, Any]]) -> UpcyclingReport:
        """Ask the sparse model the sample and report.

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
                stored = None  # their dtype is too small for what the model computes
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
        real = self.sample["attention_mask"]
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
            tensors=tensors,
            versions={name: version(name) for name in ("torch", "transformers")},
        )


def _count_dense(weights: Mapping[str, Tensor], config: VLMoEConfig) -> dict[str, int]:
    """Parameters of the dense model, counted as `active_parameters` does."""
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


def described(plan: Mapping[str, Origin], target: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """The tensors of a report."""
    return [
        {
            "name": name,
            "shape": list(target[name].shape),
            "kind": origin.kind,
            "sources": [piece.name for piece in origin.sources],
        }
        for name, origin in plan.items()
    ]


def converted(model_class: Any, conversion: Conversion) -> Any:
    """The sparse model in memory, checked; its report is its `upcycling_report`."""
    with no_init_weights():
        model = model_class._from_config(conversion.config, dtype=conversion.dtype)
    model.tie_weights()
    plan = conversion.fill(model)
    conversion.weights = {}
    if conversion.generation_config is not None:
        model.generation_config = copy.deepcopy(conversion.generation_config)
        model.suppress_image_tokens()
    model.eval()
    model.upcycling_report = conversion.check(model, described(plan, model.state_dict()))
    return model


def from_dense(
    model_class: Any,
    dense: Any,
    num_experts: int,
    num_experts_per_tok: int,
    sample: Mapping[str, Tensor] | None = None,
    **options: Any,
) -> Any:
    """See `VLMoEForConditionalGeneration.from_dense`."""
    asked = Upcycling.of(num_experts, num_experts_per_tok, **options)
    return converted(model_class, Conversion.begin(dense, asked, lambda config: sample))


def from_vision_text(
    model_class: Any,
    vision: Any,
    text: Any,
    num_experts: int,
    num_experts_per_tok: int,
    image_token_id: int | None = None,
    connector: Mapping[str, Any] | None = None,
    sample: Mapping[str, Tensor] | None = None,
    **options: Any,
) -> Any:
    """See `VLMoEForConditionalGeneration.from_vision_text`."""
    asked = Upcycling.of(num_experts, num_experts_per_tok, **options)
    parts = vision, text, asked, image_token_id, connector
    return converted(model_class, Conversion.begin_vision_text(*parts, lambda config: sample))

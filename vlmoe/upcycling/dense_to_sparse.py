# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Turn a dense model, named by folder or Hub id, into the folder of a sparse one."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, ProcessorMixin
from transformers.utils import logging

from ..configuration.configuration_vlmoe import VLMoEConfig
from ..hub.input_errors import reading
from ..hub.meta_loading import quietly
from ..hub.provenance import saved_model
from ..hub.saved_model import Source
from ..hub.template_trial import try_templates
from ..processing.processing_vlmoe import VLMoEProcessor
from .companion_files import companion_files
from .conversion import Conversion
from .dense_models import MODEL_CLASSES, dense_config, kind_of
from .dense_processor import add_image_token
from .folder import source_fingerprint, upcycle_folder
from .image_parts import with_image_parts
from .native_sample import source_processor
from .native_target import NativeTarget
from .options import Upcycling
from .report import UpcyclingReport
from .target import Processor
from .vlmoe_target import VLMoETarget

logger = logging.get_logger(__name__)

JOINED = "a vision encoder and a language model are joined"
TARGETS = (NativeTarget.name, VLMoETarget.name)


@dataclass(frozen=True)
class UpcyclingResult:
    """The outcome of an upcycling.

    Attributes:
        folder: of the sparse model, its processor, card and report.
        report: the measured error, parameters, and the origin of each tensor.
    """

    folder: Path
    report: UpcyclingReport


@dataclass(frozen=True)
class _Request:
    """Arguments of one upcycling, after they were checked."""

    sources: list[str]  # the dense model, or a language model and a vision encoder
    options: Upcycling
    target: str
    not_native: str | None
    connector: dict[str, Any]
    chat_template: str | None

    @property
    def is_native(self) -> bool:
        return self.target == NativeTarget.name

    def as_json(self) -> dict[str, Any]:
        """Return what a killed run and the one that continues it have in common."""
        return asdict(self.options) | {
            "target": self.target,
            "sources": self.sources,
            "connector": self.connector,
            "chat_template": self.chat_template,
            "files": [source_fingerprint(each) for each in self.sources],
        }

    def begin(self) -> Conversion:
        source, template = self.sources[0], self.chat_template
        with _reading(self.sources):
            if len(self.sources) > 1:
                vision = self.sources[1]
                return _begin_vision_text(source, vision, self.options, self.connector, template)
            make = _native_processor if self.is_native else _processor_of_dense
            with _naming(self.not_native):
                return Conversion.begin(
                    source,
                    self.options,
                    target=self.target,
                    processor_for=partial(make, source, template),
                )


def upcycle(
    source: Source,
    output_dir: Source,
    *,
    target: str | None = None,
    vision: Source | None = None,
    num_experts: int = 8,
    num_experts_per_tok: int = 2,
    connector: Mapping[str, Any] | None = None,
    chat_template: str | None = None,
    max_shard_size: str = "5GB",
    **options: Any,
) -> UpcyclingResult:
    """Turn a dense model into a sparse one that computes the same function.

    Both models run on the same images and texts, but are never in memory together. A run that was
    killed continues when it is started again. See also `VLMoEForConditionalGeneration.from_dense`.

    Args:
        source: folder or Hub id of a dense vision-language or language model.
        output_dir: the folder to make; it must be empty or absent.
        target: "native", the sparse class of the family, which plain transformers loads, or
            "vlmoe"; by default native where it is exact and takes the options. The report's
            `not_native` says why not.
        vision: a vision encoder to join to the language model `source`; the result is a VLMoE.
        num_experts, num_experts_per_tok: in each sparse layer, and those that a token is routed to.
        connector: with `vision`, fields of `VLMoEConfig` for features and connector, which is new.
        chat_template: the text of a Jinja template that replaces the source's.
        max_shard_size: of a weights file.
        options: `expert_split`, `expert_init`, `sparse_layers` and the other options of
            vlmoe/upcycling/options.py, and fields of the config such as `router_aux_loss_coef`.

    Raises:
        ValueError: the model does not fit exactly, an option is wrong, or the folder is in use.
        UpcyclingError: the logits differ by more than 1e-5 of their largest, in fp32.
        OSError: a file is missing or damaged, or the disk is full; finished shards are kept.
    """
    asked = Upcycling.of(num_experts, num_experts_per_tok, **options)
    if connector and vision is None:
        raise ValueError("`connector` is for `vision`: a whole model keeps its connector.")
    sources = [_place(each) for each in (source, vision) if each is not None]
    with _reading(sources):
        chosen = _chosen_target(sources, asked, target)
    folder = Path(output_dir).expanduser()
    request = _Request(sources, asked, *chosen, dict(connector or {}), chat_template)
    report = upcycle_folder(
        request.begin,
        folder,
        request.as_json(),
        bases=[saved_model(each) for each in sources],
        files=partial(companion_files, sources[0], chat_template) if request.is_native else None,
        not_native=request.not_native,
        max_shard_size=max_shard_size,
    )
    return UpcyclingResult(folder, report)


def _reading(sources: Sequence[str]) -> AbstractContextManager[None]:
    """Name the sources in errors that do not say what is wrong with them."""
    return reading(" and ".join(sources), keep=(ValueError, OSError, ImportError))


def _place(source: Source) -> str:
    """Expand `~` in a path; a Hub id stays as it is."""
    path = Path(source).expanduser()
    return str(path) if path.exists() else str(source)


def _chosen_target(
    sources: Sequence[str], asked: Upcycling, target: str | None
) -> tuple[str, str | None]:
    """Return the target and, where VLMoE is not asked for but taken, the reason.

    Raises:
        ValueError: there is no such target, or none that joins two models.
    """
    if target not in (None, *TARGETS):
        raise ValueError(f"`target` is {target!r}; allowed: {', '.join(TARGETS)}.")
    if len(sources) > 1:
        if target == NativeTarget.name:
            raise ValueError(
                "`target` is 'native' with `vision`: a vision encoder joined to a language model "
                "has no class of its own in transformers; allowed: vlmoe."
            )
        return VLMoETarget.name, None if target else JOINED
    if target is not None:
        return target, None
    problem = native_problem(dense_config(sources[0]), asked)
    return NativeTarget.name if problem is None else VLMoETarget.name, problem


def native_problem(dense: PreTrainedConfig, options: Upcycling) -> str | None:
    """Return why there is no exact native version that takes the options; None if there is one.

    Nothing is loaded: the weights are planned on models without memory.
    """
    try:
        target = NativeTarget.for_dense(dense, options)
        with torch.device("meta"), quietly():
            model = MODEL_CLASSES[kind_of(dense)].from_config(dense)
            sparse = target.model_class(copy.deepcopy(target.config))
        weights, skeleton = (
            {n: t for n, t in each.state_dict().items() if n not in each.all_tied_weights_keys}
            for each in (model, sparse)
        )
        target.plan(skeleton, weights, torch.float32)
    except ValueError as error:
        return str(error).partition(" Allowed:")[0].removesuffix(".")
    return None


@contextmanager
def _naming(not_native: str | None) -> Iterator[None]:
    """Add, to a refusal by VLMoE, why the sparse model is not native."""
    try:
        yield
    except ValueError as error:
        is_refusal = type(error) is ValueError  # not a damaged model, nor a measured difference
        if not is_refusal or not_native is None or "'vlmoe'" in not_native:
            raise
        raise ValueError(f"{error} Nor is there a native version: {not_native}.") from error


def _native_processor(
    source: str, template: str | None, config: PreTrainedConfig
) -> Processor | None:
    """Load the source's processor for the comparison; its files are copied as they are."""
    processor = source_processor(source)
    if hasattr(config, "vision_config") and not isinstance(processor, ProcessorMixin | None):
        logger.warning(
            f"{source} has a tokenizer, but no processor that transformers knows. The two models "
            "are compared on random pixels and words instead."
        )
        processor = None
    if processor is not None:
        given = template or processor.chat_template
        try_templates(given, source if template is None else "`chat_template`")
    return processor


def _processor_of_dense(source: str, template: str | None, config: VLMoEConfig) -> VLMoEProcessor:
    if AutoConfig.from_pretrained(source).model_type == config.model_type:
        processor = VLMoEProcessor.from_pretrained(source)  # of a VLMoE without experts
    else:
        processor = VLMoEProcessor.from_dense(source, config)
    processor.chat_template = template or processor.chat_template
    try_templates(processor.chat_template, source if template is None else "`chat_template`")
    return processor


def _begin_vision_text(
    text: str,
    vision: str,
    asked: Upcycling,
    connector: Mapping[str, Any] | None,
    template: str | None,
) -> Conversion:
    tokenizer = AutoTokenizer.from_pretrained(text)
    image_token_id = add_image_token(tokenizer)

    def processor_for(config: VLMoEConfig) -> VLMoEProcessor:
        given = template or tokenizer.chat_template
        given = with_image_parts(given) if isinstance(given, str) else given
        try_templates(given, text if template is None else "`chat_template`")
        return VLMoEProcessor.for_config(config, tokenizer, chat_template=given)

    return Conversion.begin_vision_text(
        vision,
        text,
        asked,
        image_token_id=image_token_id,
        connector=connector,
        processor_for=processor_for,
    )

# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Turn a dense model, named by folder or Hub id, into the folder of a sparse one."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer

from ..configuration.configuration_vlmoe import VLMoEConfig
from ..hub.input_errors import reading
from ..hub.provenance import saved_model
from ..hub.saved_model import Source
from ..hub.template_trial import try_templates
from ..processing.processing_vlmoe import VLMoEProcessor
from .conversion import Conversion
from .dense_processor import add_image_token
from .folder import source_fingerprint, upcycle_folder
from .image_parts import with_image_parts
from .options import Upcycling
from .report import UpcyclingReport


@dataclass(frozen=True)
class UpcyclingResult:
    """The outcome of an upcycling.

    Attributes:
        folder: of the sparse model, its processor, card and report.
        report: the measured error, parameters, and the origin of each tensor.
    """

    folder: Path
    report: UpcyclingReport


def upcycle(
    source: Source,
    output_dir: Source,
    *,
    vision: Source | None = None,
    num_experts: int = 8,
    num_experts_per_tok: int = 2,
    connector: Mapping[str, Any] | None = None,
    chat_template: str | None = None,
    max_shard_size: str = "5GB",
    **options: Any,
) -> UpcyclingResult:
    """Turn a dense model into a sparse one that computes the same function.

    Model, processor and generation config are converted, and both models run on the same images
    and texts. The two are never in memory together, and a run that was killed continues when it is
    started again. In memory, `VLMoEForConditionalGeneration.from_dense` does the same for a model.

    Args:
        source: a dense vision-language model (Llava, InternVL, Idefics3, SmolVLM), or a language
            model if `vision` is given; a folder or a Hub id.
        output_dir: the folder to make; it must be empty or absent.
        vision: a vision encoder for the language model `source`; the connector is then new.
        num_experts, num_experts_per_tok: copies of the dense MLP in each sparse layer, and those
            that each token is routed to.
        connector: with `vision`, fields of `VLMoEConfig` for features and connector.
        chat_template: the text of a Jinja template that replaces the source's.
        max_shard_size: of a weights file.
        options: `expert_split`, `expert_init`, `sparse_layers` and the other options of
            vlmoe/upcycling/options.py, and fields of the config such as `router_aux_loss_coef`.

    Raises:
        ValueError: the model does not fit exactly, an option has a wrong value, or another process
            makes that folder.
        UpcyclingError: the logits differ by more than 1e-5 of their largest, in fp32.
        OSError: a file is missing or damaged, or the disk is full; finished shards are kept.
    """
    asked = Upcycling.of(num_experts, num_experts_per_tok, **options)
    if connector and vision is None:
        raise ValueError("`connector` is for `vision`: a whole model keeps its connector.")
    sources = [_place(each) for each in (source, vision) if each is not None]
    folder = Path(output_dir).expanduser()
    request = asdict(asked) | {
        "sources": sources,
        "connector": dict(connector or {}),
        "chat_template": chat_template,
        "files": [source_fingerprint(each) for each in sources],
    }

    def begin() -> Conversion:
        with reading(" and ".join(sources), keep=(ValueError, OSError, ImportError)):
            if vision is None:
                make = partial(_processor_of_dense, sources[0], chat_template)
                return Conversion.begin(sources[0], asked, processor_for=make)
            return _begin_vision_text(sources[0], sources[1], asked, connector, chat_template)

    bases = [saved_model(each) for each in sources]
    report = upcycle_folder(begin, folder, request, bases=bases, max_shard_size=max_shard_size)
    return UpcyclingResult(folder, report)


def _place(source: Source) -> str:
    """Expand `~` in a path; a Hub id stays as it is."""
    path = Path(source).expanduser()
    return str(path) if path.exists() else str(source)


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

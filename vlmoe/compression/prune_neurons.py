# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Cut the neurons of zeros off the experts of a saved model, into a new folder.

The model answers drawn pictures and fixed texts, is cut and saved, and answers them again as it is
loaded from its new folder. `GroupLasso` makes such neurons.
"""

import os
import shutil
from importlib.metadata import version
from pathlib import Path

from transformers import PreTrainedModel
from transformers.utils import logging

from ..data.native_collator import NativeCollator
from ..hub.active_parameters import parameter_counts
from ..hub.atomic_files import open_to_readers
from ..hub.experts_implementation import keep_suited
from ..hub.export import publish_layout
from ..hub.folder_lock import new_folder
from ..hub.input_errors import writing
from ..hub.model_card import write_model_card
from ..hub.model_classes import is_native
from ..hub.provenance import REPORT_NAME, STAGES_FILE
from ..hub.saved_model import Processor, Source, load_model, read_processor, require_model_source
from ..upcycling.exactness import TOLERANCE, Outputs, experts_computed_by, inputs_for, outputs_of
from ..upcycling.native_sample import drawn_rows
from ..upcycling.sample import TEXTS, drawn_picture, drawn_sample, prepared_sample
from ..upcycling.target import Sample
from .narrower import banks_to_cut, cut_zero_neurons
from .pruning_report import PruningReport

logger = logging.get_logger(__name__)

ORIGINS = (STAGES_FILE, REPORT_NAME)
"""Files of the source that say where its weights come from."""


class PruningError(ValueError):
    """The pruned model does not compute the function of the one before."""


def prune(model: Source, output_dir: Source, *, max_shard_size: str = "5GB") -> PruningReport:
    """Cut neurons of zeros off the experts of a saved model: the same function, smaller.

    All experts get the width of the widest one, rounded up to a multiple of 8, which grouped_mm
    takes in every dtype. Routers and experts keep their number, also experts of zeros.

    Args:
        model: a folder or a Hub id, of a VLMoE or of a family of transformers whose experts are in
            the usual layout (`neuron_banks.py`).
        output_dir: the folder to make; it must be empty or absent, and appears as a whole.
        max_shard_size: of a weights file.

    Returns:
        The report, which is also saved there, as `pruning_report.json`.

    Raises:
        ValueError: there is no such model, its experts cannot be cut, or there is nothing to cut.
        PruningError: the logits differ by more than 1e-5 of their largest, in fp32.
        OSError: the folder cannot be written.
    """
    require_model_source(model)
    with new_folder(output_dir) as target:
        staging = target.with_name(f".{target.name}.pruning")
        shutil.rmtree(staging, ignore_errors=True)
        try:
            report = _pruned(model, staging, max_shard_size)
            write_model_card(staging, metadata={"model_name": target.name})
            os.replace(staging, target)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    return report


def _pruned(source: Source, folder: Path, max_shard_size: str) -> PruningReport:
    """Write the smaller model into a folder, check it and report."""
    model, processor = load_model(source).eval(), _processor(source)
    sample = _sample(model, processor)
    was, parameters = _outputs(model, sample), parameter_counts(model)
    width = banks_to_cut(model)[0].width
    neurons = cut_zero_neurons(model)
    model_type, dtype = model.config.model_type, str(model.dtype).removeprefix("torch.")
    with writing(folder):
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        publish_layout(folder)
        open_to_readers(folder)
        if processor is not None:
            processor.save_pretrained(folder)
        for name in ORIGINS:
            if (origin := Path(source).expanduser() / name).is_file():
                shutil.copyfile(origin, folder / name)
    del model  # so that memory holds one
    smaller = load_model(folder).eval()
    now = _outputs(smaller, sample)
    if not (error := now.error(was)) <= TOLERANCE:
        raise PruningError(
            f"The logits of the pruned model differ by {error:.1e} of their largest, in fp32; "
            f"allowed: {TOLERANCE:.0e}. Please report it with the configuration of {source}."
        )
    keep_suited(folder, smaller)
    real = sample["attention_mask"]
    report = PruningReport(
        source=str(source),
        model_type=model_type,
        dtype=dtype,
        width={"before": width, "after": banks_to_cut(smaller)[0].width},
        neurons=neurons,
        error=error,
        same_argmax=now.same_argmax(was),
        loss={"before": was.loss, "after": now.loss},
        sample={"rows": len(real), "tokens": int(real.sum())},
        parameters={"before": parameters, "after": parameter_counts(smaller)},
        versions={name: version(name) for name in ("torch", "transformers")},
    )
    report.save(folder)
    return report


def _outputs(model: PreTrainedModel, sample: Sample) -> Outputs:
    """Run a model on the sample, in fp32, with experts that take any width."""
    inputs = dict(sample) if is_native(model.config) else inputs_for(model, sample)
    with experts_computed_by(model, "eager"):
        return outputs_of(model, inputs, in_fp32=True)


def _sample(model: PreTrainedModel, processor: Processor | None) -> Sample:
    """Encode drawn pictures and fixed texts; without a processor draw pixels and tokens.

    For a model of transformers without a processor, or without a chat template, tokens alone.
    """
    if not is_native(model.config):
        if processor is None:
            return drawn_sample(model, model.config, with_images=True)
        return prepared_sample(processor)
    if getattr(processor, "chat_template", None) is None:
        return drawn_rows(model.config, [[], [], []])
    with_images = hasattr(processor, "tokenizer")  # else it is one
    wide = drawn_picture(640, 360, ("white", "gold", "teal"))
    high = drawn_picture(300, 420, ("navy", "crimson", "olive"))
    pictures = [[wide, high], [high], []] if with_images else [[], [], []]
    rows = [
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "image"}] * len(shown) + [{"type": "text", "text": text}],
                },
                {"role": "assistant", "content": [{"type": "text", "text": "Both."}]},
            ],
            "images": shown,
        }
        for shown, text in zip(pictures, TEXTS, strict=True)
    ]
    batch = NativeCollator(processor)(rows)
    return {name: tensor for name, tensor in batch.items() if name != "labels"}


def _processor(source: Source) -> Processor | None:
    try:
        return read_processor(source)
    except (ImportError, OSError, ValueError) as error:
        logger.warning(
            f"The processor of {source} cannot be loaded ({error}). The models are compared on "
            "random pixels and words, and the pruned one is saved without a processor."
        )
        return None

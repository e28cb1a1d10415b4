# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Add a LoRA adapter to the weights of its base model: a model like any other, without PEFT."""

from pathlib import Path

from peft import PeftModel
from transformers import PreTrainedModel

from ..hub.atomic_files import publish_folder, refuse_mixing, staging_folder
from ..hub.folder_lock import folder_lock
from ..hub.input_errors import writing
from ..hub.saved_model import Source, load_model, read_processor, require_model_source
from ..modeling_vlmoe.quantization import quantized_experts
from .files import adapter_config, load_adapter


def merge_expert_lora(
    adapter: PeftModel | Source,
    output_dir: Source | None = None,
    *,
    base_model: Source | None = None,
) -> PreTrainedModel:
    """Merge an adapter into its base model, and save the result if a folder is given.

    Args:
        adapter: a PEFT model, whose modules are replaced in place, or the folder of an adapter.
        output_dir: folder for the merged model and the processor of its base model.
        base_model: a folder or Hub id, for the folder of an adapter; by default the one that its
            config names.

    Returns:
        The model with merged weights.

    Raises:
        FileNotFoundError: there is no such adapter or model.
        ValueError: the adapter is damaged, of another model, or its merged weights are not finite;
            the experts are quantized; the output folder holds an adapter, or is in use.
        OSError: the output folder cannot be written into.
    """
    if output_dir is None:
        return _merged(adapter, _base_of(adapter, base_model))
    output = Path(output_dir).expanduser()
    refuse_mixing(output, is_adapter=False)
    with folder_lock(output):
        source = _base_of(adapter, base_model)
        if source and output.resolve() == Path(source).expanduser().resolve():
            raise ValueError(f"{output} is the base model itself: choose another output folder.")
        processor = read_processor(source) if source else None
        model = _merged(adapter, source)
        with writing(output):
            staging = staging_folder(output)
            model.save_pretrained(staging)
            if processor is not None:
                processor.save_pretrained(staging)
            publish_folder(staging, output)
    return model


def _base_of(adapter: PeftModel | Source, given: Source | None) -> Source:
    """Return the folder or Hub id of the base model; "" for a model that came from neither."""
    if isinstance(adapter, PeftModel):
        if given is not None:
            raise ValueError("`base_model` is for the folder of an adapter; a PeftModel has one.")
        return adapter.get_base_model().name_or_path
    source = given or adapter_config(adapter).get("base_model_name_or_path")
    if not source:
        raise ValueError(f"{adapter} does not name its base model: give `base_model` (--model).")
    require_model_source(source)
    return source


def _merged(adapter: PeftModel | Source, source: Source) -> PreTrainedModel:
    base = adapter.get_base_model() if isinstance(adapter, PeftModel) else load_model(source)
    if quantized_experts(base):
        raise ValueError(
            f"The experts of {source} are quantized, and LoRA cannot be merged into them: give the "
            "model as it was before quantization as `base_model` (--model)."
        )
    adapted = adapter if isinstance(adapter, PeftModel) else load_adapter(base, adapter)
    return adapted.merge_and_unload(safe_merge=True)

# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Add a LoRA adapter to the weights of its base model, and save the whole model.

    vlmoe merge outputs/adapter --output_dir outputs/merged

The result is a model like any other: it needs neither PEFT nor the adapter.
"""

import sys
from pathlib import Path
from typing import Annotated

import typer

from .commands import run
from .config_file import ConfigFile
from .options import MergeOptions
from .shared_options import place


def main(
    folder: Annotated[str, typer.Argument(parser=place, help="The folder of the adapter.")],
    output_dir: Annotated[
        str,
        typer.Option(
            parser=place, metavar="FOLDER", help="Folder for the merged model and its processor."
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option(
            parser=place,
            help="The base model, a folder or a Hub id (default: the one that the adapter names).",
        ),
    ] = None,
    config: ConfigFile = None,
) -> None:
    """Merge a LoRA adapter into its base model's weights and save the model.

    The merged model loads like any other. It needs neither PEFT nor the adapter.

    examples:
      vlmoe merge outputs/adapter --output_dir outputs/merged
      vlmoe merge outputs/adapter --model user/base --output_dir outputs/merged
    """
    print(f"Saved to {merge(folder, MergeOptions(output_dir, model))}.")


def merge(folder: str | Path, options: MergeOptions) -> Path:
    """Merge, save model and processor; returns where.

    Raises:
        FileNotFoundError: there is no such adapter or model.
        ValueError: the adapter is damaged, of another model, or its merged weights are not finite;
            the model is quantised; the output folder holds an adapter, or is in use.
        OSError: the output folder cannot be written into.
    """
    from vlmoe.hub.atomic_files import refuse_mixing
    from vlmoe.hub.folder_lock import folder_lock

    output = Path(str(options.output_dir))
    refuse_mixing(output, is_adapter=False)
    with folder_lock(output):
        return _merge(folder, output, options.model)


def _merge(folder: str | Path, output: Path, model: str | None) -> Path:
    from vlmoe.hub.atomic_files import publish_folder, staging_folder
    from vlmoe.hub.input_errors import writing
    from vlmoe.lora.files import adapter_config, load_adapter
    from vlmoe.modeling_vlmoe.quantization import quantized_experts

    from .loading import check_model_source, load_model, read_processor

    config = adapter_config(folder)
    source = model or config.get("base_model_name_or_path")
    if not source:
        raise ValueError(f"{folder} does not say what its base model is; give --model.")
    if output.resolve() == Path(source).resolve():
        raise ValueError(f"--output_dir is {output}, the base model itself; choose another folder.")
    check_model_source(source)
    processor = read_processor(source)
    base = load_model(source)
    if quantized_experts(base):
        raise ValueError(
            f"The experts of {source} are quantised, and LoRA cannot be merged into them; give the "
            "model as it was before by --model."
        )
    merged = load_adapter(base, folder).merge_and_unload(safe_merge=True)
    with writing(output):
        staging = staging_folder(output)
        merged.save_pretrained(staging)
        processor.save_pretrained(staging)
        publish_folder(staging, output)
    return output


if __name__ == "__main__":
    sys.exit(run("merge", main))

# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Add a LoRA adapter to the weights of its base model, and save the whole model.

    vlmoe merge outputs/adapter --output_dir outputs/merged

The result is a model like any other: it needs neither PEFT nor the adapter.
"""

import sys
from typing import Annotated

import typer

from .commands import run
from .config_file import ConfigFile
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
    import vlmoe

    vlmoe.merge_expert_lora(folder, output_dir, base_model=model)
    print(f"Saved to {output_dir}.")


if __name__ == "__main__":
    sys.exit(run("merge", main))

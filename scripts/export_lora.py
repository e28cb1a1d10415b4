# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Write a LoRA adapter of experts with one key per expert, as servers read it.

vlmoe export-lora outputs/adapter --output_dir outputs/adapter-per-expert
"""

import sys
from typing import Annotated, Literal

import typer

from .commands import run
from .config_file import ConfigFile
from .shared_options import place


def main(
    folder: Annotated[str, typer.Argument(parser=place, help="The folder of the adapter.")],
    output_dir: Annotated[
        str,
        typer.Option(parser=place, metavar="FOLDER", help="Folder for the exported adapter."),
    ],
    layout: Annotated[
        Literal["per-expert"],
        typer.Option(help="per-expert: one pair of matrices per expert and projection."),
    ] = "per-expert",
    config: ConfigFile = None,
) -> None:
    """Export a LoRA adapter of experts with one key per expert, as servers read it.

    The keys name each expert's projections without the fused bank (`experts.3.gate_proj`).

    examples:
      vlmoe export-lora outputs/adapter --output_dir outputs/adapter-per-expert
    """
    from vlmoe.lora.files import export_per_expert

    pairs = export_per_expert(folder, output_dir)
    print(f"{pairs} pairs of matrices saved to {output_dir}.")


if __name__ == "__main__":
    sys.exit(run("export-lora", main))

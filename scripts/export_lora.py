# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Write a LoRA adapter of experts in the layout of another program.

    vlmoe export-lora outputs/adapter --output_dir outputs/adapter-per-expert

`--layout per-expert` names each expert's projections as they are without the fused bank
(`experts.3.gate_proj`), which is what servers read.
"""

import sys
from pathlib import Path
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
    print(f"{export(folder, output_dir, layout)} pairs of matrices saved to {output_dir}.")


LAYOUTS = ("per-expert",)


def export(folder: str | Path, output: str | Path, layout: str = "per-expert") -> int:
    """Write the adapter; returns the number of pairs of matrices.

    Raises:
        FileNotFoundError: there is no such adapter.
        ValueError: the layout is unknown, the adapter damaged or not one of experts, or the output
            folder holds a model, is the adapter's own, or is in use.
        OSError: the output folder cannot be written into.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"--layout is {layout!r}; allowed: {', '.join(LAYOUTS)}.")
    from vlmoe.hub.atomic_files import refuse_mixing
    from vlmoe.hub.folder_lock import folder_lock
    from vlmoe.lora.files import export_per_expert

    if Path(output).resolve() == Path(folder).resolve():
        raise ValueError(f"--output_dir is {output}, the adapter itself; choose another folder.")
    refuse_mixing(output, is_adapter=True)
    with folder_lock(output):
        return export_per_expert(folder, output)


if __name__ == "__main__":
    sys.exit(run("export-lora", main))

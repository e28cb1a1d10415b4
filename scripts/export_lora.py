# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Write a LoRA adapter of experts in the layout of another program.

    vlmoe export-lora outputs/adapter --output_dir outputs/adapter-per-expert

`--layout per-expert` names each expert's projections as they are without the fused bank
(`experts.3.gate_proj`), which is what servers read.
"""

import sys
from pathlib import Path

from .command_line import run_command
from .option_parser import command_options, require
from .options import ExportLoraOptions

EPILOG = """\
examples:
  vlmoe export-lora outputs/adapter --output_dir outputs/adapter-per-expert"""

LAYOUTS = ("per-expert",)


def main(argv: list[str]) -> None:
    """Run `vlmoe export-lora`."""
    parsed = command_options(
        argv,
        [ExportLoraOptions],
        usage="vlmoe export-lora FOLDER [options]",
        description="Write a LoRA adapter of experts with one key per expert.",
        epilog=EPILOG,
        argument=("folder", "The folder of the adapter."),
    )
    if parsed is None:
        return
    options, rest = parsed
    output = require(options.output_dir, "output_dir", "export-lora")
    print(f"{export(rest.folder, output, options.layout)} pairs of matrices saved to {output}.")


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
    sys.exit(run_command("vlmoe export-lora", main))

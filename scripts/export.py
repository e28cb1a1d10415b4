# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Write a Qwen3-VL-MoE in the layout in which the family publishes its weights.

vlmoe export outputs/trained --output_dir outputs/published
"""

import sys
from typing import Annotated

import typer

from .commands import run
from .config_file import ConfigFile
from .shared_options import place


def main(
    folder: Annotated[str, typer.Argument(parser=place, help="The folder of a saved model.")],
    output_dir: Annotated[
        str, typer.Option(parser=place, metavar="FOLDER", help="Folder for the exported model.")
    ],
    config: ConfigFile = None,
) -> None:
    """Write a Qwen3-VL-MoE in the layout in which the family publishes its weights.

    Servers transpose the banks of experts of this family, as its published weights need it.
    transformers saves them the other way around. Models that VLMoE upcycles or trains have the
    published layout already; those of other families need no export.

    examples:
      vlmoe export outputs/trained --output_dir outputs/published
    """
    import vlmoe

    exported = vlmoe.export(folder, output_dir)
    print(f"{exported.banks} banks of experts transposed. Saved to {output_dir}.")


if __name__ == "__main__":
    sys.exit(run("export", main))

# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Cut neurons of zeros off the experts of a model, exactly.

vlmoe train --model outputs/tiny --dataset my_data --group_lasso 1.2 --output_dir outputs/lasso
vlmoe prune outputs/lasso --output_dir outputs/pruned
"""

import sys
from typing import Annotated

import typer

from .commands import run
from .config_file import ConfigFile
from .shared_options import place


def main(
    model: Annotated[
        str, typer.Argument(parser=place, help="A saved model with experts, folder or Hub id.")
    ],
    output_dir: Annotated[
        str,
        typer.Option(parser=place, metavar="FOLDER", help="Folder for the smaller model."),
    ],
    max_shard_size: Annotated[
        str, typer.Option(metavar="SIZE", help="The largest size of a weights file.")
    ] = "5GB",
    config: ConfigFile = None,
) -> None:
    """Cut neurons of zeros off a model's experts: the same function, smaller.

    `vlmoe train --group_lasso` makes such neurons. All experts get the width of the widest one,
    rounded up to a multiple of 8. Both models answer the same images and texts, and a report is
    saved beside the smaller one. The command fails if the logits differ by more than 1e-5.

    examples:
      vlmoe prune outputs/lasso --output_dir outputs/pruned
    """
    import vlmoe

    report = vlmoe.prune(model, output_dir, max_shard_size=max_shard_size)
    print(f"{report.table()}\nSaved to {output_dir}.")


if __name__ == "__main__":
    sys.exit(run("prune", main))

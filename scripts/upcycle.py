# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Turn a dense vision-language model into a sparse one that computes the same function.

vlmoe upcycle llava-hf/llava-1.5-7b-hf --output_dir outputs/sparse
"""

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from .commands import run
from .config_file import ConfigFile
from .json_options import Fields, json_object
from .shared_options import Seed, finite, place, refuse_unread


def main(
    model: Annotated[
        str, typer.Argument(parser=place, help="The dense model: a folder or a Hub id.")
    ],
    output_dir: Annotated[
        str,
        typer.Option(
            parser=place,
            metavar="FOLDER",
            help="Folder for the sparse model, its processor and the report.",
        ),
    ],
    target: Annotated[
        Literal["native", "vlmoe"] | None,
        typer.Option(
            help="native: the sparse class of the model's own family, which plain transformers "
            "loads. vlmoe: this package's class. Default: native where it exists; the report says "
            "why not."
        ),
    ] = None,
    sparse_type: Annotated[
        str | None,
        typer.Option(
            metavar="TYPE",
            help="Of native: the model_type of the sparse text model, where a family has several, "
            "such as glm4_moe.",
        ),
    ] = None,
    vision: Annotated[
        str | None,
        typer.Option(
            parser=place,
            metavar="MODEL",
            help="A vision encoder, folder or Hub id. MODEL is then a language model, and the "
            "connector is new.",
        ),
    ] = None,
    num_experts: Annotated[
        int, typer.Option(min=1, help="Copies of the dense MLP in each sparse layer.")
    ] = 8,
    num_experts_per_tok: Annotated[
        int, typer.Option(min=1, help="Copies that each token is routed to.")
    ] = 2,
    expert_split: Annotated[
        int, typer.Option(min=1, help="Cut each copy into N fine-grained experts.")
    ] = 1,
    expert_init: Annotated[
        Literal["copy", "shared", "drop", "noise"],
        typer.Option(
            help="Initialization of the experts. shared: the dense MLP becomes a shared expert. "
            "drop and noise change the model's function."
        ),
    ] = "copy",
    norm_topk_prob: Annotated[
        Literal["true", "false"] | None,
        typer.Option(
            help="To choose where k is 1. true: exact, but no gradient of the task reaches the "
            "router. false: the router learns, but the function changes.",
        ),
    ] = None,
    sparse_layers: Annotated[
        str,
        typer.Option(
            metavar="LAYERS",
            help="Decoder layers that get experts: all, second_half, a number N for every N-th "
            "layer, or layer indices such as 0,2,5.",
        ),
    ] = "all",
    drop_ratio: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="Share of the inner units to re-initialize (only with --expert_init drop; "
            "default: 0.5).",
        ),
    ] = None,
    noise_ratio: Annotated[
        float | None,
        typer.Option(
            parser=finite,
            metavar="X",
            help="Standard deviation of the added noise, as a fraction of the weights' (only with "
            "--expert_init noise; default: 0.05).",
        ),
    ] = None,
    router_std: Annotated[
        float | None,
        typer.Option(
            parser=finite,
            metavar="X",
            help="Standard deviation of the initial router weights (default: the model's "
            "initializer_range).",
        ),
    ] = None,
    seed: Seed = 0,
    fields: Annotated[
        Fields | None,
        typer.Option(
            parser=json_object,
            metavar="JSON",
            help="Further fields of the text config. Single fields: "
            "--fields.router_aux_loss_coef 0.01.",
        ),
    ] = None,
    connector: Annotated[
        Fields | None,
        typer.Option(
            parser=json_object,
            metavar="JSON",
            help="Fields of the new connector (only with --vision). Single fields: "
            "--connector.pixel_shuffle_factor 2.",
        ),
    ] = None,
    chat_template: Annotated[
        str | None,
        typer.Option(
            parser=place,
            metavar="FILE",
            help="A Jinja file that replaces the source's chat template. For training, the "
            "assistant's turns must stand between {% generation %} and {% endgeneration %}.",
        ),
    ] = None,
    max_shard_size: Annotated[
        str, typer.Option(metavar="SIZE", help="The largest size of a weights file.")
    ] = "5GB",
    config: ConfigFile = None,
) -> None:
    """Turn a dense vision-language model into a sparse one that computes the same function.

    The sparse model is native, of the sparse class of the model's own family, or a VLMoE. Both
    models answer the same images and texts, and a report is saved beside the sparse model. The
    command fails if the logits differ by more than 1e-5. Start a killed run again to let it
    continue.

    examples:
      vlmoe upcycle llava-hf/llava-1.5-7b-hf --output_dir outputs/sparse
      vlmoe upcycle user/dense --output_dir outputs/fine --expert_split 4
      vlmoe upcycle user/dense --target vlmoe --output_dir outputs/own
      vlmoe upcycle user/dense --output_dir outputs/half --sparse_layers second_half \\
        --fields.router_aux_loss_coef 0.01
      vlmoe upcycle user/language-model --vision user/vision-encoder --output_dir outputs/sparse \\
        --connector.pixel_shuffle_factor 2 --chat_template chat_template.jinja
    """
    if expert_init != "drop":
        refuse_unread("give --expert_init drop", drop_ratio=drop_ratio is not None)
    if expert_init != "noise":
        refuse_unread("give --expert_init noise", noise_ratio=noise_ratio is not None)
    given = {
        "sparse_type": sparse_type,
        "expert_split": expert_split,
        "expert_init": expert_init,
        "norm_topk_prob": None if norm_topk_prob is None else norm_topk_prob == "true",
        "sparse_layers": _layers(sparse_layers),
        "drop_ratio": drop_ratio,
        "noise_ratio": noise_ratio,
        "router_std": router_std,
        "seed": seed,
        "fields": fields,
    }
    import vlmoe

    upcycled = vlmoe.upcycle(
        model,
        output_dir,
        target=target,
        vision=vision,
        num_experts=num_experts,
        num_experts_per_tok=num_experts_per_tok,
        connector=connector,
        chat_template=_text_of(chat_template, "chat_template"),
        max_shard_size=max_shard_size,
        **{name: value for name, value in given.items() if value is not None},
    )
    print(f"{upcycled.report.table()}\nSaved to {output_dir}.")


def _layers(text: str) -> str | int | list[int]:
    """Parse `--sparse_layers`."""
    if text in ("all", "second_half"):
        return text
    try:
        indices = [int(each) for each in text.split(",")]
    except ValueError as error:
        raise ValueError(
            f"--sparse_layers is {text!r}; allowed: all, second_half, a number, or indices with "
            "commas, such as 0,2,5."
        ) from error
    return indices if "," in text else indices[0]


def _text_of(path: str | None, option: str) -> str | None:
    """Read the file of an option."""
    if path is None:
        return None
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--{option} {path} cannot be read: {error}") from error
    if not text.strip():
        raise ValueError(f"--{option} {path} is empty.")
    return text


if __name__ == "__main__":
    sys.exit(run("upcycle", main))

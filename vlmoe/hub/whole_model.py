# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Whether a folder holds the model that its config describes, judged by the headers of its files.

The folder is loaded onto the meta device, exactly as `from_pretrained` loads it: names after
conversion, int8 experts, tied weights and shards are what they are there, nothing is allocated, and
a config that is much bigger than the weights costs nothing. Adapters, and weights that are not in
safetensors, are not judged here.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import safe_open

from ..configuration.configuration_vlmoe import VLMoEConfig
from ..modeling_vlmoe.modeling_vlmoe import VLMoEForConditionalGeneration
from ..modeling_vlmoe.whole_weights import (
    NotWholeError,
    meta_device_map,
    quietly,
    require_finite,
)
from .file_checks import tensor_headers
from .input_errors import InputError, reading

CONFIG_FILE, WEIGHTS = "config.json", "model.safetensors"


def weights_problems(folder: Path, config: VLMoEConfig | None = None) -> Iterator[str]:
    """`file: problem` for weights that are not those of the model.

    Args:
        folder: of the model; its files are whole.
        config: of the model, if not the folder's own.
    """
    if not any((folder / name).is_file() for name in (WEIGHTS, f"{WEIGHTS}.index.json")):
        return
    unfit = f"{CONFIG_FILE}: no model can be built from it"
    try:
        with reading(unfit, keep=(NotWholeError,)), quietly():
            config = config or VLMoEConfig.from_pretrained(folder)
            model = VLMoEForConditionalGeneration.from_pretrained(
                folder, config=config, device_map=meta_device_map()
            )
    except NotWholeError as error:
        yield f"{WEIGHTS}: {error.problems}"
    except InputError as error:
        yield str(error)
    else:
        yield from _dtype_problems(folder, model)


def require_finite_files(folder: Path) -> None:
    """Refuse a folder whose weights, of a model or an adapter, hold NaN or infinite numbers.

    Raises:
        ValueError: naming the file and the first such tensor.
    """
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as weights:
            require_finite(((name, weights.get_tensor(name)) for name in weights.keys()), str(file))


def _dtype_problems(folder: Path, model: Any) -> Iterator[str]:
    """Whole numbers where the model has floating-point ones, or the reverse."""
    own = model.state_dict()
    for name, header in tensor_headers(folder).items():
        is_float = "F" in header["dtype"]
        if name in own and own[name].is_floating_point() != is_float:
            needed = "floating-point numbers" if own[name].is_floating_point() else "whole numbers"
            yield f"{WEIGHTS}: {name} holds {header['dtype']}; the model needs {needed}"

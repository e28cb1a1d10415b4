# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Judge whether a folder holds the model that its config describes, by the headers of its files.

`from_pretrained` loads the folder onto the meta device, so that names after conversion, int8
experts, tied weights and shards are judged exactly as they are loaded. Nothing is allocated, even
for a config that is much bigger than the weights. Adapters, and weights that are not in
safetensors, are not judged here.
"""

from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

from safetensors import safe_open
from transformers import PreTrainedConfig, PreTrainedModel

from ..configuration.configuration_vlmoe import VLMoEConfig
from ..modeling_vlmoe.whole_weights import NotWholeError
from .file_checks import content_problems, tensor_dtypes
from .finite_weights import require_finite
from .input_errors import InputError, reading
from .json_files import read_json
from .json_kinds import json_problem
from .meta_loading import meta_device_map, quietly
from .model_classes import load_whole, saved_config

CONFIG_FILE, WEIGHTS = "config.json", "model.safetensors"
WEIGHT_FILES = (
    WEIGHTS,
    "adapter_model.safetensors",
    f"{WEIGHTS}.index.json",
    "adapter_model.safetensors.index.json",
)
PICKLED_WEIGHTS = ("pytorch_model.bin", "adapter_model.bin", "pytorch_model.bin.index.json")
SHARDED_WEIGHTS = ("pytorch_model_fsdp*", "global_step*")  # FSDP, DeepSpeed
# A model with a vision tower that was saved with its processor cannot do without these.
_PROCESSOR_FILES = ("processor_config.json", "tokenizer_config.json")
_IMAGE_PROCESSOR = "preprocessor_config.json"
"""The processor's file in folders that were saved before transformers 5."""
_VOCABULARY_PATTERNS = ("tokenizer.json", "*.model", "vocab.*", "tekken.json")


def model_problems(path: str | Path) -> list[str]:
    """List the problems that prevent loading a folder as a model, one `file: problem` each."""
    folder = Path(path)
    if not folder.is_dir():
        return [f"{folder}: {'is not a folder' if folder.exists() else 'there is no such folder'}"]
    problems = [*absent_files(folder), *content_problems(folder)]
    return problems or list(weights_problems(folder))


def absent_files(folder: Path) -> Iterator[str]:
    """Yield `file: problem` for each file without which the folder cannot be loaded as a model."""
    # no dangling links, and no folder in a file's place; those of FSDP and DeepSpeed have no suffix
    names = [
        path.name
        for path in folder.iterdir()
        if path.is_file() or (path.is_dir() and not path.suffix)
    ]
    if not any(fnmatch(n, pattern) for n in names for pattern in (*WEIGHT_FILES, *SHARDED_WEIGHTS)):
        pickled = [name for name in PICKLED_WEIGHTS if name in names]
        if pickled:
            yield (
                f"{pickled[0]}: pickled weights, which can run code when loaded, are refused; save "
                "the model as safetensors"
            )
        else:
            yield "model.safetensors: missing"
    if not {"config.json", "adapter_config.json"} & set(names):
        yield "config.json: missing"
    config = folder / CONFIG_FILE
    # a damaged config is reported by `content_problems`
    fields = read_json(config) if config.is_file() and not json_problem(config) else {}
    saved = {"tokenizer.json", _IMAGE_PROCESSOR, *_PROCESSOR_FILES}
    if "vision_config" in fields and saved & set(names):
        is_old = _IMAGE_PROCESSOR in names and fields.get("model_type") != VLMoEConfig.model_type
        needed = _PROCESSOR_FILES[1:] if is_old else _PROCESSOR_FILES
        yield from (f"{name}: missing" for name in needed if name not in names)
        if not any(True for pattern in _VOCABULARY_PATTERNS for _ in folder.glob(pattern)):
            yield "tokenizer.json: missing"


def weights_problems(folder: Path, config: PreTrainedConfig | None = None) -> Iterator[str]:
    """Yield `file: problem` for weights that do not fit the model.

    Args:
        folder: of the model; its files are intact.
        config: of the model, if not the folder's own.
    """
    if not any((folder / name).is_file() for name in (WEIGHTS, f"{WEIGHTS}.index.json")):
        return
    unfit = f"{CONFIG_FILE}: no model can be built from it"
    try:
        with reading(unfit, keep=(NotWholeError,)), quietly():
            model = load_whole(folder, config or saved_config(folder), device_map=meta_device_map())
    except NotWholeError as error:
        yield f"{WEIGHTS}: {error.problems}; {CONFIG_FILE} describes a {error.kind}"
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


def _dtype_problems(folder: Path, model: PreTrainedModel) -> Iterator[str]:
    """Yield a problem for integers where the model has floating-point numbers, or the reverse."""
    own = model.state_dict()
    for name, dtype in tensor_dtypes(folder).items():
        if name in own and own[name].is_floating_point() != ("F" in dtype):
            needed = "floating-point numbers" if own[name].is_floating_point() else "whole numbers"
            yield f"{WEIGHTS}: {name} holds {dtype}; the model needs {needed}"

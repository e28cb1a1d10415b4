# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Rewrite a saved Qwen3-VL-MoE into the layout in which the family publishes its weights.

See published_layout.py. One expert is in memory at a time. A bank's layout is seen from its shape,
so that a folder loads rightly at every moment, also after a kill between two of its files.
"""

import logging
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from os import PathLike
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoConfig, PreTrainedConfig

from .atomic_files import publish_folder, refuse_mixing, staging_folder
from .folder_lock import folder_lock
from .input_errors import reading, writing
from .json_files import read_json
from .published_layout import (
    TRANSPOSED_TYPE,
    ambiguous_banks,
    is_transposed_bank,
    saved_bank_shape,
)
from .tensor_files import DTYPE_NAMES, StreamedTensor, write_tensors

logger = logging.getLogger(__name__)

WEIGHTS = "*.safetensors"
OF_TRAINING = ("*.pt", "*.pth", "*.bin", "trainer_state.json", ".*", "_*")
TORCH_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
# Releases before it saved the banks in the published layout, which they had in memory, too.
FIRST_RELEASE_THAT_TRANSPOSES = 5


@dataclass(frozen=True)
class ExportResult:
    """The outcome of an export.

    Attributes:
        folder: of the model.
        banks: how many were transposed; the others were in the published layout already.
    """

    folder: Path
    banks: int


def export(source: str | PathLike[str], output_dir: str | PathLike[str]) -> ExportResult:
    """Copy a saved Qwen3-VL-MoE, with its banks of experts in the published layout.

    Other families need no export: `save_pretrained` writes their published layout.

    Args:
        source: the folder of a saved model; what training left there is not copied.
        output_dir: the folder for the copy.

    Raises:
        FileNotFoundError: there is no such model.
        ValueError: it is of another family, its banks cannot be told from their transpose, or a
            weights file is damaged; the output folder is the source, or another process writes
            there.
        OSError: the output folder cannot be written into.
    """
    folder, output = Path(source).expanduser(), Path(output_dir).expanduser()
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no config.json: there is no model to export.")
    config = _config_of(folder)
    if config is None:
        family = read_json(folder / "config.json").get("model_type")
        raise ValueError(
            f"{folder} is a {family!r}, which save_pretrained writes as its family publishes it: "
            f"there is nothing to export. Allowed: {TRANSPOSED_TYPE}."
        )
    if (problem := ambiguous_banks(config)) is not None:
        raise ValueError(f"{folder} has no published layout that loads: {problem}.")
    if not any(folder.glob(WEIGHTS)):
        raise FileNotFoundError(f"{folder} holds no weights in safetensors.")
    refuse_mixing(output, is_adapter=False)
    if output.resolve() == folder.resolve():
        raise ValueError(f"{output} is the model itself: choose another output folder.")
    banks = 0
    with folder_lock(output), writing(output):
        staging = staging_folder(output)
        for file in sorted(path for path in folder.iterdir() if path.is_file()):
            if fnmatch(file.name, WEIGHTS):
                banks += _publish_file(file, staging / file.name, config)
            elif not any(fnmatch(file.name, pattern) for pattern in OF_TRAINING):
                shutil.copyfile(file, staging / file.name)
        publish_folder(staging, output)
    return ExportResult(output, banks)


def publish_layout(folder: str | Path) -> int:
    """Rewrite the weights of a folder in place, if they are of a Qwen3-VL-MoE; return the banks.

    For a folder that `save_pretrained` has just written; of other models nothing is touched. Banks
    that cannot be told from their transpose stay as they are, with a warning.

    Raises:
        ValueError: a weights file is damaged.
        OSError: the folder cannot be written into.
    """
    folder = Path(folder)
    config = _config_of(folder)
    if config is None:
        return 0
    if (problem := ambiguous_banks(config)) is not None:
        logger.warning(
            "%s keeps the layout of save_pretrained: %s. Servers may read it wrongly.",
            *(folder, problem),
        )
        return 0
    return sum(_publish_file(file, file, config) for file in sorted(folder.glob(WEIGHTS)))


def refuse_ambiguous_banks(folder: str | PathLike[str]) -> None:
    """Refuse a Qwen3-VL-MoE that transformers would load wrongly, without an error.

    Raises:
        ValueError: its banks have the shape of their transpose, and its config does not say that
            transformers 5 or later saved it.
    """
    config = _config_of(Path(folder))
    problem = None if config is None else ambiguous_banks(config)
    if config is None or problem is None:
        return
    release = str(config.transformers_version or "0").partition(".")[0]
    if not release.isdecimal() or int(release) < FIRST_RELEASE_THAT_TRANSPOSES:
        raise ValueError(
            f"{folder} cannot be loaded: {problem}. Load it with transformers 4, transpose each "
            "tensor under mlp.experts by .mT, and save it with transformers 5."
        )


def _config_of(folder: Path) -> PreTrainedConfig | None:
    """Read the configuration of a Qwen3-VL-MoE; None for any other folder."""
    file = folder / "config.json"
    if not file.is_file() or read_json(file).get("model_type") != TRANSPOSED_TYPE:
        return None
    with reading(str(file)):
        return AutoConfig.from_pretrained(folder)


def _publish_file(file: Path, target: Path, config: PreTrainedConfig) -> int:
    """Write a weights file in the published layout, and return the banks that it transposed."""
    with reading(str(file), keep=(OSError,)), safe_open(file, "pt") as weights:
        tensors, banks = {}, 0
        for name in weights.keys():
            stored = weights.get_slice(name)
            shape, dtype = tuple(stored.get_shape()), TORCH_DTYPES[stored.get_dtype()]
            if is_transposed_bank(config, name) and _is_as_saved(name, shape, config):
                shape, banks = (shape[0], shape[2], shape[1]), banks + 1
                parts = _Parts(weights, name, transposed=True)
            else:
                parts = _Parts(weights, name)
            tensors[name] = StreamedTensor(shape, dtype, parts)
        if banks or file != target:
            write_tensors(tensors, target, weights.metadata() or {})
    return banks


def _is_as_saved(name: str, shape: tuple[int, ...], config: PreTrainedConfig) -> bool:
    saved = saved_bank_shape(config, name)
    published = (saved[0], saved[2], saved[1])
    if shape not in (saved, published):
        raise ValueError(f"{name} has the shape {shape}; allowed: {saved} or {published}.")
    return shape == saved


@dataclass(frozen=True)
class _Parts:
    """The parts of a tensor of an open file, one after the other.

    Attributes:
        weights: the open file.
        name: of the tensor.
        transposed: its last two dimensions are exchanged.
    """

    weights: safe_open
    name: str
    transposed: bool = False

    def __call__(self) -> Iterator[torch.Tensor]:
        """Yield one expert after the other, or the whole tensor."""
        if not self.transposed:
            yield self.weights.get_tensor(self.name)
            return
        stored = self.weights.get_slice(self.name)
        for expert in range(stored.get_shape()[0]):
            yield stored[expert : expert + 1].mT

# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Check saved LoRA adapters before they are loaded, and write them with one key per expert.

PEFT keeps the adapters of all experts of a bank in two matrices, A (r * experts, in) and
B (out, r * experts), under the name of the bank. Servers read the names of unfused
experts: `experts.3.gate_proj.lora_A.weight` (r, in), `...lora_B.weight` (out, r).
"""

import os
import re
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from ..hub.atomic_files import atomic_path, refuse_mixing, write_json
from ..hub.file_checks import content_problems
from ..hub.finite_weights import require_finite
from ..hub.folder_lock import folder_lock
from ..hub.input_errors import reading
from ..hub.json_files import JsonObject, read_json

if TYPE_CHECKING:
    from peft import PeftModel

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_BANK_KEY = re.compile(r"^(.*\.experts)((?:\.base_layer)*)\.lora_([AB])\.weight$")

_FIELDS: dict[str, type | tuple[type, ...]] = {
    "r": int,
    "lora_alpha": (int, float),
    "target_parameters": (list, NoneType),
    "target_modules": (list, str, NoneType),
    "rank_pattern": (dict, NoneType),
    "alpha_pattern": (dict, NoneType),
    "base_model_name_or_path": (str, NoneType),
}

Tensors = dict[str, torch.Tensor]


def adapter_config(folder: str | os.PathLike[str]) -> JsonObject:
    """Read the configuration of a LoRA adapter whose files are intact.

    Raises:
        FileNotFoundError: the folder, or a file of the adapter, is missing.
        ValueError: a file is damaged, or the adapter is of another kind.
    """
    folder = Path(folder).expanduser()
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} holds no {name}: it is no folder of a LoRA adapter.")
    if problems := list(content_problems(folder)):
        raise ValueError(f"The adapter in {folder} is damaged: {'; '.join(problems)}.")
    config = read_json(folder / CONFIG_FILE)
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{folder} holds an adapter of type {config.get('peft_type')}, not LORA.")
    for name, kinds in _FIELDS.items():
        if not isinstance(config.get(name), kinds) or isinstance(config.get(name), bool):
            raise ValueError(f"{folder / CONFIG_FILE}: `{name}` is {config.get(name)!r:.60}.")
    return config


def read_adapter(folder: str | os.PathLike[str]) -> tuple[JsonObject, Tensors]:
    """Read configuration and tensors of a LoRA adapter.

    Raises:
        FileNotFoundError, ValueError: as `adapter_config`, or a tensor is not finite.
    """
    config, file = adapter_config(folder), Path(folder).expanduser() / WEIGHTS_FILE
    tensors = load_file(file)
    require_finite(tensors.items(), str(file))
    return config, tensors


def load_adapter(model: PreTrainedModel, folder: str | os.PathLike[str]) -> "PeftModel":
    """Put the adapter on `model`, by PEFT, after a comparison of names and shapes.

    Raises:
        FileNotFoundError, ValueError: as `read_adapter`, or the adapter does not fit the model,
            by the number of experts for instance; then `model` has no weights of it.
    """
    from peft import (
        LoraConfig,
        get_peft_model,
        get_peft_model_state_dict,
        set_peft_model_state_dict,
    )

    _, tensors = read_adapter(folder)
    with reading(f"The adapter in {folder}"):
        adapted = get_peft_model(model, LoraConfig.from_pretrained(str(folder)))
    expected = {name: tuple(t.shape) for name, t in get_peft_model_state_dict(adapted).items()}
    given = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name in sorted(expected.keys() | given.keys()):
        if expected.get(name) != given.get(name):
            adapted.unload()
            raise ValueError(
                f"The adapter in {folder} is of another model: {name} has shape {given.get(name)}, "
                f"this model needs {expected.get(name)}."
            )
    set_peft_model_state_dict(adapted, tensors)
    return adapted


def export_per_expert(folder: str | os.PathLike[str], output: str | os.PathLike[str]) -> int:
    """Write the adapter with one pair of matrices per expert and projection; return their number.

    In the banks of Qwen3-MoE, Qwen3-VL-MoE, OLMoE, Mixtral and VLMoE the first half of B belongs to
    the gate projection, the second half to the up projection, and both share A. Other adapters are
    copied.

    Raises:
        FileNotFoundError, ValueError: as `read_adapter`; or it adapts no experts, or the output
            folder holds a model, is the adapter's own, or is in use.
        OSError: the output folder cannot be written into.
    """
    output = Path(output).expanduser()
    if output.resolve() == Path(folder).expanduser().resolve():
        raise ValueError(f"{output} is the adapter itself: choose another output folder.")
    refuse_mixing(output, is_adapter=True)
    with folder_lock(output):
        return _export(folder, output)


def _export(folder: str | os.PathLike[str], output: Path) -> int:
    config, tensors = read_adapter(folder)
    parameters = {name.rpartition(".")[2] for name in config.get("target_parameters") or ()}
    if others := sorted(parameters - {"gate_up_proj", "down_proj"}):
        raise ValueError(f"The adapter in {folder} adapts {others} too, which this layout lacks.")
    order = [name for name in ("gate_up_proj", "down_proj") if name in parameters]
    exported: Tensors = {}
    ranks: dict[str, int] = {}
    pairs = 0
    for name, tensor in tensors.items():
        match = _BANK_KEY.match(name)
        if match is None:
            exported[name] = tensor
            continue
        bank, depth, letter = match[1], match[2].count(".base_layer"), match[3]
        if depth >= len(order):
            raise ValueError(
                f"{name} belongs to none of the parameters that the config names: {order}."
            )
        parameter = order[len(order) - 1 - depth]  # the innermost wrapper is that of the first
        rank = int(_by_pattern(config.get("rank_pattern"), parameter, config["r"]))
        ranks[parameter] = rank
        for key, value in _per_expert(tensor, parameter, letter, rank, name).items():
            exported[f"{bank}.{key}.lora_{letter}.weight"] = value.contiguous().clone()
            pairs += letter == "A"
    if not pairs:
        raise ValueError(f"The adapter in {folder} adapts no experts (`target_parameters`).")
    with atomic_path(output / WEIGHTS_FILE) as temporary:
        save_file(exported, temporary, {"format": "pt"})
    write_json(output / CONFIG_FILE, _unfused_config(config, ranks))
    return pairs


def _by_pattern(patterns: JsonObject | None, parameter: str, default: float) -> float:
    """Return the value of the pattern for a parameter's name; all banks have the same."""
    found = [v for key, v in (patterns or {}).items() if key.endswith(f"experts.{parameter}")]
    found = found or [v for k, v in (patterns or {}).items() if k.endswith(f"\\.{parameter}")]
    return found[0] if found else default


def _per_expert(tensor: torch.Tensor, parameter: str, letter: str, rank: int, name: str) -> Tensors:
    """Return, by `3.up_proj`, the matrix A (r, in) or B (out, r)."""
    dim = 0 if letter == "A" else 1
    if tensor.shape[dim] % rank:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}, which rank {rank} does not divide."
        )
    if letter == "A":
        experts = tensor.unflatten(0, (-1, rank)).unbind(0)
    else:
        experts = tensor.unflatten(1, (rank, -1)).unbind(2)
    parts: Tensors = {}
    for number, expert in enumerate(experts):
        if parameter == "down_proj":
            parts[f"{number}.down_proj"] = expert
        else:
            gate, up = expert.chunk(2) if letter == "B" else (expert, expert)
            parts |= {f"{number}.gate_proj": gate, f"{number}.up_proj": up}
    return parts


def _unfused_config(config: JsonObject, ranks: dict[str, int]) -> JsonObject:
    """Rewrite the config for linear layers `experts.N.gate_proj`, `up_proj`, `down_proj`."""
    leaves = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
    alphas = {p: _by_pattern(config.get("alpha_pattern"), p, config["lora_alpha"]) for p in ranks}
    names = {rf"experts\.\d+\.{leaf}": p for p in ranks for leaf in leaves[p]}
    modules = config.get("target_modules") or []
    experts = sorted(leaf for parameter in ranks for leaf in leaves[parameter])
    return config | {
        "target_parameters": None,
        "target_modules": modules if isinstance(modules, str) else sorted({*modules, *experts}),
        "rank_pattern": {key: ranks[p] for key, p in names.items() if ranks[p] != config["r"]},
        "alpha_pattern": {
            key: alphas[p] for key, p in names.items() if alphas[p] != config["lora_alpha"]
        },
    }

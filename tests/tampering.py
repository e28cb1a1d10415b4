"""Folders of a saved model whose weights are not those that its config describes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
BANK = "model.language_model.layers.1.mlp.experts.gate_up_proj"


def drop(weights: Tensors) -> None:
    del weights[BANK]


def rename(weights: Tensors) -> None:
    weights[BANK.replace("gate_up", "up_gate")] = weights.pop(BANK)


def add(weights: Tensors) -> None:
    weights["model.language_model.layers.9.mlp.router.weight"] = torch.zeros(4, 32)


def reshape(weights: Tensors) -> None:
    weights[BANK] = weights[BANK][:-1].clone()


TAMPERED: dict[str, tuple[Callable[[Tensors], None], str]] = {
    "drop": (drop, rf"1 missing \({BANK}\)"),
    "rename": (rename, rf"1 missing \({BANK}\); 1 unexpected \(.*experts\.up_gate_proj\)"),
    "add": (add, r"1 unexpected \(.*layers\.9\.mlp\.router\.weight\)"),
    "reshape": (reshape, rf"1 of another shape \({BANK} is \(3, .*\) there and \(4, .*\) in the"),
}
"""A change of the weights by its name, and what the error says of it."""


def tamper(folder: Path, change: Callable[[Tensors], None], name: str = BANK) -> Path:
    """Change the tensors of the file of a folder that holds the one called `name`."""
    for file in sorted(folder.glob("*.safetensors")):
        weights = load_file(file)
        if name in weights:
            with safe_open(file, "pt") as opened:
                metadata = opened.metadata()
            change(weights)
            save_file(weights, file, metadata)
            return folder
    raise AssertionError(f"{folder} does not hold {name}.")


def change_json(file: Path, **fields: Any) -> None:
    """Replace fields of a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))

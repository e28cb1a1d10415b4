# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Load the files of a native sparse model without its banks of experts in memory.

Plain `from_pretrained` builds each bank in memory, of one tensor per expert and projection. Here an
expert is read from its file when a token is routed to it. The other tensors are mapped from their
files, as `from_pretrained` maps those of VLMoE.

Shapes: E experts, H hidden, I intermediate of an expert.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import safe_open
from transformers import PreTrainedConfig, PreTrainedModel

from ..hub.meta_loading import meta_device_map, quietly
from ..hub.published_layout import PublishedView
from ..modeling_vlmoe.whole_weights import NotWholeError, untied, weight_problems

Tensor = torch.Tensor
Views = Mapping[str, PublishedView]


class TensorFiles:
    """The tensors of a folder of safetensors files, by name; each is read when it is asked for."""

    def __init__(self, folder: Path) -> None:
        """Open the files."""
        files = sorted(folder.glob("*.safetensors"))
        self._opened = [safe_open(file, "pt") for file in files]
        self._file_of = {name: opened for opened in self._opened for name in opened.keys()}

    def tensor(self, name: str) -> Tensor:
        """Return a tensor, mapped from its file."""
        found: Tensor = self._file_of[name].get_tensor(name)
        return found

    def row(self, name: str, index: int) -> Tensor:
        """Return the slice of a tensor at an index of its first dimension."""
        found: Tensor = self._file_of[name].get_slice(name)[index : index + 1][0]
        return found


class StoredBank(torch.Tensor):
    """A bank (E, ...) whose experts are read when they are indexed: `bank[expert]` -> (...).

    It is a view of one number: `eager` experts index their banks, and nothing else reads them.
    """

    files: TensorFiles
    views: Views

    @classmethod
    def of(cls, views: Views, files: TensorFiles) -> Self:
        """Make the bank of its views, by their names in the files."""
        view = next(iter(views.values()))
        placeholder = torch.empty(1, dtype=view.dtype).expand(view.source_shape)
        bank = placeholder.as_subclass(cls)
        bank.files, bank.views = files, views
        return bank

    def __getitem__(self, index: Any) -> Tensor:
        """Read one expert; from (gate, up) or (down), or from its slice of a fused tensor."""
        number = int(index)
        shape = next(iter(self.views.values())).source_shape
        expert = torch.empty(shape[1:], dtype=self.dtype)
        for name, view in self.views.items():
            if number in view.experts:
                whole = len(view.experts) > 1 or len(view.shape) == len(shape)
                stored = self.files.row(name, number) if whole else self.files.tensor(name)
                view.of_expert(number, expert).copy_(stored)
        return expert


def stored_model(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, folder: Path, views: Views
) -> PreTrainedModel:
    """Return the model of a folder, in evaluation mode, for `eager` experts.

    Args:
        model_class: of the model.
        config: its configuration.
        folder: with its files.
        views: the tensors of the files, as `published_views` gives them.

    Raises:
        NotWholeError: plain `from_pretrained` would not find every tensor in the files.
    """
    _require_whole(model_class, folder)
    files, grouped = TensorFiles(folder), _by_source(views)
    state, banks = {}, {}
    for source, own in grouped.items():
        (name, view), *others = own.items()
        if ".experts." in source and len(view.source_shape) == 3:
            banks[source] = StoredBank.of(own, files)
            state[source] = torch.empty(1, dtype=view.dtype).expand(view.source_shape)
        elif others or view.shape != view.source_shape:
            raise ValueError(f"{source} is stored as {name}, which is not read here.")
        else:
            state[source] = files.tensor(name)
    with quietly():
        model = model_class.from_pretrained(
            None, config=config, state_dict=state, dtype=config.dtype
        )
    for source, bank in banks.items():
        module, _, parameter = source.rpartition(".")
        # not a Parameter, which would be a copy without the files
        model.get_submodule(module)._parameters[parameter] = bank
    return model.eval()


def _by_source(views: Views) -> dict[str, dict[str, PublishedView]]:
    """Group the views by the tensor of the model that they are parts of."""
    grouped: dict[str, dict[str, PublishedView]] = {}
    for name, view in views.items():
        grouped.setdefault(view.source, {})[name] = view
    return grouped


def _require_whole(model_class: type[PreTrainedModel], folder: Path) -> None:
    """Let transformers judge the files by their headers."""
    with quietly():
        model, info = model_class.from_pretrained(
            folder,
            dtype="auto",
            device_map=meta_device_map(),
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    problems = weight_problems(
        untied(model, info["missing_keys"]), info["unexpected_keys"], info["mismatched_keys"]
    )
    if problems:
        raise NotWholeError(str(folder), model_class.__name__, problems)

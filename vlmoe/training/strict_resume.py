# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Resume that loads every tensor of a checkpoint, or refuses it.

    class MyTrainer(StrictResumeMixin, Trainer): ...

Checkpoints hold the published names of a model's weights (one tensor for each expert, say), and
`Trainer` loads them by `load_state_dict(strict=False)`, without the conversion that
`from_pretrained` does. Weights whose published names differ from those in memory keep the values
that they have, and the log holds one warning (https://github.com/huggingface/transformers/issues/48805):
experts and routers of Mixtral, experts of Qwen3-MoE and GLM-4V-MoE, the whole of a LLaVA.

The mixin loads through transformers' own conversion mapping, in place: the parameters stay the same
objects, so that wrappers and optimizers go on holding them. The tensors that the loader makes are
copied into them.
"""

import logging
from collections.abc import Callable, Collection, Mapping
from functools import partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel, __version__
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import (
    CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
)

from ..hub.json_files import read_json
from ..hub.meta_loading import quietly

if TYPE_CHECKING:
    from transformers import Trainer as Base
else:
    Base = object

logger = logging.getLogger(__name__)

_SHOWN = 5  # names of each kind in an error
_ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")

Shape = tuple[int, ...]


@torch.no_grad()
def load_weights_in_place(model: PreTrainedModel, folder: str | PathLike[str]) -> None:
    """Load a saved model's weights into a model of the same config, all of them.

    Args:
        model: not wrapped; each parameter and buffer keeps its identity, dtype and device.
        folder: what `save_pretrained` wrote: one file or shards, safetensors or pickled.

    Raises:
        FileNotFoundError: there are no weights in the folder.
        ValueError: tensors are missing, unexpected or of another shape; the message names them,
            and the model is as it was.
    """
    own = model.state_dict(keep_vars=True)  # by name; tied weights are the same object twice
    files = [str(file) for file in weight_files(folder)]
    config = LoadStateDictConfig(
        str(folder), dtype=model.dtype, weight_mapping=get_model_conversion_mapping(model)
    )
    conversions = getattr(model, "_weight_conversions", None)
    try:
        # It puts new parameters in the place of the model's own.
        with quietly():
            info, _ = PreTrainedModel._load_pretrained_model(model, None, files, config)
        loaded = model.state_dict(keep_vars=True)
    finally:
        for name, tensor in own.items():
            _put(model, name, tensor)
        model._weight_conversions = conversions  # later saves write the names of earlier ones
    found = {id(own[name]) for name in own.keys() - info.missing_keys}
    require_all(
        folder,
        missing=[name for name in info.missing_keys if id(own[name]) not in found],
        unexpected=info.unexpected_keys,
        wrong={name: (tuple(got), tuple(need)) for name, got, need in info.mismatched_keys},
        errors=info.conversion_errors,
    )
    for name in own.keys() - info.missing_keys:
        own[name].copy_(loaded[name])


def weight_files(folder: str | PathLike[str]) -> list[Path]:
    """List the files of a saved model's weights, safetensors first, in the index' order.

    Raises:
        FileNotFoundError: there are none.
    """
    folder = Path(folder)
    for single, index in (
        (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME),
        (WEIGHTS_NAME, WEIGHTS_INDEX_NAME),
    ):
        if (folder / single).is_file():
            return [folder / single]
        if (folder / index).is_file():
            shards = dict.fromkeys(read_json(folder / index)["weight_map"].values())
            return [folder / name for name in shards]
    raise FileNotFoundError(f"{folder} holds no weights: neither {SAFE_WEIGHTS_NAME} nor shards.")


def require_adapter_fits(model: Any, adapter: str, folder: str | PathLike[str]) -> None:
    """Refuse an adapter's file whose tensors are not exactly those of the model's adapter.

    Args:
        model: a `peft.PeftModel`.
        adapter: its name in `model.peft_config`.
        folder: of the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: tensors are missing, unexpected or of another shape; the message names them.
    """
    from peft import get_peft_model_state_dict
    from peft.utils import load_peft_weights

    if not any((Path(folder) / name).is_file() for name in _ADAPTER_FILES):
        raise FileNotFoundError(f"{folder} holds no adapter weights for {adapter!r}.")
    saved = load_peft_weights(str(folder), device="cpu")
    own = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    everything = model.state_dict() | own  # embeddings are saved where they were trained
    require_all(
        folder,
        missing=own.keys() - saved.keys(),
        unexpected=saved.keys() - everything.keys(),
        wrong={
            name: (tuple(tensor.shape), tuple(everything[name].shape))
            for name, tensor in saved.items()
            if name in everything and tensor.shape != everything[name].shape
        },
    )


def require_all(
    folder: str | PathLike[str],
    missing: Collection[str],
    unexpected: Collection[str],
    wrong: Mapping[str, tuple[Shape, Shape]],
    errors: Mapping[str, str] | None = None,
) -> None:
    """Refuse a checkpoint whose tensors are not exactly those of the model.

    Args:
        folder: of the checkpoint, for the message.
        missing: names that the model has and the checkpoint lacks.
        unexpected: names that only the checkpoint has.
        wrong: the shape in the checkpoint and in the model, for each name where they differ.
        errors: for each name whose conversion failed the reason.

    Raises:
        ValueError: there is any; the message names the first of each kind.
    """
    shapes = [f"{name} is {got}, the model needs {need}" for name, (got, need) in wrong.items()]
    failed = [f"{name}: {reason}" for name, reason in (errors or {}).items()]
    kinds = {
        "missing": missing,
        "unexpected": unexpected,
        "of another shape": shapes,
        "not convertible": failed,
    }
    problems = [f"{len(names)} {kind} ({_first(names)})" for kind, names in kinds.items() if names]
    if problems:
        raise ValueError(
            f"{folder} does not hold this model's weights: tensors {'; '.join(problems)}. Resume "
            "with a model of the checkpoint's config and with the adapters that were trained."
        )


class StrictResumeMixin(Base):
    """Makes a `Trainer` load checkpoints whole, when it resumes and when it loads the best model.

    One process and DistributedDataParallel; a model alone or with PEFT's adapters. FSDP and
    DeepSpeed write checkpoints under the names in memory and load them by their own code, as do
    quantized models and modules that are no `PreTrainedModel`: all those stay with `Trainer`.
    """

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load the weights of a checkpoint; raise as `load_weights_in_place` does."""
        self._load_strictly(
            resume_from_checkpoint,
            self.model if model is None else model,
            partial(super()._load_from_checkpoint, resume_from_checkpoint, model),
        )

    def _load_best_model(self) -> None:
        """Load the weights of the best checkpoint; raise as `load_weights_in_place` does."""
        self._load_strictly(self.state.best_model_checkpoint, self.model, super()._load_best_model)

    def _load_strictly(self, folder: Any, model: Any, by_trainer: Callable[[], None]) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            by_trainer()
        elif adapters := getattr(model, "peft_config", None):
            for name in adapters:
                require_adapter_fits(model, name, _adapter_folder(folder, name))
            by_trainer()
        elif isinstance(model, PreTrainedModel) and getattr(model, "hf_quantizer", None) is None:
            logger.info("Loading the weights of %s.", folder)
            _warn_of_other_version(Path(folder))
            load_weights_in_place(model, folder)
        else:
            by_trainer()


def _warn_of_other_version(folder: Path) -> None:
    """Warn, as `Trainer` does, where the checkpoint was written by another transformers."""
    file = folder / CONFIG_NAME
    saved = read_json(file).get("transformers_version") if file.is_file() else None
    if saved not in (None, __version__):
        logger.warning(
            "%s was written by transformers %s, this is %s: numbers may differ from those of the "
            "run that was interrupted.",
            folder,
            saved,
            __version__,
        )


def _adapter_folder(folder: str, adapter: str) -> Path:
    """Return the folder of one adapter: PEFT saves each but "default" in one of its own name."""
    own = Path(folder) / adapter
    return own if own.is_dir() else Path(folder)


def _first(names: Collection[str]) -> str:
    shown = sorted(names)[:_SHOWN]
    return ", ".join([*shown, "..."] if len(names) > _SHOWN else shown)


def _put(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(path), leaf, tensor)

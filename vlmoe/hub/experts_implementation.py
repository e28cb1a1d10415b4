# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Choose how experts are computed where transformers' default, grouped_mm, refuses their sizes.

grouped_mm multiplies rows of whole 16 bytes: widths that are multiples of 8 in half precision, of 4
in fp32. Other widths, such as those of shards of a dense MLP, fail in the first forward pass with
"strides should be multiple of 16 bytes". VLMoE's classes take "auto" there by themselves; this is
for models of transformers. `config.json` has a field for it, which `from_pretrained` reads and
`save_pretrained` does not write.
"""

from os import PathLike
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..configuration.configuration_vlmoe_text import MODEL_TYPE, TEXT_MODEL_TYPE
from ..modeling_vlmoe.experts_auto import ROW_OF_GROUPED_MM, projections_of
from .atomic_files import write_json
from .json_files import read_json

logger = logging.get_logger(__name__)

DEFAULT, ANY_SIZE, WITHOUT_VLMOE = "grouped_mm", "auto", "eager"
FIELD = "experts_implementation"


def parts_with_experts(model: PreTrainedModel) -> list[PreTrainedModel]:
    """Return the model, or of a container such as LLaVA the language model inside."""
    if model._can_set_experts_implementation():
        return [model]
    parts = [each for each in model.modules() if isinstance(each, PreTrainedModel)]
    return [each for each in parts if each._can_set_experts_implementation()] or [model]


def refused_sizes(model: nn.Module) -> list[int]:
    """Return the sizes of rows of the model's experts that grouped_mm refuses, in some dtype."""
    banks = [each for each in model.modules() if "_is_expert_parallel" in vars(each)]
    weights = [each.weight for bank in banks for each in projections_of(bank)]
    sizes = {size for weight in weights for size in weight.shape[1:]}
    return sorted(size for size in sizes if size % ROW_OF_GROUPED_MM)


def require_taken(model: PreTrainedModel) -> None:
    """Refuse grouped_mm, where it is asked for, for sizes that it does not take in the dtype.

    Raises:
        ValueError: names the sizes.
    """
    multiple = 16 // model.dtype.itemsize
    if odd := [size for size in refused_sizes(model) if size % multiple]:
        raise ValueError(
            f"the experts have rows of {_listed(odd)} numbers, and {DEFAULT} takes multiples of "
            f"{multiple} in {model.dtype}; allowed: auto, eager, batched_mm."
        )


def suit_experts(model: PreTrainedModel) -> None:
    """Let `auto` compute experts whose sizes grouped_mm refuses.

    An implementation other than the default stays.
    """
    refused = refused_sizes(model)
    parts = parts_with_experts(model) if refused else []
    parts = [part for part in parts if part.config._experts_implementation == DEFAULT]
    for part in parts:
        part.set_experts_implementation(ANY_SIZE)
    if parts:
        logger.warning_once(
            f"The experts of {type(model).__name__} have rows of {_listed(refused)} numbers, no "
            f"multiples of 8, which {DEFAULT}, the default, does not take in every dtype: they are "
            f'computed by "{ANY_SIZE}". Plain transformers needs '
            f'experts_implementation="{WITHOUT_VLMOE}".'
        )


def keep_suited(folder: str | PathLike[str], model: nn.Module) -> str | None:
    """Name in a saved folder's config.json an implementation that plain transformers has.

    Only for a model of transformers whose experts grouped_mm refuses; return its name.
    """
    path = Path(folder) / "config.json"  # an adapter has none
    config = getattr(model, "config", None)
    is_own = getattr(config, "model_type", None) in (MODEL_TYPE, TEXT_MODEL_TYPE)
    if is_own or not path.is_file() or not refused_sizes(model):
        return None
    write_json(path, read_json(path) | {FIELD: WITHOUT_VLMOE})
    return WITHOUT_VLMOE


def _listed(sizes: list[int]) -> str:
    return ", ".join(map(str, sizes))

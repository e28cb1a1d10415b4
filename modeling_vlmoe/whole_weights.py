# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Loading refuses weights that are not those of the model, before it makes up what is missing.

transformers initialises missing tensors at random, ignores unexpected ones, and goes on with a
warning. Here they are one error, raised before anything is allocated for them. Legitimate are:

- a tied weight, as long as the one that it is tied to is there;
- router biases, which start at zero, that the caller's config has and the saved one has not;
- what a class says that it ignores (`_keys_to_ignore_on_load_missing`, `..._unexpected`);
- another shape with `ignore_mismatched_sizes=True`;
- anything with `output_loading_info=True`, where the caller is given the names, and anything in a
  `state_dict` of the caller's.
"""

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import is_accelerate_available
from transformers.utils import logging as transformers_logging

# tensors of a router that start at zero: the field of the text config that asks for them
BIAS_SWITCHES = {
    "e_score_correction_bias": "router_bias_update_rate",
    "modality_bias": "router_modality_bias",
}
SHOWN = 3  # names of each kind in a message

_caller_judges: ContextVar[bool] = ContextVar("caller_judges", default=False)


class NotWholeError(ValueError):
    """Weights of `source` are not those of a `kind` of model; `problems` names them."""

    def __init__(self, source: str, kind: str, problems: str) -> None:
        super().__init__(
            f"The weights of {source} are not those of the {kind} that its config describes: "
            f"{problems}. Copy or download weights and config again; from_pretrained(..., "
            "output_loading_info=True) loads and reports them all the same."
        )
        self.problems = problems


@contextmanager
def caller_judges(is_asked: bool) -> Iterator[None]:
    """Within it, if `is_asked`, `require_whole_weights` accepts everything."""
    token = _caller_judges.set(is_asked)
    try:
        yield
    finally:
        _caller_judges.reset(token)


def require_whole_weights(model: Any, load_config: Any, loading_info: Any) -> None:
    """Raise if the tensors that were read are not those of the model.

    Args:
        model: what is being loaded.
        load_config, loading_info: as transformers hands them to `_finalize_model_loading`.

    Raises:
        NotWholeError: naming the first missing, unexpected and mismatched tensors.
    """
    source = load_config.pretrained_model_name_or_path
    if _caller_judges.get() or source is None:
        return
    if loading_info.conversion_errors and not getattr(load_config.hf_quantizer, "pre_quantized", 0):
        return  # weights cannot be quantised: transformers raises with the reason
    model._adjust_missing_and_unexpected_keys(loading_info)
    allowed = load_config.ignore_mismatched_sizes
    missing = untied(model, loading_info.missing_keys)
    problems = weight_problems(
        missing - _biases_asked_for_now(missing, load_config),
        loading_info.unexpected_keys,
        () if allowed else loading_info.mismatched_keys,
    )
    if problems:
        raise NotWholeError(source, type(model).__name__, problems)


def _biases_asked_for_now(missing: set[str], load_config: Any) -> set[str]:
    """Of the missing names the router biases whose switch is off in the saved config."""
    biases = {name for name in missing if name.rpartition(".")[2] in BIAS_SWITCHES}
    if not biases:
        return set()
    source, download = load_config.pretrained_model_name_or_path, load_config.download_kwargs
    saved, _ = PreTrainedConfig.get_config_dict(source, **(download or {}))
    saved = saved.get("text_config", saved)
    return {name for name in biases if not saved.get(BIAS_SWITCHES[name.rpartition(".")[2]])}


def meta_device_map() -> str | None:
    """The `device_map` with which a model is loaded to be judged: by the headers of its files.

    None, which really loads it, where transformers takes no device map.
    """
    can = is_accelerate_available() and not is_deepspeed_zero3_enabled()
    return "meta" if can else None


@contextmanager
def quietly() -> Iterator[None]:
    """Without warnings and progress bars: loading what was judged says all of it once more."""
    disabled, bars = logging.root.manager.disable, transformers_logging.is_progress_bar_enabled()
    logging.disable(logging.WARNING)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.disable(disabled)
        if bars:
            transformers_logging.enable_progress_bar()


def weight_problems(
    missing: Iterable[str],
    unexpected: Iterable[str],
    mismatched: Iterable[tuple[str, Iterable[int], Iterable[int]]] = (),
) -> str:
    """The first names of each kind with counts, or an empty text where there is none.

    Args:
        missing, unexpected: names of tensors.
        mismatched: name, shape in the file, shape in the model.
    """
    shapes = [
        f"{name} is {tuple(read)} there and {tuple(own)} in the model"
        for name, read, own in mismatched
    ]
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    return "; ".join(
        f"{len(names)} {kind} ({_first(names)})"
        for kind, found in kinds.items()
        if (names := sorted(found))
    )


def require_finite(tensors: Iterable[tuple[str, torch.Tensor]], source: str) -> None:
    """Raise if a tensor holds NaN or infinite numbers; one pass over all of them.

    Args:
        tensors: with their names; of quantised ones the scales are looked at.
        source: where they come from, for the message.

    Raises:
        ValueError: naming the first such tensor.
    """
    bad = [name for name, tensor in tensors if not _is_finite(tensor)]
    if bad:
        raise ValueError(
            f"{source}: the tensor {bad[0]} holds NaN or infinite numbers"
            f"{f', and {len(bad) - 1} more do' if len(bad) > 1 else ''}. Take an older checkpoint, "
            "or copy or download the weights again."
        )


def _is_finite(tensor: torch.Tensor) -> bool:
    if hasattr(tensor, "__tensor_flatten__"):  # such as torchao's, of numbers and scales
        names, _ = tensor.__tensor_flatten__()
        return all(_is_finite(getattr(tensor, name)) for name in names)
    if tensor.is_meta or not tensor.is_floating_point() or not tensor.numel():
        return True
    wide = tensor.detach() if tensor.dtype.itemsize > 1 else tensor.detach().float()
    return bool(torch.stack(wide.aminmax()).isfinite().all())


def untied(model: nn.Module, missing: Iterable[str]) -> set[str]:
    """Of the missing names those that no other weight is tied to, or none that is there."""
    left = set(missing)
    for name, source in getattr(model, "all_tied_weights_keys", {}).items():
        if not {name, source} <= left:
            left -= {name, source}
    return left


def _first(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")

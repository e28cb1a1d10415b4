# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Refuse weights that are not those of the model, before loading makes up the missing ones.

transformers initializes missing tensors at random, ignores unexpected ones, and goes on with a
warning. Here they are one error, raised before anything is allocated for them. Allowed are:

- a tied weight, as long as the one that it is tied to is there;
- router biases, which start at zero, that the caller's config has and the saved one has not;
- names that a class ignores (`_keys_to_ignore_on_load_missing`, `..._unexpected`);
- another shape with `ignore_mismatched_sizes=True`;
- anything with `output_loading_info=True`, which gives the caller the names, and anything in a
  `state_dict` of the caller's.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_utils import LoadStateDictConfig, LoadStateDictInfo

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
        self.kind, self.problems = kind, problems


@contextmanager
def caller_judges(is_asked: bool) -> Iterator[None]:
    """Let `require_whole_weights` accept everything within the block, if `is_asked`."""
    token = _caller_judges.set(is_asked)
    try:
        yield
    finally:
        _caller_judges.reset(token)


def require_whole_weights(
    model: PreTrainedModel, load_config: LoadStateDictConfig, loading_info: LoadStateDictInfo
) -> None:
    """Raise `NotWholeError` naming missing, unexpected and mismatched tensors, if there are any.

    The arguments are those of `_finalize_model_loading`.
    """
    source = load_config.pretrained_model_name_or_path
    if _caller_judges.get() or source is None:
        return
    if loading_info.conversion_errors and not getattr(load_config.hf_quantizer, "pre_quantized", 0):
        return  # weights cannot be quantized: transformers raises with the reason
    model._adjust_missing_and_unexpected_keys(loading_info)
    missing = untied(model, loading_info.missing_keys)
    biases = {name for name in missing if name.rpartition(".")[2] in BIAS_SWITCHES}
    if biases:
        saved, _ = PreTrainedConfig.get_config_dict(source, **(load_config.download_kwargs or {}))
        saved = saved.get("text_config", saved)
        missing -= {n for n in biases if not saved.get(BIAS_SWITCHES[n.rpartition(".")[2]])}
    mismatched = () if load_config.ignore_mismatched_sizes else loading_info.mismatched_keys
    problems = weight_problems(missing, loading_info.unexpected_keys, mismatched)
    if problems:
        raise NotWholeError(source, type(model).__name__, problems)


def weight_problems(
    missing: Iterable[str],
    unexpected: Iterable[str],
    mismatched: Iterable[tuple[str, Iterable[int], Iterable[int]]] = (),
) -> str:
    """Return the first names of each kind with counts, or an empty text where there is none.

    `mismatched` holds names with the shape in the file and the shape in the model.
    """
    shapes = [
        f"{name} is {tuple(read)} there and {tuple(own)} in the model"
        for name, read, own in mismatched
    ]
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    return "; ".join(
        f"{len(names)} {kind} ({', '.join(names[:SHOWN])}{', ...' * (len(names) > SHOWN)})"
        for kind, found in kinds.items()
        if (names := sorted(found))
    )


def untied(model: nn.Module, missing: Iterable[str]) -> set[str]:
    """Return the missing names that are tied to no other weight, or to a missing one."""
    left = set(missing)
    for name, source in getattr(model, "all_tied_weights_keys", {}).items():
        if not {name, source} <= left:
            left -= {name, source}
    return left


def damaged_file(source: str | Path, error: Exception) -> str:
    """Say which weights file of a folder cannot be read."""
    for file in sorted(Path(source).glob("*.safetensors")):
        try:
            with safe_open(file, "pt"):
                pass
        except SafetensorError as reason:
            return f"{file} is damaged ({reason}); copy or download it again."
    return f"A weights file of {source} is damaged ({error}); download it again."

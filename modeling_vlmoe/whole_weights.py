# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Loading refuses weights that are not those of the model, before it makes up what is missing.

transformers initialises missing tensors at random, ignores unexpected ones, and goes on with a
warning. Here they are one error, raised before anything is allocated for them. Legitimate are:

- a tied weight, as long as the one that it is tied to is there;
- what a class says that it ignores (`_keys_to_ignore_on_load_missing`, `..._unexpected`);
- another shape with `ignore_mismatched_sizes=True`;
- anything with `output_loading_info=True`, where the caller is given the names, and anything in a
  `state_dict` of the caller's.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import nn

SHOWN = 3  # names of each kind in a message

_caller_judges: ContextVar[bool] = ContextVar("caller_judges", default=False)


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
        ValueError: naming the source and the first missing, unexpected and mismatched tensors.
    """
    source = load_config.pretrained_model_name_or_path
    if _caller_judges.get() or source is None:
        return
    if loading_info.conversion_errors and not getattr(load_config.hf_quantizer, "pre_quantized", 0):
        return  # weights cannot be quantised: transformers raises with the reason
    model._adjust_missing_and_unexpected_keys(loading_info)
    allowed = load_config.ignore_mismatched_sizes
    problems = weight_problems(
        untied(model, loading_info.missing_keys),
        loading_info.unexpected_keys,
        () if allowed else loading_info.mismatched_keys,
    )
    if problems:
        raise ValueError(
            f"The weights of {source} are not those of the {type(model).__name__} that its config "
            f"describes: {problems}. Copy or download weights and config again; from_pretrained(..."
            ", output_loading_info=True) loads and reports them all the same."
        )


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


def untied(model: nn.Module, missing: Iterable[str]) -> set[str]:
    """Of the missing names those that no other weight is tied to, or none that is there."""
    left = set(missing)
    for name, source in getattr(model, "all_tied_weights_keys", {}).items():
        if not {name, source} <= left:
            left -= {name, source}
    return left


def _first(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")

# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Cut neurons of zeros off the experts of a model in memory, and narrow its configuration.

A neuron of zeros adds nothing to an expert's output, so that it can go. All experts of a bank, and
all banks, keep the same width: that of the widest expert, rounded up to whole 16 bytes of half
precision, which grouped_mm takes in every dtype. Each expert's neurons move to the front.

Shapes: E experts, I neurons of an expert, H hidden size.
"""

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..hub.published_layout import ambiguous_banks
from ..routing.neuron_banks import DOWN, GATE_UP, NeuronBank, neuron_banks
from .banks import keep_units
from .sizes import WIDTH_FIELDS, has_shapes, shapes_of, width_fields, with_fields

MULTIPLE = 8
"""Of widths: grouped_mm multiplies rows of whole 16 bytes, 8 numbers in half precision."""


def banks_to_cut(model: PreTrainedModel) -> list[NeuronBank]:
    """Return the banks of a model, which have one width.

    Raises:
        ValueError: there are none in the layout of `neuron_banks.py`, or of several widths.
    """
    banks, others = neuron_banks(model)
    if not banks:
        raise ValueError(
            f"The experts of {type(model).__name__} ({', '.join(others[:4])}) cannot be cut: they "
            f"are quantized, or laid out in another way than {GATE_UP} (E, 2 I, H) and {DOWN} "
            "(E, H, I) without biases."
        )
    if len(widths := sorted({bank.width for bank in banks})) > 1:
        raise ValueError(
            f"The experts of {type(model).__name__} have the widths "
            f"{', '.join(map(str, widths))}; prune takes models whose experts have one."
        )
    return banks


@torch.no_grad()
def cut_zero_neurons(model: PreTrainedModel) -> dict[str, list[int]]:
    """Cut a model's experts in place; its configuration is replaced by a narrower one.

    Only its weights and its configuration are then right: save and load it before it computes.

    Returns:
        The number of neurons that are not zero, for each bank by its name, for each expert.

    Raises:
        ValueError: as `banks_to_cut`; or no expert can be narrower; or no field of the
            configuration describes narrower experts alone.
    """
    banks = banks_to_cut(model)
    alive = [bank.alive() for bank in banks]
    widest, present = max(int(each.sum(1).max()) for each in alive), banks[0].width
    config = narrower_config(model, banks, max(widest, 1))
    if config is None:
        raise ValueError(
            f"Nothing can be cut: the widest expert has {widest} neurons of {present} that are not "
            f"zero, and widths are multiples of {MULTIPLE}. Train with GroupLasso (vlmoe train "
            "--group_lasso), with a larger share if you did."
        )
    width = _width_of(config, model.config, present)
    for bank, mask in zip(banks, alive, strict=True):
        kept = torch.argsort(~mask, dim=1, stable=True)[:, :width]  # (E, width)
        columns = kept[:, None].expand(-1, bank.down.shape[1], -1)
        keep_units(model.get_submodule(bank.name), kept, bank.down.gather(2, columns))
    model.config = config
    return {bank.name: mask.sum(1).tolist() for bank, mask in zip(banks, alive, strict=True)}


def narrower_config(
    model: PreTrainedModel, banks: list[NeuronBank], neurons: int
) -> PreTrainedConfig | None:
    """Return the configuration of the narrowest experts that hold so many neurons.

    Shared experts keep their width: where it is counted in that of the routed ones, their number
    grows. None if no narrower width holds them.

    Raises:
        ValueError: other weights follow every field that could hold the width.
    """
    present, shapes = banks[0].width, shapes_of(model)
    refused: set[tuple[str, ...]] = set()
    start = -(-neurons // MULTIPLE) * MULTIPLE
    tried: set[tuple[str, ...]] = set()
    for width in range(start, present, MULTIPLE):
        wanted = dict(shapes)
        for bank in banks:
            experts, _, hidden = bank.gate_up.shape
            wanted[f"{bank.name}.{GATE_UP}"] = (experts, 2 * width, hidden)
            wanted[f"{bank.name}.{DOWN}"] = (experts, hidden, width)
        for fields in width_fields(model.config.get_text_config(), present, width):
            tried.add(names := tuple(fields))
            config = with_fields(model.config, fields)
            if names in refused or ambiguous_banks(config):
                continue
            if has_shapes(type(model), config, wanted):
                return config
            refused.add(names)
    if tried and tried == refused:
        raise ValueError(
            f"No field of {type(model.config).__name__} describes a {type(model).__name__} whose "
            f"experts alone are narrower: other weights follow "
            f"{' and '.join(sorted({name for names in tried for name in names}))}."
        )
    return None


def _width_of(new: PreTrainedConfig, old: PreTrainedConfig, present: int) -> int:
    """Return the width in the new configuration, of the field that has changed."""
    texts = new.get_text_config(), old.get_text_config()
    values = [[getattr(text, name, None) for text in texts] for name in WIDTH_FIELDS]
    return next(int(now) for now, before in values if now != before == present and now)

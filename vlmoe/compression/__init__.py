# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Compression: narrower experts, or fewer, chosen on pictures and text. Read in this order:

- compress_experts.py: `compress`, from a model or folder to a smaller one;
- calibration.py: rows as the model sees them, and what reaches its banks;
- units.py: which units of an expert stay; subsets.py: which experts of a layer stay;
- banks.py, sizes.py: banks and configuration get smaller;
- healing.py: distillation from the model as it was;
- report.py, finished_layers.py: what is written.

Units, or neurons, that are zero need no choice:

- prune_neurons.py: `prune` cuts them off the experts of a saved model, exactly; narrower.py: how;
- pruning_report.py: what is written.
"""

from typing import TYPE_CHECKING

from ..hub.lazy_names import lazy_names

if TYPE_CHECKING:
    from .compress_experts import CompressionResult as CompressionResult
    from .compress_experts import compress as compress
    from .prune_neurons import prune as prune
    from .pruning_report import PruningReport as PruningReport
    from .report import CompressionReport as CompressionReport

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "CompressionReport": "report",
        "CompressionResult": "compress_experts",
        "PruningReport": "pruning_report",
        "compress": "compress_experts",
        "prune": "prune_neurons",
    },
)

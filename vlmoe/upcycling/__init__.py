# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Upcycling: a dense vision-language model becomes a sparse one that computes the same function.

After "Sparse Upcycling" (https://arxiv.org/abs/2212.05055). Read in this order:

- dense_to_sparse.py: `upcycle`, from a folder or Hub id to a folder;
- dense_configs.py: the dense models that fit, and their fields in our configuration;
- options.py: the options, and the sparse configuration that follows from them;
- origins.py: how a tensor of the sparse model is made of dense ones;
- target.py: what a conversion asks of its target. vlmoe_target.py and weight_plan.py: our class;
  native_target.py, native_pairs.py, native_config.py, native_plan.py: the family's sparse class;
- sample.py, exactness.py: dense and sparse logits on the same inputs;
- conversion.py: `from_dense`, `from_vision_text`; folder.py: shard by shard into a folder.
"""

from typing import TYPE_CHECKING

from ..hub.lazy_names import lazy_names

if TYPE_CHECKING:
    from .dense_to_sparse import UpcyclingResult as UpcyclingResult
    from .dense_to_sparse import upcycle as upcycle
    from .exactness import UpcyclingError as UpcyclingError
    from .options import Upcycling as Upcycling
    from .report import UpcyclingReport as UpcyclingReport

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "Upcycling": "options",
        "UpcyclingError": "exactness",
        "UpcyclingReport": "report",
        "UpcyclingResult": "dense_to_sparse",
        "upcycle": "dense_to_sparse",
    },
)

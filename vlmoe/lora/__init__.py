# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""LoRA on experts: PEFT adapters, computed for the routed tokens alone.

- add.py, merge.py: one call to put an adapter on, and to merge it;
- config.py: which parameters are adapted, as a plain `LoraConfig`;
- wrappers.py: PEFT's wrappers with a routed forward; routed.py, routed_cpu.py, int8.py compute it;
- files.py: saved adapters, checked, and written with one key per expert.
"""

from typing import TYPE_CHECKING

from ..hub.lazy_names import lazy_names

if TYPE_CHECKING:
    from .add import add_expert_lora as add_expert_lora
    from .config import expert_lora_config as expert_lora_config
    from .files import export_per_expert as export_per_expert
    from .files import load_adapter as load_adapter
    from .merge import merge_expert_lora as merge_expert_lora
    from .wrappers import disable_routed_lora as disable_routed_lora
    from .wrappers import enable_routed_lora as enable_routed_lora
    from .wrappers import hotswap_expert_lora as hotswap_expert_lora

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "add_expert_lora": "add",
        "disable_routed_lora": "wrappers",
        "enable_routed_lora": "wrappers",
        "expert_lora_config": "config",
        "export_per_expert": "files",
        "hotswap_expert_lora": "wrappers",
        "load_adapter": "files",
        "merge_expert_lora": "merge",
    },
)

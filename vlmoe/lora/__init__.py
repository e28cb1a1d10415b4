# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""LoRA on experts: PEFT adapters, computed for the routed tokens alone.

- add.py, merge.py: one call to put an adapter on, and to merge it;
- config.py: which parameters are adapted, as a plain `LoraConfig`;
- wrappers.py: PEFT's wrappers with a routed forward; routed.py, routed_cpu.py, int8.py compute it;
- files.py: saved adapters, checked, and written with one key per expert.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .add import add_expert_lora as add_expert_lora
    from .config import expert_lora_config as expert_lora_config
    from .files import export_per_expert as export_per_expert
    from .files import load_adapter as load_adapter
    from .merge import merge_expert_lora as merge_expert_lora
    from .wrappers import disable_routed_lora as disable_routed_lora
    from .wrappers import enable_routed_lora as enable_routed_lora
    from .wrappers import hotswap_expert_lora as hotswap_expert_lora

_MODULES = {
    "add_expert_lora": "add",
    "disable_routed_lora": "wrappers",
    "enable_routed_lora": "wrappers",
    "expert_lora_config": "config",
    "export_per_expert": "files",
    "hotswap_expert_lora": "wrappers",
    "load_adapter": "files",
    "merge_expert_lora": "merge",
}

__all__ = sorted(_MODULES)


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return __all__

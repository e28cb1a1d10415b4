# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Public names of a package that are imported from their modules on first use."""

from collections.abc import Callable, Mapping
from importlib import import_module


def lazy_names(
    package: str, modules: Mapping[str, str]
) -> tuple[Callable[[str], object], Callable[[], list[str]], list[str]]:
    """Return `__getattr__`, `__dir__` and `__all__` of a package.

    Args:
        package: its `__name__`.
        modules: the module inside the package that defines each public name.

    Example:
        >>> __getattr__, __dir__, __all__ = lazy_names(__name__, {"push": "push_to_hub"})
    """
    names = sorted(modules)

    def get(name: str) -> object:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{modules[name]}"), name)

    return get, lambda: names, names

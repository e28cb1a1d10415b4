# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Write a model's code beside it as flat files; configuration/hub_code.py says why."""

import os
import re
from collections.abc import Iterable
from pathlib import Path

from ..configuration import hub_code

# `from .module import` or `from ..folder.module import`, at any indentation
_PACKAGE_IMPORT = re.compile(r"^([ \t]*from )\.(?:\.(\w+)\.)?(\w+)(?= import\b)", re.MULTILINE)
_OTHER_RELATIVE_IMPORT = re.compile(r"^[ \t]*from \.(?!\w+ import\b).*", re.MULTILINE)


def flat_code(modules: Iterable[str]) -> dict[str, str]:
    """Return names and texts of the files with `modules` and with all that these import from ours.

    `from ..folder.module import` is turned into `from .module import`.

    Args:
        modules: `"folder.module"`, or the path of something in it, `"folder.module.Class"`.

    Raises:
        ValueError: two files have one name, or an import cannot be resolved in a flat folder.
    """
    package = Path(hub_code.__file__).parents[1]
    waiting = [tuple(module.split(".")[:2]) for module in modules]
    files: dict[Path, str] = {}
    for folder, module in waiting:  # grows by what each file imports
        path = package / folder / f"{module}.py"
        if path not in files:
            source = path.read_text(encoding="utf-8")
            waiting += [(each[2] or folder, each[3]) for each in _PACKAGE_IMPORT.finditer(source)]
            files[path] = _PACKAGE_IMPORT.sub(r"\1.\3", source)
            left = _OTHER_RELATIVE_IMPORT.search(files[path])
            if left:
                raise ValueError(
                    f"{path}: `{left[0].strip()}` cannot be resolved in a flat folder; write "
                    "`from .module import ...` or `from ..folder.module import ...`."
                )
    flat = {path.name: text for path, text in files.items()}
    if len(flat) < len(files):
        paths = ", ".join(str(path.relative_to(package)) for path in sorted(files))
        raise ValueError(
            f"Two files of one name cannot share a flat folder; rename one of {paths}."
        )
    return flat


def save_code(owner: hub_code.HubCodeMixin, folder: str | os.PathLike[str]) -> None:
    """Write the code of a config or processor, each file whole or not at all.

    Set the `auto_map` that is saved with it, too.
    """
    classes = owner.hub_classes
    owner.auto_map = {auto_class: path.partition(".")[2] for auto_class, path in classes.items()}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in flat_code([*classes.values(), *owner.hub_modules]).items():
        temporary = folder / f".{name}.{os.getpid()}"
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, folder / name)

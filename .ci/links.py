# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Lay links under build/typed/, where mypy and editors find the packages of this checkout.

    python .ci/links.py

setuptools maps top-level folders into the package `vlmoe`, which tools that only read files do not
know. The folder build/ is not under version control. Where symbolic links are not allowed (Windows
without developer mode), folders become junctions and files copies.
"""

import shutil
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
TYPED = ROOT / "build" / "typed"


def main() -> None:
    """Replace the links by those of pyproject's `package-dir`."""
    shutil.rmtree(TYPED, ignore_errors=True)
    folders = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"][
        "package-dir"
    ]
    for package, folder in sorted(folders.items()):  # a package before those inside it
        place = TYPED.joinpath(*package.split("."))
        if any(other.startswith(f"{package}.") for other in folders):
            place.mkdir(parents=True)
            for entry in (ROOT / folder).iterdir():
                link(entry, place / entry.name)
        else:
            link(ROOT / folder, place)


def link(source: Path, place: Path) -> None:
    """Make `place` show what `source` holds."""
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        place.symlink_to(source, target_is_directory=source.is_dir())
    except OSError:
        if source.is_dir():
            import _winapi

            _winapi.CreateJunction(str(source), str(place))
        else:
            shutil.copy2(source, place)


if __name__ == "__main__":
    main()

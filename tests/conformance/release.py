# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""transformers' own tests: the source distribution of the installed version, through pip.

It holds `tests/test_*.py`, where the common tests are, but none of the folders under tests/. What
those files import from the folders is under stand_ins/, the second half of the package `tests`:
should a release bring the real thing, that is what runs.
"""

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import transformers

STAND_INS = Path(__file__).parent / "stand_ins"
JOIN_HALVES = "from pkgutil import extend_path\n\n__path__ = extend_path(__path__, __name__)\n"


def fetch(version: str, build: Path) -> Path:
    """The folder of the unpacked release, downloaded on the first call.

    Raises:
        RuntimeError: pip could not download it.
    """
    release = build / f"transformers-{version}"
    if not (release / "tests").is_dir():
        archive = build / f"transformers-{version}.tar.gz"
        if not archive.exists():
            download(version, build)
        unpack(archive, build)
    library = release / "src" / "transformers"
    library.unlink(missing_ok=True)  # the environment may have moved
    library.parent.mkdir(exist_ok=True)
    # The pipeline tests import the library once more, from the source tree: it has to be the same.
    library.symlink_to(Path(transformers.__file__).parent, target_is_directory=True)
    return release


def download(version: str, build: Path) -> None:
    """`transformers-VERSION.tar.gz` into the folder `build`."""
    build.mkdir(parents=True, exist_ok=True)
    print(f"Fetching the source distribution of transformers {version} ...", flush=True)
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-binary", "transformers"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(build)]
    done = subprocess.run([*command, f"transformers=={version}"], check=False)
    if done.returncode:
        raise RuntimeError(
            f"pip could not download the source distribution of transformers {version}; is the "
            f"package index reachable? You can also put the archive into {build} yourself."
        )


def unpack(archive: Path, build: Path) -> None:
    """The tests of the release, last of all under their final name."""
    with tarfile.open(archive) as release:
        tests = [m for m in release.getmembers() if m.name.split("/")[1:2] == ["tests"]]
        partial = build / f"unpacking-{os.getpid()}"
        release.extractall(partial, members=tests, filter="data")
    (unpacked,) = partial.iterdir()
    (unpacked / "tests" / "__init__.py").write_text(JOIN_HALVES)
    unpacked.rename(build / unpacked.name)
    partial.rmdir()

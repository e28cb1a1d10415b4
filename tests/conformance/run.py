# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Run transformers' own common tests on our classes.

    make conformance
    python tests/conformance/run.py
    python tests/conformance/run.py -k "processor and chat_template"

The first run fetches transformers' source distribution through pip. Fails if a test fails, if a
test is skipped that skips.toml does not list with its reason, or if fewer than 175 tests pass that
check something of ours.
"""

import argparse
import os
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from recorder import Comparison, Recorder

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
BUILD = REPOSITORY / "build" / "conformance"
LEAST_PASSES = 175


def main(argv: list[str] | None = None) -> int:
    """Fetch, run, compare; the exit code is 0 only if all is as listed."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n\n    ")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("-k", metavar="EXPRESSION", help="run only these tests, as in pytest")
    parser.add_argument("--verbose", action="store_true", help="show failures at length")
    options = parser.parse_args(argv)
    started = time.perf_counter()
    try:
        prepare()
    except RuntimeError as error:
        print(f"make conformance: {error}", file=sys.stderr)
        return 2
    import pytest
    from recorder import Recorder, compare

    recorder = Recorder()
    arguments = [
        *(str(file) for file in sorted(HERE.glob("check_*.py"))),
        *("--rootdir", str(REPOSITORY), "-c", str(REPOSITORY / "pyproject.toml")),
        *("-o", "addopts=", "-p", "no:cacheprovider", "-p", "no:warnings", "-q"),
        f"--tb={'long' if options.verbose else 'short'}",
        *(["-k", options.k] if options.k else []),
    ]
    stopped = pytest.main(arguments, plugins=[recorder])
    comparison = compare(recorder, whole=not options.k)
    checking = len(recorder.passed) - len(comparison.idle)
    report(recorder, comparison, checking, time.perf_counter() - started)
    too_few = checking < LEAST_PASSES and not options.k
    if too_few:
        print(f"At least {LEAST_PASSES} tests that check something of ours must pass.")
    interrupted = stopped not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)
    wrong = recorder.failed or comparison.new or comparison.wrong or too_few or interrupted
    return 1 if wrong else 0


def report(recorder: "Recorder", comparison: "Comparison", checking: int, seconds: float) -> None:
    """What differs from skips.toml, then the counts."""
    lists = {
        "failed": sorted(recorder.failed),
        "skipped, but not listed for that reason in skips.toml": comparison.new,
        "wrong in skips.toml": comparison.wrong,
        "no longer skipped: take it off skips.toml": comparison.gone,
    }
    for title, tests in lists.items():
        if tests:
            print(f"\n{title}:", *tests, sep="\n  ")
    rows = {
        "passed": len(recorder.passed),
        "  of these check something of ours": checking,
        "  of these end without checking anything": len(comparison.idle),
        "failed": len(recorder.failed),
        "skipped": len(recorder.skipped),
        "  of these for want of a device, unproven": len(comparison.unproven),
        "  of these not listed": len(comparison.new),
    }
    print(f"\ntransformers {version('transformers')}, its own tests on VLMoE: {seconds:.0f} s")
    print(*(f"{name:<44}{count:>5}" for name, count in rows.items()), sep="\n")


def prepare() -> None:
    """Fetch the release, and set up paths and registration as its tests expect them."""
    sys.path.insert(0, str(HERE))
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["RUN_SLOW"] = "1"  # nothing is skipped for being slow
    os.environ["TRANSFORMERS_TINY_MODEL_PATH"] = str(BUILD / "tiny")
    from release import STAND_INS, fetch

    release = fetch(version("transformers"), BUILD)
    sys.path[:0] = [str(release), str(STAND_INS)]
    os.chdir(BUILD)  # where the tests leave what they write
    from registration import register, write_tiny_model_summary

    write_tiny_model_summary(BUILD / "tiny")
    register()


if __name__ == "__main__":
    sys.exit(main())

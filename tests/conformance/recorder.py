# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""What became of each test, and how that compares with skips.toml."""

import re
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[2]
SKIPS = Path(__file__).parent / "skips.toml"


@dataclass(eq=False)
class Recorder:
    """A pytest plugin that keeps the outcome of each test by its name, "Class::test".

    A test is passed only if all its subtests are: one that skips a subtest counts as skipped.
    """

    skipped: dict[str, str] = field(default_factory=dict)  # test: transformers' reason
    failed: set[str] = field(default_factory=set)
    ran: set[str] = field(default_factory=set)

    @property
    def passed(self) -> set[str]:
        """Tests in which nothing failed and nothing was skipped."""
        return self.ran - self.failed - self.skipped.keys()

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A file that cannot be collected is a failure."""
        if report.failed:
            self.failed.add(report.nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Called for each phase of each test, and for each subtest."""
        name = report.nodeid.partition("::")[2]
        self.ran.add(name)
        if report.failed:
            self.failed.add(name)
        elif report.skipped:
            reason = (
                report.longrepr[2] if isinstance(report.longrepr, tuple) else "expected to fail"
            )
            self.skipped[name] = reason.removeprefix("Skipped: ")


@dataclass
class Comparison:
    """The skips and the passes of a run beside those that skips.toml lists.

    Attributes:
        new: skips that are not listed, or for another reason than the listed one: `name: reason`.
        gone: listed tests that were not skipped, or that there are no longer.
        idle: passed tests that are listed to check nothing of ours.
        unproven: listed skips for want of a device or package that no test of ours stands in for.
        wrong: mistakes in skips.toml itself.
    """

    new: list[str]
    gone: list[str]
    idle: list[str]
    unproven: list[str]
    wrong: list[str]


def compare(recorder: Recorder, whole: bool = True) -> Comparison:
    """The run, of all tests or (`whole=False`) of some, against the committed list."""
    listed = tomllib.loads(SKIPS.read_text())
    reasons = {test: entry["reason"] for entry in listed["skip"] for test in entry["tests"]}
    expected = reasons.keys() & recorder.ran
    idle = {test for entry in listed["idle"] for test in entry["tests"]}
    new = [
        f"{test}: {reason}"
        for test, reason in sorted(recorder.skipped.items())
        if test not in reasons or not re.fullmatch(reasons[test], reason)
    ]
    return Comparison(
        new=new,
        gone=sorted((reasons.keys() if whole else expected) - recorder.skipped.keys()),
        idle=sorted(recorder.passed & idle),
        unproven=[
            test
            for entry in listed["skip"]
            for test in entry["tests"]
            if entry.get("unproven") and test in recorder.skipped
        ],
        wrong=[mistake for entry in listed["skip"] for mistake in mistakes(entry)],
    )


def mistakes(entry: dict[str, Any]) -> list[str]:
    """Proofs that do not exist, and skips for want of a device that are neither proven nor not."""
    found = []
    if entry["kind"] == "device" and bool(entry.get("proof")) == bool(entry.get("unproven")):
        found.append(f"{entry['reason']}: give `proof` or `unproven = true`")
    for proof in entry.get("proof", []):
        path, _, test = proof.partition("::")
        file = REPOSITORY / path
        if not file.is_file() or f"def {test}(" not in file.read_text():
            found.append(f"{entry['reason']}: there is no test {proof}")
    return found

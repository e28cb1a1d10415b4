# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""The list of skips names tests that exist, and nothing is skipped by other means."""

import ast
import tomllib
from pathlib import Path

import pytest
from recorder import SKIPS, Recorder, compare, mistakes

FILES = sorted(Path(__file__).parent.glob("check_*.py"))
OURS = {"test_config", "test_two_ranks_equal_one"}  # not those of a mixin


def test_every_proof_in_the_list_exists() -> None:
    entries = tomllib.loads(SKIPS.read_text())["skip"]
    assert not [mistake for entry in entries for mistake in mistakes(entry)]


def test_a_proof_that_does_not_exist_is_a_mistake() -> None:
    entry = {"reason": "test requires accelerator", "kind": "device"}
    assert mistakes(entry)
    assert not mistakes(entry | {"unproven": True})
    assert mistakes(entry | {"proof": ["tests/conftest.py::test_that_does_not_exist"]})


def test_a_run_is_compared_with_the_list() -> None:
    entry = tomllib.loads(SKIPS.read_text())["skip"][0]
    listed, moved, gone = entry["tests"][:3]
    skipped = {listed: entry["reason"], moved: "test is slow", "Test::test_new": entry["reason"]}
    comparison = compare(Recorder(skipped=skipped, ran={*skipped, gone}), whole=False)
    assert comparison.new == [f"Test::test_new: {entry['reason']}", f"{moved}: test is slow"]
    assert comparison.gone == [gone]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_no_common_test_is_overridden_or_switched_off(file: Path) -> None:
    tree = ast.parse(file.read_text())
    defined = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    assigned = {
        node.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    }
    assert {name for name in defined | assigned if name.startswith("test_")} <= OURS
    assert "skip" not in "".join(
        ast.unparse(d) for node in ast.walk(tree) for d in getattr(node, "decorator_list", [])
    )

"""Kinds of values in the JSON files of a saved model."""

import json
from pathlib import Path
from typing import Any

import pytest

from vlmoe.hub.json_kinds import FIELDS, LISTS, OBJECTS, json_problem


@pytest.mark.parametrize("name", [*OBJECTS, *LISTS])
def test_the_top_level_is_an_object_or_a_list_by_the_files_name(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    right, wrong = ([], {}) if name in LISTS else ({}, [])
    file.write_text(json.dumps(right))
    assert json_problem(file) is None
    file.write_text(json.dumps(wrong))
    assert "must hold" in (json_problem(file) or "")


@pytest.mark.parametrize("name", FIELDS)
def test_fields_of_another_kind_are_named(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    for field, kinds in FIELDS[name].items():
        wrong: Any = [[]] if kinds == (list,) else 0.5 if float not in kinds else "red"
        file.write_text(json.dumps({field: wrong}))
        assert (json_problem(file) or "").startswith(f"`{field}` is {wrong!r}; allowed: ")
        file.write_text(json.dumps({field: None}))
        assert json_problem(file) is None


def test_a_file_of_the_users_own_may_hold_anything(tmp_path: Path) -> None:
    file = tmp_path / "notes.json"
    file.write_text("5")
    assert json_problem(file) is None
    file.write_text("5 6")
    assert "not valid JSON" in (json_problem(file) or "")


def test_the_files_of_a_saved_model_have_their_kinds(saved_model: Path) -> None:
    assert [file for file in saved_model.glob("*.json") if json_problem(file)] == []

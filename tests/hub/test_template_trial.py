# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""A chat template that does not end, or fills the memory, is found in a child process."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from vlmoe.hub import template_trial
from vlmoe.hub.push_to_hub import check_folder
from vlmoe.hub.template_trial import try_templates
from vlmoe.processing.chat_template import DEFAULT_CHAT_TEMPLATE
from vlmoe.upcycling.image_parts import with_image_parts
from vlmoe_cli import main

LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
SOUND = "{% for message in messages %}{{ message.content }}{% endfor %}"
FUSSY = "{{ raise_exception('Only user turns.') }}"


@pytest.fixture(autouse=True)
def fresh() -> None:
    """Nothing is remembered of other tests."""
    template_trial._fault.cache_clear()


@pytest.mark.parametrize(
    ("template", "fault"),
    [
        (LOOP, "does not end within 3 seconds"),
        ("{{ 'x'.ljust(10**10) }}", "takes more than 1 GiB of memory"),
        ("{{ 'x' * 5000000 }}", "writes 5,000,000 characters"),
        ("{% if %}", "is no template: TemplateSyntaxError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "is no template: RecursionError"),
    ],
)
def test_a_bad_template_is_named(
    template: str, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(template_trial, "SECONDS", 3 if template == LOOP else 60)
    with pytest.raises(ValueError, match=rf"^FOLDER: its chat template \(.*\) {fault}"):
        try_templates(template, "FOLDER")


def test_a_template_is_read_among_several(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_trial, "SECONDS", 1)
    with pytest.raises(ValueError, match="does not end"):
        try_templates({"default": DEFAULT_CHAT_TEMPLATE, "tool_use": LOOP}, "FOLDER")


@pytest.mark.parametrize("template", [SOUND, with_image_parts(SOUND), FUSSY])
def test_a_sound_template_passes(template: str) -> None:
    try_templates(template, "FOLDER")


def test_our_own_template_needs_no_child(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_trial, "_fault", pytest.fail)
    try_templates(DEFAULT_CHAT_TEMPLATE, "FOLDER")
    try_templates(None, "FOLDER")


def test_the_child_is_light() -> None:
    """It imports no torch, which would cost more than all else."""
    code = (
        "import runpy, sys\n"
        f"try: runpy.run_path({template_trial.__file__!r}, run_name='__main__')\n"
        "finally: sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], input=json.dumps(SOUND), text=True, check=False
    )
    assert done.returncode == 0


def test_a_command_names_the_folder(
    saved_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setattr(template_trial, "SECONDS", 1)
    folder = tmp_path / "model"
    folder.mkdir()
    for file in saved_model.iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.jinja").write_text(LOOP)
    with pytest.raises(ValueError, match="does not end"):
        check_folder(folder)  # as `vlmoe push` does
    assert main.main(["generate", "--model", str(folder), "--device", "cpu", "red?"]) == 2
    assert f"{folder}: its chat template" in capsys.readouterr().err.splitlines()[-1]

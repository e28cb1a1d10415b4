"""The boundary of the commands: whose fault an error is, in one line, and texts of any encoding."""

import io
import subprocess
import sys
from pathlib import Path

import pytest

from vlmoe.hub.input_errors import reading
from vlmoe_cli.command_line import readable, run_command


class SafetensorError(Exception):
    """Like that of safetensors, which derives from nothing else."""


class UnknownError(Exception):
    """One that no list holds."""


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (MemoryError(), "not enough memory: try smaller batches or sizes"),
        (RuntimeError("can't allocate memory: 9 bytes"), "not enough memory: can't allocate"),
        (SafetensorError("I/O error: No space left"), "I/O error: No space left"),
        (OSError(28, "No space left on device", "x.json"), "No space left on device: 'x.json'"),
    ],
)
def test_a_fault_of_the_machine_is_one_line(
    error: Exception, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(argv: list[str]) -> None:
        raise error

    assert run_command("vlmoe x", command, []) == 2
    text = capsys.readouterr().err
    assert line in text and text.count("\n") == 1


def test_a_cache_folder_that_cannot_be_used_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_HOME", "/dev/null/home")

    def command(argv: list[str]) -> None:
        Path("/dev/null/home/datasets").mkdir(parents=True)

    assert run_command("vlmoe x", command, []) == 2
    assert "error: HF_HOME is '/dev/null/home', which cannot be used: " in capsys.readouterr().err


def test_any_class_is_one_line_while_input_is_read_and_a_bug_elsewhere(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def broken_input(argv: list[str]) -> None:
        with reading("config.json"):
            raise UnknownError("no good")

    def bug(argv: list[str]) -> None:
        raise UnknownError("no good")

    assert run_command("vlmoe x", broken_input, []) == 2
    assert capsys.readouterr().err == "vlmoe x: error: config.json: UnknownError: no good\n"
    with pytest.raises(UnknownError):
        run_command("vlmoe x", bug, [])


def test_an_answer_is_printed_where_the_terminal_is_not_unicode(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    assert run_command("vlmoe x", lambda argv: print("\xe9\u4e2d"), []) == 0
    stream.flush()
    assert stream.buffer.getvalue() == b"\\xe9\\u4e2d\n"


def test_bytes_that_the_locale_does_not_know_are_read_as_utf_8() -> None:
    as_ascii = "\xe9\u4e2d?".encode().decode("ascii", "surrogateescape")
    assert readable(as_ascii, "The question") == "\xe9\u4e2d?"
    assert readable("\xe9", "The question") == "\xe9"
    with pytest.raises(ValueError, match=r"^The question is no text in UTF-8"):
        readable("\udcff", "The question")
    with pytest.raises(ValueError, match=r"^The question is no text in UTF-8"):
        readable("\ud800", "The question")


def test_an_error_ends_the_line_of_a_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    from tqdm import tqdm

    def command(argv: list[str]) -> None:
        for _ in tqdm(range(3), file=sys.stderr):
            raise ValueError("no good")

    assert run_command("vlmoe x", command, []) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "vlmoe x: error: no good"


def test_libraries_print_nothing_on_import() -> None:
    """Importing torchao in a command, as transformers does, adds no line to its output."""
    program = (
        "from vlmoe_cli.command_line import run_command\n"
        "def command(argv): import torch, torchao\n"
        "run_command('vlmoe x', command, [])\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.stdout + run.stderr == ""

"""What a library raises at a user's input, as one line that names the input."""

import pytest

from vlmoe.hub.input_errors import InputError, reading, writing


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("no\n  good"), "a.json: no good"),
        (KeyError("size"), "a.json: KeyError: 'size'"),
        (TypeError(), "a.json: TypeError"),
        (RecursionError("maximum recursion depth exceeded"), "a.json: nested too deep"),
        (MemoryError(), "a.json: not enough memory"),
        (OSError(28, "No space left on device"), "a.json: [Errno 28] No space left on device"),
    ],
)
def test_any_exception_becomes_one_line_that_names_the_input(error: Exception, line: str) -> None:
    with pytest.raises(InputError) as caught, reading("a.json"):
        raise error
    assert str(caught.value) == line and caught.value.__cause__ is error


def test_the_innermost_input_is_the_one_named() -> None:
    with pytest.raises(InputError, match=r"^row 3: KeyError"), reading("data.jsonl"):
        with reading("row 3"):
            raise KeyError("x")


class SafetensorError(Exception):
    """Like that of safetensors."""


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device"),
        RuntimeError("[enforce fail] PytorchStreamWriter failed writing file data/3"),
    ],
)
def test_an_error_of_the_disk_names_the_folder(error: Exception) -> None:
    with pytest.raises(OSError, match=r"^out/model cannot be written: "), writing("out/model"):
        raise error


@pytest.mark.parametrize(
    "error", [ValueError("red"), OSError(28, "No space left on device", "out/a"), KeyError("x")]
)
def test_other_errors_while_writing_stay_what_they_are(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, writing("out/model"):
        raise error
    assert caught.value is error


def test_an_interrupt_is_no_fault_of_the_input() -> None:
    with pytest.raises(KeyboardInterrupt), reading("a.json"):
        raise KeyboardInterrupt

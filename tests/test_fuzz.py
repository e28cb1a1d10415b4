"""Damaged inputs are refused in one line: no traceback, no hang, no success on visible damage.

`FUZZ_CASE=folder:17 pytest -s tests/test_fuzz.py` runs one case alone; -s shows the figures.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fuzzing import Case, Figures, data_case, folder_case, judge, options_case

from vlmoe import VLMoEProcessor
from vlmoe.data.collator import VLMoECollator
from vlmoe.data.loading import load_rows
from vlmoe.data.long_rows import usable_rows
from vlmoe_cli.command_line import run_command
from vlmoe_cli.main import main

NUMBERS = {"folder": 300, "options": 300, "data": 200}
AS_PROCESSES = 20  # of each kind
ONLY = os.environ.get("FUZZ_CASE", "")
COLLATE = """
import sys
from vlmoe import VLMoEProcessor
from vlmoe.data.collator import VLMoECollator
from vlmoe.data.loading import load_rows
from vlmoe.data.long_rows import usable_rows
from vlmoe_cli.command_line import run_command
def command(argv):
    VLMoECollator(VLMoEProcessor.from_pretrained(argv[1]))(list(load_rows(argv[0])))
sys.exit(run_command("vlmoe data", command))
"""


def make(kind: str, number: int, model: Path, data: Path, work: Path) -> Case:
    """The case, its files in the empty folder `work`."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    if kind == "folder":
        return folder_case(number, model, work)
    if kind == "options":
        return options_case(number, model, data, work)
    return data_case(number, (data / "train_0.png").read_bytes(), work)


def numbers(kind: str, count: int, first: int = 0) -> list[int]:
    """The numbers of the cases to run."""
    if not ONLY:
        return list(range(first, first + count))
    return [int(ONLY.partition(":")[2])] if ONLY.startswith(f"{kind}:") else []


@pytest.mark.parametrize("kind", NUMBERS)
def test_a_damaged_input_is_one_line(
    kind: str,
    saved_model: Path,
    data_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    collator = VLMoECollator(VLMoEProcessor.from_pretrained(saved_model))
    figures = Figures()
    for number in numbers(kind, NUMBERS[kind]):
        case = make(kind, number, saved_model, data_folder, tmp_path / "case")

        def run(case: Case = case) -> tuple[int, str]:
            if kind == "data":
                code = run_command("vlmoe", lambda argv: collate(argv, collator), case.argv)
            else:
                code = main(case.argv)
            return code, capsys.readouterr().err

        judge(figures, f"{kind}:{number}", case, run)
        capsys.readouterr()
    with capsys.disabled():
        print(f"\n{kind}: {figures}")
        if os.environ.get("FUZZ_SHOW"):
            print("\n".join(figures.harmless))
    assert not figures.faults, "\n".join(figures.faults)


def collate(argv: list[str], collator: VLMoECollator) -> None:
    """Read the rows of a file, check them as training does, and make a batch of them."""
    collator(list(usable_rows(load_rows(argv[0]), collator, "error").rows))


@pytest.mark.slow
@pytest.mark.parametrize("kind", NUMBERS)
def test_a_damaged_input_is_one_line_of_a_process(
    kind: str, saved_model: Path, data_folder: Path, tmp_path: Path
) -> None:
    figures = Figures()
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    program = {"data": ["-c", COLLATE]}.get(kind, ["-m", "vlmoe_cli.main"])
    for number in numbers(kind, AS_PROCESSES, first=NUMBERS[kind]):
        case = make(kind, number, saved_model, data_folder, tmp_path / "case")
        more = [str(saved_model)] if kind == "data" else []

        def run(case: Case = case, more: list[str] = more) -> tuple[int, str]:
            if any("\x00" in argument for argument in case.argv):
                return 2, ": error: no argument of a process"
            command = [sys.executable, *program, *case.argv, *more]
            done = subprocess.run(
                command, capture_output=True, text=True, check=False, env=environment, cwd=tmp_path
            )
            return done.returncode, done.stderr

        judge(figures, f"{kind}:{number}", case, run, seconds=300)
    print(f"\n{kind}, as processes: {figures}")
    assert not figures.faults, "\n".join(figures.faults)

"""The notebooks under examples/ run from top to bottom, offline."""

import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

EXAMPLES = Path(__file__).parent.parent / "examples"
NOTEBOOKS = sorted(path.name for path in EXAMPLES.glob("*.ipynb"))


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    shutil.copy(EXAMPLES / name, tmp_path)
    notebook = nbformat.read(tmp_path / name, as_version=4)
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=300, resources=resources).execute()


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_is_saved_without_outputs(name: str) -> None:
    cells = nbformat.read(EXAMPLES / name, as_version=4).cells
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)

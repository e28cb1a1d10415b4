"""The code that is saved beside a model: which files, and how they are flattened."""

from pathlib import Path

import pytest

from vlmoe.configuration import hub_code
from vlmoe.hub.model_code import flat_code

NOT_FLAT = {
    "the package": "from .. import name",
    "a folder": "from ..folder import name",
    "above the package": "from ...folder.module import name",
    "beside, without a module": "from . import name",
    "a folder of a folder": "from ..folder.inner.module import name",
    "a folder beside": "from .inner.module import name",
    "in a function": "def f():\n    from ..folder import name",
}


def write_package(root: Path, monkeypatch: pytest.MonkeyPatch, **modules: str) -> None:
    """A package whose exporter is ours; `folder__module="text"` for each file."""
    for name, text in modules.items():
        path = root / Path(*name.split("__")).with_suffix(".py")
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(hub_code, "__file__", str(root / "configuration" / "hub_code.py"))


def test_imports_are_followed_and_flattened_at_any_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_package(
        tmp_path,
        monkeypatch,
        models__first="import os\nfrom ..parts.second import (\n    one,\n    two,\n)\n",
        parts__second="def f():\n    from .third import x  # from ..parts.third import\n",
        parts__third="x = 'from ..a.b import c'\n",
        parts__unused="",
    )
    assert flat_code(["models.first.Class"]) == {
        "first.py": "import os\nfrom .second import (\n    one,\n    two,\n)\n",
        "second.py": "def f():\n    from .third import x  # from ..parts.third import\n",
        "third.py": "x = 'from ..a.b import c'\n",
    }


@pytest.mark.parametrize("statement", NOT_FLAT.values(), ids=NOT_FLAT)
def test_an_import_that_a_flat_folder_cannot_resolve_raises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, statement: str
) -> None:
    write_package(tmp_path, monkeypatch, models__first=statement)
    line = statement.splitlines()[-1].strip()
    with pytest.raises(ValueError, match=r"first\.py: .*cannot be resolved") as error:
        flat_code(["models.first"])
    assert line in str(error.value)


def test_two_files_of_one_name_raise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = "from ..parts.same import x\nfrom .same import y\n"
    write_package(tmp_path, monkeypatch, models__first=first, models__same="", parts__same="")
    with pytest.raises(ValueError, match=r"models/same\.py, parts/same\.py"):
        flat_code(["models.first"])

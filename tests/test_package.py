"""The package from outside: public names, which folder imports which, and what an import costs."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import pytest
from transformers.dynamic_module_utils import get_imports

import vlmoe
from vlmoe.hub.model_code import flat_code

ROOT = Path(__file__).parents[1]
# what is saved beside a model's weights, lowest first, and the toolkit's rooms above it
MODEL = ("configuration", "modeling_vlmoe", "processing")
TOOLKIT = (
    *("hub", "figures", "data", "routing", "lora", "upcycling", "tasks", "training"),
    "compression",
)
# room: the rooms that it may import from, besides itself
BELOW = {
    "configuration": set(),
    "modeling_vlmoe": {"configuration"},
    "processing": {"configuration"},
    "hub": {*MODEL},
    "figures": {*MODEL, "hub"},
    "data": {*MODEL, "hub", "figures"},
    "routing": {*MODEL, "hub", "figures", "data"},
    "lora": {*MODEL, "hub", "figures", "data"},
    "upcycling": {*MODEL, "hub", "figures", "data"},
    "tasks": {*MODEL, "hub", "figures", "data"},
    "training": {*MODEL, "hub", "figures", "data", "routing", "lora", "upcycling", "tasks"},
    "compression": {*MODEL, "hub", "figures", "data", "routing", "upcycling", "training"},
}
TRAVELS_MAY_IMPORT = {"torch", "transformers", "huggingface_hub", "PIL", "numpy", "safetensors"}
HEAVY = ("peft", "datasets", "trl", "accelerate", "evaluate", "matplotlib", "easy_vqa", "emoji")
HEAVY += ("sentence_transformers",)
IMPORTED_PACKAGES = """
import sys
from transformers import AutoModelForImageTextToText, PreTrainedModel, ProcessorMixin
print(*{name.partition(".")[0] for name in sys.modules})
import vlmoe
print(*{name.partition(".")[0] for name in sys.modules})
import vlmoe.training.build
print(*{name.partition(".")[0] for name in sys.modules})
"""
STAR_IMPORT = """
import sys
sys.modules |= dict.fromkeys(("peft", "trl", "datasets", "accelerate", "evaluate"))
from vlmoe import *
print(*dir())
"""

# (relative level, module, line); an absolute import has level 0
Import = tuple[int, str, int]


def modules(folder: str) -> list[Path]:
    """The folder's Python files, without its __init__.py."""
    return sorted(path for path in (ROOT / folder).rglob("*.py") if path.name != "__init__.py")


def imports(path: Path) -> Iterator[Import]:
    """Every import statement of a file, those inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.level, node.module or "", node.lineno


def test_public_names_are_importable_and_listed() -> None:
    """Each name of the lazy table is what its module defines, in `__all__` and in `dir()`."""
    for name, module in vlmoe._MODULES.items():
        assert getattr(vlmoe, name) is getattr(import_module(f"vlmoe.{module}"), name)
    assert set(vlmoe.__all__) >= {*vlmoe._MODULES, "__version__"}
    assert all(hasattr(vlmoe, name) for name in vlmoe.__all__)
    assert set(dir(vlmoe)) >= set(vlmoe.__all__)
    assert not {"Any", "import_module", "AutoConfig"} & set(dir(vlmoe))
    with pytest.raises(AttributeError, match="no attribute 'lora_config'"):
        vlmoe.lora_config  # noqa: B018


def test_editors_see_the_names_of_the_lazy_table() -> None:
    tree = ast.parse(Path(vlmoe.__file__).read_text())
    guarded = [node for node in tree.body if isinstance(node, ast.If)]
    for_editors = {
        alias.asname: node.module
        for block in guarded
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert for_editors == vlmoe._MODULES


def test_the_version_is_that_of_the_distribution() -> None:
    assert vlmoe.__version__ == version("vlmoe")


def test_a_star_import_works_without_the_extras() -> None:
    command = [sys.executable, "-c", STAR_IMPORT]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    names = set(run.stdout.split())
    needing_extras = {name for name, module in vlmoe._MODULES.items() if module in vlmoe._NEEDS}
    assert {"VLMoEConfig", "VLMoECollator", "load_rows"} <= names
    assert not names & needing_extras and names | needing_extras >= set(vlmoe.__all__)


def where_room_lies(room: str) -> Path:
    """The room's folder in the checkout."""
    return ROOT / room if room in MODEL else ROOT / "vlmoe" / room


def imported_rooms(path: Path, room: str) -> Iterator[tuple[str, str]]:
    """For every import of a file inside the package: where it stands, and the room it names."""
    package = ["vlmoe", room, *path.relative_to(where_room_lies(room)).parts[:-1]]
    for level, module, line in imports(path):
        where = f"{path.relative_to(ROOT)}:{line}"
        if level == 0:
            is_ours = module.partition(".")[0] in ("vlmoe", "vlmoe_cli", "scripts", *BELOW)
            assert not is_ours, f"{where} imports {module} by its absolute name"
            continue
        assert level <= len(package), f"{where} imports from above the package"
        base = package[: len(package) - level + 1]
        target = [*base, *filter(None, module.split("."))]
        assert len(target) > 1, f"{where} imports from the front door"
        yield where, target[1]


@pytest.mark.parametrize("room", BELOW)
def test_a_room_imports_only_from_those_below(room: str) -> None:
    files = sorted(where_room_lies(room).rglob("*.py"))
    assert files
    for path in files:
        for where, target in imported_rooms(path, room):
            assert target in {room, *BELOW[room]}, f"{where} must not import {target}"


def test_every_package_is_a_room() -> None:
    folders = {path.name for path in (ROOT / "vlmoe").iterdir() if (path / "__init__.py").is_file()}
    assert folders == set(TOOLKIT) and BELOW.keys() == {*MODEL, *TOOLKIT}


def test_the_scripts_import_the_package_by_its_name() -> None:
    for path in modules("scripts"):
        for level, module, line in imports(path):
            where = f"{path.relative_to(ROOT)}:{line}"
            assert level <= 1, f"{where} imports from above the package"
            assert level == 1 or module.partition(".")[0] not in BELOW, where


def test_hub_files_have_unique_names() -> None:
    names = [path.name for folder in MODEL for path in modules(folder)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("folder", MODEL)
def test_hub_files_import_only_what_every_user_has(folder: str) -> None:
    allowed = TRAVELS_MAY_IMPORT | sys.stdlib_module_names
    for path in modules(folder):
        # What transformers looks for before it loads code; it leaves out what stands in a `try`.
        assert set(get_imports(path)) <= allowed, path.name
        for level, module, line in imports(path):
            where = f"{path.relative_to(ROOT)}:{line}"
            if level == 0:
                continue
            # On the Hub `from ..folder.module import name` becomes `from .module import name`.
            target = f"{folder}.{module}" if level == 1 else module
            assert (ROOT / target.replace(".", "/")).with_suffix(".py").is_file(), (
                f"{where}: name the module, not its folder"
            )


def test_what_is_saved_beside_a_model_is_all_of_its_folders_and_nothing_else() -> None:
    saved = (vlmoe.VLMoEConfig, vlmoe.VLMoEProcessor)
    named = [name for each in saved for name in (*each.hub_classes.values(), *each.hub_modules)]
    files = flat_code(named)
    assert files.keys() == {path.name for folder in MODEL for path in modules(folder)}


def test_importing_vlmoe_imports_no_package_that_transformers_does_not() -> None:
    command = [sys.executable, "-c", IMPORTED_PACKAGES]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    alone, with_vlmoe, answering = (set(line.split()) for line in run.stdout.splitlines())
    assert "torch" in alone and "vlmoe" in with_vlmoe
    extra = with_vlmoe - alone - set(sys.stdlib_module_names)
    assert not extra.intersection(HEAVY)
    assert {name for name in extra if not name.startswith("_")} == {"vlmoe"}
    assert "peft" not in answering, "a command that only answers needs what adapts experts"


def test_test_files_import_helper_modules_and_never_each_other() -> None:
    files = {path.stem for path in modules("tests") if path.name.startswith("test_")}
    found = {
        f"{path.relative_to(ROOT)}:{line} imports {module}"
        for path in modules("tests")
        for _, module, line in imports(path)
        if module in files
    }
    assert not found

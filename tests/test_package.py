"""The package from outside: public names, which folder imports which, and what an import costs."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers.dynamic_module_utils import get_imports

import vlmoe
from vlmoe.configuration.hub_code import flat_code

ROOT = Path(__file__).parents[1]
PUBLIC = {
    *("VLMoEConfig", "VLMoETextConfig", "VLMoEProcessor", "VLMoEPreTrainedModel"),
    *("VLMoEModel", "VLMoETextModel", "VLMoEForConditionalGeneration"),
}
# folder: the folders it may import from
MAY_IMPORT = {
    "configuration": {"configuration"},
    "modeling_vlmoe": {"configuration", "modeling_vlmoe"},
    "processing": {"configuration", "processing"},
    "training": {"configuration", "modeling_vlmoe", "processing", "training"},
    "vlmoe": {"configuration", "modeling_vlmoe", "processing", "training"},
}
ON_THE_HUB = ("configuration", "modeling_vlmoe", "processing")
# in these folders, but not on the Hub
NEEDS_PEFT = {"expert_lora.py", "expert_lora_config.py"}
UPCYCLING = {path.name for path in (ROOT / "modeling_vlmoe/upcycling").glob("*.py")}
ON_THE_HUB_MAY_IMPORT = {"torch", "transformers", "huggingface_hub", "PIL", "numpy", "safetensors"}
HEAVY = ("peft", "datasets", "trl", "accelerate", "evaluate", "matplotlib", "easy_vqa")
IMPORTED_PACKAGES = """
import sys
from transformers import AutoModelForImageTextToText, PreTrainedModel, ProcessorMixin
print(*{name.partition(".")[0] for name in sys.modules})
import vlmoe
print(*{name.partition(".")[0] for name in sys.modules})
import vlmoe_cli.loading
print(*{name.partition(".")[0] for name in sys.modules})
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


def test_public_names_are_importable() -> None:
    assert set(vlmoe.__all__) >= PUBLIC
    assert all(hasattr(vlmoe, name) for name in vlmoe.__all__)


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_imports_point_one_way(folder: str) -> None:
    files = [*modules(folder), ROOT / folder / "__init__.py"]
    for path in files:
        # how many dots lead to the import package `vlmoe`
        own_level = len(path.relative_to(ROOT).parts) - (folder == "vlmoe")
        for level, module, line in imports(path):
            where = f"{path.relative_to(ROOT)}:{line}"
            package = module.partition(".")[0]
            if level == 0:
                absolute = package in ("vlmoe", "vlmoe_cli", *MAY_IMPORT, "scripts")
                assert not absolute, f"{where} imports {module} by its absolute name"
            elif level == own_level:
                assert package in MAY_IMPORT[folder], f"{where} must not import {package}"
            else:
                assert level < own_level, f"{where} imports from above the package"


def test_only_the_front_door_and_nothing_of_the_scripts_is_imported_by_the_scripts() -> None:
    for path in modules("scripts"):
        for level, module, line in imports(path):
            where = f"{path.relative_to(ROOT)}:{line}"
            assert level <= 1, f"{where} imports from above the package"
            assert level == 1 or module.partition(".")[0] not in MAY_IMPORT.keys() - {"vlmoe"}, (
                where
            )


def test_hub_files_have_unique_names() -> None:
    names = [path.name for folder in ON_THE_HUB for path in modules(folder)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("folder", ON_THE_HUB)
def test_hub_files_import_only_what_every_user_has(folder: str) -> None:
    allowed = ON_THE_HUB_MAY_IMPORT | sys.stdlib_module_names
    for path in modules(folder):
        if path.name in NEEDS_PEFT | UPCYCLING:
            continue
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


def test_code_that_needs_the_package_does_not_go_to_the_hub() -> None:
    config = vlmoe.VLMoEConfig
    files = flat_code([*config.hub_classes.values(), *config.hub_modules])
    assert not files.keys() & {*NEEDS_PEFT, *UPCYCLING, "routed_lora.py", "routed_lora_cpu.py"}
    assert vlmoe.expert_lora_config.__module__ == "vlmoe.modeling_vlmoe.expert_lora_config"
    with pytest.raises(AttributeError, match="no attribute 'lora'"):
        vlmoe.lora  # noqa: B018


def test_importing_vlmoe_imports_no_package_that_transformers_does_not() -> None:
    command = [sys.executable, "-c", IMPORTED_PACKAGES]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    alone, with_vlmoe, answering = (set(line.split()) for line in run.stdout.splitlines())
    assert "torch" in alone and "vlmoe" in with_vlmoe
    extra = with_vlmoe - alone - set(sys.stdlib_module_names)
    assert not extra.intersection(HEAVY)
    assert {name for name in extra if not name.startswith("_")} == {"vlmoe"}
    assert "peft" not in answering, "a command that only answers needs what adapts experts"

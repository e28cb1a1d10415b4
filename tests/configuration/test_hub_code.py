"""What saving writes beside the JSON files: which code, flattened how, and for which classes."""

import ast
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    PreTrainedTokenizerBase,
)
from transformers.dynamic_module_utils import get_imports, get_relative_imports

from vlmoe import (
    VLMoEConfig,
    VLMoEForConditionalGeneration,
    VLMoEModel,
    VLMoEProcessor,
    VLMoETextConfig,
    VLMoETextModel,
)
from vlmoe.configuration import configuration_vlmoe

ROOT = Path(__file__).parents[2]
# transformers itself needs all of these but torch and Pillow, which the model and its images need
EVERY_USER_HAS = {"torch", "transformers", "huggingface_hub", "safetensors", "PIL", "numpy"}
SOURCES = {
    path.name: path
    for folder in ("configuration", "modeling_vlmoe", "processing")
    for path in (ROOT / folder).glob("*.py")
    if path.name != "__init__.py"
}
AUTO_CLASSES = {
    "AutoConfig": (AutoConfig, VLMoEConfig),
    "AutoModel": (AutoModel, VLMoEModel),
    "AutoModelForImageTextToText": (AutoModelForImageTextToText, VLMoEForConditionalGeneration),
    "AutoModelForMultimodalLM": (AutoModelForMultimodalLM, VLMoEForConditionalGeneration),
    "AutoModelForCausalLM": (AutoModelForCausalLM, VLMoEForConditionalGeneration),
    "AutoProcessor": (AutoProcessor, VLMoEProcessor),
}
Configs = Callable[..., VLMoEConfig]


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Every import of a file, those inside functions too: (relative level, module)."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.level, node.module or ""


def files_of(*classes: type) -> set[str]:
    """Names of the files of the package that hold the classes and all that these files import."""
    names = {f"{each.__module__.rpartition('.')[2]}.py" for each in classes}
    while True:
        found = {
            f"{module.rpartition('.')[2]}.py"
            for name in names
            for level, module in imports(SOURCES[name])
            if level
        }
        if found <= names:
            return names
        names |= found


MODEL_FILES = files_of(VLMoEConfig, VLMoEForConditionalGeneration)
# with the model's, which nothing else brings where Trainer pushes during training
PROCESSOR_FILES = files_of(VLMoEProcessor, VLMoEForConditionalGeneration)


class ChangedConfig(VLMoEConfig):
    """A user's own model, built on ours."""

    model_type = "changed"


def code_in(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*.py")}


def auto_map_of(file: Path) -> dict[str, str]:
    return json.loads(file.read_text())["auto_map"]


def test_config_model_and_processor_bring_their_files_and_name_their_classes(
    saved_model: Path,
) -> None:
    assert code_in(saved_model) == MODEL_FILES | PROCESSOR_FILES
    assert {"modeling_vlmoe.py", "sparse_moe.py", "image_layout.py"} < code_in(saved_model)
    model_map = auto_map_of(saved_model / "config.json")
    processor_map = auto_map_of(saved_model / "processor_config.json")
    assert model_map.keys() | processor_map.keys() == AUTO_CLASSES.keys()
    for auto_class, reference in (model_map | processor_map).items():
        module, name = reference.split(".")
        tree = ast.parse((saved_model / f"{module}.py").read_text())
        assert name == AUTO_CLASSES[auto_class][1].__name__
        assert name in {node.name for node in tree.body if isinstance(node, ast.ClassDef)}


def test_each_part_saved_alone_brings_all_that_it_needs(
    tiny_config: Configs, processor: VLMoEProcessor, tmp_path: Path
) -> None:
    config = tiny_config()
    config.save_pretrained(tmp_path / "config")
    config.text_config.save_pretrained(tmp_path / "text")
    processor.save_pretrained(tmp_path / "processor")
    assert code_in(tmp_path / "config") == MODEL_FILES
    assert code_in(tmp_path / "processor") == PROCESSOR_FILES
    text_map = auto_map_of(tmp_path / "text" / "config.json")
    assert text_map == {
        "AutoConfig": "configuration_vlmoe_text.VLMoETextConfig",
        "AutoModel": "modeling_vlmoe_text.VLMoETextModel",
    }
    assert code_in(tmp_path / "text") == files_of(VLMoETextConfig, VLMoETextModel) < MODEL_FILES
    text = AutoModel.from_config(config.text_config)
    assert type(text) is VLMoETextModel


def test_every_import_of_the_files_resolves_beside_them_or_is_installed(saved_model: Path) -> None:
    for path in saved_model.glob("*.py"):
        siblings = {module for level, module in imports(path) if level == 1}
        assert not [module for level, module in imports(path) if level > 1], path.name
        assert all((saved_model / f"{module}.py").is_file() for module in siblings), path.name
        # the same as transformers reads it: what it copies, and what it demands of the machine
        assert set(get_relative_imports(path)) == siblings, path.name
        assert set(get_imports(path)) <= EVERY_USER_HAS | sys.stdlib_module_names, path.name


def test_files_differ_from_the_package_in_the_flattened_imports_only(saved_model: Path) -> None:
    for name in code_in(saved_model):
        ours = SOURCES[name].read_text().splitlines()
        theirs = (saved_model / name).read_text().splitlines()
        for source, written in zip(ours, theirs, strict=True):
            if source != written:
                before, _, module = source.partition(" import ")[0].rpartition(".")
                assert before.startswith("from ..") and written.startswith(f"from .{module} import")


def test_transformers_finds_the_words_it_looks_for_before_it_sets_experts(
    saved_model: Path,
) -> None:
    for name in ("modeling_vlmoe.py", "modeling_vlmoe_text.py"):
        assert "@use_experts_implementation" in (saved_model / name).read_text()


def test_saving_again_replaces_code_and_auto_map_and_leaves_nothing_else(
    tiny_config: Configs, tmp_path: Path
) -> None:
    config = tiny_config()
    config.auto_map = {"AutoConfig": "someone/old--configuration_vlmoe.VLMoEConfig", "AutoX": "a.B"}
    (tmp_path / "router.py").write_text("old")
    config.save_pretrained(tmp_path)
    config.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == MODEL_FILES | {"config.json"}
    assert (tmp_path / "router.py").read_text() != "old"
    assert auto_map_of(tmp_path / "config.json") == {
        "AutoConfig": "configuration_vlmoe.VLMoEConfig",
        "AutoModel": "modeling_vlmoe.VLMoEModel",
        "AutoModelForImageTextToText": "modeling_vlmoe.VLMoEForConditionalGeneration",
        "AutoModelForMultimodalLM": "modeling_vlmoe.VLMoEForConditionalGeneration",
        "AutoModelForCausalLM": "modeling_vlmoe.VLMoEForConditionalGeneration",
    }


def test_a_subclass_made_elsewhere_does_not_claim_to_be_ours(
    tiny_config: Configs, tmp_path: Path
) -> None:
    fields = tiny_config().to_dict()
    fields.pop("model_type")
    ChangedConfig(**fields).save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json"}
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())


@pytest.mark.parametrize("trust_remote_code", [None, False, True])
@pytest.mark.parametrize("auto_class", AUTO_CLASSES)
def test_with_the_package_imported_its_own_classes_are_used(
    saved_model: Path, auto_class: str, trust_remote_code: bool | None
) -> None:
    auto, expected = AUTO_CLASSES[auto_class]
    loaded = auto.from_pretrained(saved_model, trust_remote_code=trust_remote_code)
    assert type(loaded) is expected
    assert not any("vlmoe" in name for name in sys.modules if name.startswith("transformers_mod"))


@pytest.mark.parametrize("part", ["config", "processor"])
def test_a_push_carries_the_code_also_from_a_folder_that_had_it(
    tiny_config: Configs,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    part: str,
) -> None:
    commits: list[set[str]] = []

    class Repo:
        repo_id = "someone/model"

    def create_commit(self: HfApi, repo_id: str, operations: Any, **kwargs: Any) -> None:
        files = {each.path_in_repo: each.path_or_fileobj for each in operations}
        assert all(Path(file).stat().st_size for file in files.values())
        commits.append(set(files))

    monkeypatch.setattr(HfApi, "create_repo", lambda *args, **kwargs: Repo)
    monkeypatch.setattr(HfApi, "create_commit", create_commit)
    config = tiny_config(text={"vocab_size": len(tokenizer)})
    pushed = config if part == "config" else VLMoEProcessor.for_config(config, tokenizer)
    for _ in range(2):
        pushed.save_pretrained(str(tmp_path), push_to_hub=True, repo_id="someone/model")
    code, file = {
        "config": (MODEL_FILES, "config.json"),
        "processor": (PROCESSOR_FILES, "processor_config.json"),
    }[part]
    assert len(commits) == 2
    assert all(files >= {*code, file} for files in commits)


def test_a_copy_without_presets_says_where_they_are(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(configuration_vlmoe, "PRESETS", tmp_path / "presets")
    with pytest.raises(ValueError, match="no presets; they come with the package"):
        VLMoEConfig.from_preset("tiny")

"""Broken, foreign and malicious model folders: one error that names the file, and nothing runs."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

from vlmoe import VLMoEConfig, VLMoEForConditionalGeneration, VLMoETextConfig
from vlmoe_cli.main import main

LOADERS = {"our class": VLMoEForConditionalGeneration, "auto class": AutoModelForImageTextToText}


@pytest.fixture
def folder(saved_model: Path, tmp_path: Path) -> Path:
    """A saved model of one's own to break."""
    return shutil.copytree(saved_model, tmp_path / "model")


@pytest.fixture(params=LOADERS)
def loader(request: pytest.FixtureRequest) -> Any:
    return LOADERS[request.param]


def change_json(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.mark.parametrize("damage", ["half", "header", "empty"])
def test_damaged_weights(folder: Path, loader: Any, damage: str) -> None:
    file = folder / "model.safetensors"
    content = file.read_bytes()
    damaged = {
        "half": content[: len(content) // 2],
        "header": content[:8] + b"\xff" * 20 + content[28:],
        "empty": b"",
    }
    file.write_bytes(damaged[damage])
    with pytest.raises(OSError, match=r"model\.safetensors is damaged"):
        loader.from_pretrained(folder)


@pytest.mark.parametrize("damage", ["missing", "half"])
def test_a_missing_or_damaged_shard(folder: Path, loader: Any, damage: str) -> None:
    model = VLMoEForConditionalGeneration.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="100KB")
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    content = shard.read_bytes()
    shard.unlink()
    if damage == "half":
        shard.write_bytes(content[: len(content) // 2])
    with pytest.raises(OSError, match=shard.name):
        loader.from_pretrained(folder)


def test_a_foreign_model(folder: Path) -> None:
    change_json(folder / "config.json", model_type="llava")
    for load in (
        VLMoEForConditionalGeneration.from_pretrained,
        VLMoEConfig.from_pretrained,
        VLMoETextConfig.from_pretrained,
    ):
        with pytest.raises(ValueError, match=r"config\.json: `model_type` is 'llava'; allowed: 'v"):
            load(folder)


def test_a_foreign_text_model(folder: Path) -> None:
    text = json.loads((folder / "config.json").read_text())["text_config"]
    change_json(folder / "config.json", text_config=text | {"model_type": "llama"})
    with pytest.raises(ValueError, match="`model_type` of a VLMoETextConfig is 'llama'"):
        VLMoEForConditionalGeneration.from_pretrained(folder)


def test_parts_of_a_config_load_from_the_whole(folder: Path) -> None:
    whole = VLMoEConfig.from_pretrained(folder)
    assert VLMoETextConfig.from_pretrained(folder).to_dict() == whole.text_config.to_dict()
    with pytest.raises(ValueError, match="`model_type` of a VLMoEConfig is 'vlmoe_text'"):
        VLMoEConfig(**whole.text_config.to_dict())


class Payload:
    """Unpickled, it would make a folder."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


@pytest.fixture
def malicious(folder: Path, tmp_path: Path) -> Path:
    """A folder whose only weights are a pickle that runs code."""
    (folder / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Payload(tmp_path / "trace")}, folder / "pytorch_model.bin")
    return folder


def test_a_malicious_pickle_runs_nothing(malicious: Path, loader: Any, tmp_path: Path) -> None:
    with pytest.raises(Exception, match="Weights only load failed"):
        loader.from_pretrained(malicious)
    assert not (tmp_path / "trace").exists()
    torch.load(malicious / "pytorch_model.bin", weights_only=False)
    assert (tmp_path / "trace").exists()  # the payload works where it is let


@pytest.mark.parametrize("command", ["generate", "evaluate", "train"])
def test_commands_refuse_pickled_weights(
    malicious: Path, tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = {
        "generate": ["Is it red?"],
        "evaluate": ["--dataset", "easy_vqa"],
        "train": ["--dataset", "easy_vqa", "--output_dir", str(tmp_path / "out")],
    }
    assert main([command, "--model", str(malicious), *arguments[command]]) != 0
    error = capsys.readouterr().err
    assert "pytorch_model.bin" in error and "safetensors" in error
    assert not (tmp_path / "trace").exists()

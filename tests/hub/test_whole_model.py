"""The folder of a model is judged by the headers of its files, as `from_pretrained` reads them."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tampering import BANK, TAMPERED, Tensors, change_json, drop, rename, tamper

from vlmoe import VLMoEForConditionalGeneration, expert_int8_config
from vlmoe.hub.finite_weights import require_finite
from vlmoe.hub.whole_model import require_finite_files, weights_problems

load = VLMoEForConditionalGeneration.from_pretrained
NORM = "model.language_model.norm.weight"


@pytest.fixture
def folder(saved_model: Path, tmp_path: Path) -> Path:
    """A saved model of one's own to break."""
    return shutil.copytree(saved_model, tmp_path / "model")


@pytest.mark.parametrize("kind", TAMPERED)
def test_each_kind_of_difference_is_named(folder: Path, kind: str) -> None:
    change, said = TAMPERED[kind]
    assert list(weights_problems(folder)) == []
    [problem] = weights_problems(tamper(folder, change))
    assert problem.startswith("model.safetensors: ") and re.search(said, problem), problem


def test_whole_numbers_in_place_of_weights_are_named(folder: Path) -> None:
    def to_int(weights: Tensors) -> None:
        weights[BANK] = weights[BANK].to(torch.int32)

    def to_bfloat16(weights: Tensors) -> None:
        weights[BANK] = weights[BANK].to(torch.bfloat16)

    assert list(weights_problems(tamper(folder, to_bfloat16))) == []
    [problem] = weights_problems(tamper(folder, to_int))
    assert f"{BANK} holds I32; the model needs floating-point numbers" in problem


def test_shards_and_int8_experts_are_judged_alike(folder: Path, tmp_path: Path) -> None:
    model = load(folder, quantization_config=expert_int8_config())
    model.save_pretrained(tmp_path / "int8", max_shard_size="50KB")
    assert len(list((tmp_path / "int8").glob("*.safetensors"))) > 2
    assert list(weights_problems(tmp_path / "int8")) == []
    scale = BANK.replace("gate_up_proj", "_gate_up_proj_scale")
    [problem] = weights_problems(tamper(tmp_path / "int8", lambda w: w.pop(scale), scale))
    assert BANK in problem


@pytest.mark.parametrize("base", ["qwen2", "dinov2"])
def test_names_are_those_after_conversion(
    tiny_model: Any, tiny_config: Any, tmp_path: Path, base: str
) -> None:
    """Towers that transformers loads under the names of their first release, too."""
    vision = {"model_type": "dinov2"} if base == "dinov2" else {}
    model = tiny_model(tiny_config(vision=vision))
    model.save_pretrained(tmp_path, save_original_format=True)
    assert list(weights_problems(tmp_path)) == []


def test_a_model_much_bigger_than_its_weights_is_judged_without_memory(folder: Path) -> None:
    text = json.loads((folder / "config.json").read_text())["text_config"]
    sizes = {"num_experts": 100_000, "moe_intermediate_size": 100_000, "num_hidden_layers": 4}
    per_layer = {"layer_types": None, "no_rope_layers": [1] * 4}
    change_json(folder / "config.json", text_config=text | sizes | per_layer)
    [problem] = weights_problems(folder)
    assert re.search(r"9 missing .*layers\.3.*; 9 of another shape", problem), problem


@pytest.mark.parametrize("content", ["{}", '{"model_type": "t5"}', "null", "[1]", None])
def test_a_config_of_no_vlmoe_is_named(folder: Path, content: str | None) -> None:
    (folder / "config.json").unlink()
    if content is None:
        (folder / "config.json").mkdir()
    else:
        (folder / "config.json").write_text(content)
    [problem] = weights_problems(folder)
    assert problem.startswith("config.json: no model can be built from it")


def test_a_config_of_another_family_is_named(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "llama"}')
    [problem] = weights_problems(folder)
    assert "290 missing" in problem and problem.endswith("describes a LlamaForCausalLM")


def test_another_config_may_be_given(folder: Path, tiny_config: Any) -> None:
    config = load(folder).config
    config.text_config.num_hidden_layers = 2
    config.text_config.layer_types = config.text_config.layer_types[:2]
    [problem] = weights_problems(folder, config)
    assert "9 unexpected (model.language_model.layers.2" in problem


def test_what_is_logged_afterwards_is_logged(
    folder: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    list(weights_problems(folder))
    assert not caplog.records and not capsys.readouterr().err
    load(tamper(folder, rename), output_loading_info=True)
    assert "LOAD REPORT" in caplog.text and "Loading weights" in capsys.readouterr().err


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_number_that_is_none_is_found(value: float, dtype: torch.dtype) -> None:
    tensors = {name: torch.ones(3, 5, dtype=dtype) for name in "abc"} | {
        "empty": torch.ones(0),
        "numbers": torch.ones(3, dtype=torch.int8),
        "eight": torch.ones(3, dtype=torch.float8_e4m3fn),
        "far": torch.ones(1, device="meta"),
    }
    require_finite(tensors.items(), "model")
    tensors["b"][2, 4] = value
    with pytest.raises(ValueError, match=r"^model: the tensor b holds NaN or infinite numbers"):
        require_finite(tensors.items(), "model")


def test_scales_of_int8_experts_are_looked_at(folder: Path, tmp_path: Path) -> None:
    model = load(folder, quantization_config=expert_int8_config())
    require_finite(model.state_dict().items(), "model")
    model.get_parameter(BANK).data.scale[1, 2] = float("nan")
    with pytest.raises(ValueError, match=BANK):
        require_finite(model.state_dict().items(), "model")
    model.save_pretrained(tmp_path / "int8")
    with pytest.raises(ValueError, match=r"int8/model\.safetensors: .*_gate_up_proj_scale"):
        require_finite_files(tmp_path / "int8")


def test_files_are_looked_at_tensor_by_tensor(folder: Path) -> None:
    require_finite_files(folder)
    with pytest.raises(ValueError, match=rf"model\.safetensors: the tensor {NORM} holds NaN"):
        require_finite_files(tamper(folder, lambda w: w[NORM].fill_(float("nan"))))


def test_nothing_is_said_of_folders_without_weights_of_a_model(folder: Path) -> None:
    tamper(folder, drop)
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    assert list(weights_problems(folder)) == []

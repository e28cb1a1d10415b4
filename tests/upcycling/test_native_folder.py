"""A folder of a native sparse model: the files of the model in memory, made expert by expert."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from native_dense import LANGUAGE_MODELS, dense_model
from native_sparse import FAMILIES, dense_config
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from vlmoe.hub.published_layout import BANKS
from vlmoe.upcycling.conversion import Conversion, native_model
from vlmoe.upcycling.folder import upcycle_folder
from vlmoe.upcycling.options import Upcycling
from vlmoe.upcycling.report import UpcyclingReport
from vlmoe.upcycling.stored_model import StoredBank

FAST = ("llama", "qwen3_vl", "qwen3_5", "smolvlm", "llava_next", "lfm2_vl")
ROUTER = {"router_std": 0.3}  # every expert is used
OPTIONS: dict[str, dict[str, Any]] = {
    "copy": {},
    "split": {"expert_split": 2},
    "drop": {"expert_init": "drop"},
    "noise": {"expert_init": "noise"},
}


def convert(source: Path, target: Path, max_shard_size: str = "5GB", **options: Any) -> Any:
    asked = Upcycling.of(4, 2, **ROUTER, **options)
    return upcycle_folder(
        lambda: Conversion.begin(source, asked, target="native"),
        target,
        {},
        max_shard_size=max_shard_size,
    )


def loaded(folder: Path) -> Any:
    config = json.loads((folder / "config.json").read_text())
    auto = AutoModelForImageTextToText if "vision_config" in config else AutoModelForCausalLM
    return auto.from_pretrained(folder, dtype="auto")


def assert_same_weights(one: Any, other: Any) -> None:
    own = one.state_dict()
    assert set(own) == set(other.state_dict())
    for name, tensor in other.state_dict().items():
        assert torch.equal(tensor, own[name]), name


@pytest.mark.parametrize(
    "family", [f if f in FAST else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES]
)
def test_the_folder_is_the_model_in_memory(family: str, tmp_path: Path) -> None:
    dense_model(dense_config(family)).save_pretrained(tmp_path / "dense")
    report = convert(tmp_path / "dense", tmp_path / "sparse")
    in_memory = native_model(tmp_path / "dense", 4, 2, **ROUTER)
    assert_same_weights(loaded(tmp_path / "sparse"), in_memory.model)
    assert report == in_memory.report == UpcyclingReport.load(tmp_path / "sparse")
    in_memory.model.save_pretrained(tmp_path / "saved")
    own, saved = (tmp_path / name / "model.safetensors" for name in ("sparse", "saved"))
    if family == "qwen3_vl":
        for name, tensor in load_file(saved).items():
            expected = tensor.mT if name.endswith(BANKS) else tensor
            assert torch.equal(load_file(own)[name], expected), name
    else:
        assert own.read_bytes() == saved.read_bytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("start", OPTIONS)
@pytest.mark.parametrize("family", ["qwen3_vl", "smolvlm"])
def test_shards_hold_each_kind_of_start(
    family: str, start: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    dense_model(dense_config(family)).to(dtype).save_pretrained(tmp_path / "dense")
    convert(tmp_path / "dense", tmp_path / "sparse", "40KB", **OPTIONS[start])
    assert len(list((tmp_path / "sparse").glob("*.safetensors"))) > 3
    in_memory = native_model(tmp_path / "dense", 4, 2, **ROUTER, **OPTIONS[start])
    assert_same_weights(loaded(tmp_path / "sparse"), in_memory.model)


def test_the_card_says_that_plain_transformers_loads_it(tmp_path: Path) -> None:
    for family in ("qwen3_vl", "llama"):
        dense_model(dense_config(family)).save_pretrained(tmp_path / family)
        convert(tmp_path / family, tmp_path / f"sparse-{family}")
        card = (tmp_path / f"sparse-{family}" / "README.md").read_text()
        assert "Plain transformers loads it" in card
        for absent in ("trust_remote_code", "import vlmoe", "custom_code"):
            assert absent not in card
        assert "| experts in each | 4, top-2 |" in card
        assert "(counted from 0: 0 to 2)" in card
        task = "text-generation" if family in LANGUAGE_MODELS else "image-text-to-text"
        assert f"pipeline_tag: {task}" in card and f'pipeline("{task}"' in card
        assert ("image token" in card) == (family == "qwen3_vl")
        assert not list((tmp_path / f"sparse-{family}").glob("*.py"))


def test_a_stored_bank_gives_the_experts_of_the_loaded_one(tmp_path: Path) -> None:
    """The report is of the files: each expert that the check computes with is read from there."""
    for family in ("qwen3_vl", "llama", "granite"):
        dense_model(dense_config(family)).save_pretrained(tmp_path / family)
        target = tmp_path / f"sparse-{family}"
        read: dict[str, list[torch.Tensor]] = {}
        original = Conversion.check

        def check(self: Conversion, model: Any, plan: Any) -> Any:
            for name, parameter in model.named_parameters():
                if isinstance(parameter, StoredBank):
                    read[name] = [parameter[index] for index in range(len(parameter))]  # noqa: B023
            return original(self, model, plan)  # noqa: B023

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Conversion, "check", check)
            convert(tmp_path / family, target, expert_init="noise")
        model = loaded(target)
        assert len(read) == 6
        for name, experts in read.items():
            assert torch.equal(torch.stack(experts), model.get_parameter(name)), name

"""Upcycled experts of a width that grouped_mm refuses train, whatever the target."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import assistant, row, user
from native_dense import dense_model as native_dense
from native_dense import language_config, vision_config
from native_processors import tiny_processor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from vlmoe import VLMoEForConditionalGeneration, VLMoETrainer
from vlmoe.hub.experts_implementation import refused_sizes
from vlmoe.hub.saved_model import load_model
from vlmoe.training.build import build_model
from vlmoe.upcycling.conversion import Conversion, native_model
from vlmoe.upcycling.folder import upcycle_folder
from vlmoe.upcycling.options import Upcycling
from vlmoe.upcycling.report import UpcyclingReport

SPLIT = {"expert_split": 2}  # of a width of 36: experts of 18
SHORT = {
    "max_steps": 1,
    "per_device_train_batch_size": 2,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
}
NATIVE: dict[str, Callable[[], Any]] = {
    "qwen3": lambda: language_config("qwen3", intermediate_size=36),
    "qwen3_vl": lambda: vision_config("qwen3_vl", intermediate_size=36),
    "llava of llama": lambda: vision_config("llava", "llama", intermediate_size=36),
}


def train(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The gradients of one step on text."""
    ids = torch.arange(20, 40)[None]
    model.train().zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if "experts" in n and p.grad is not None}


def assert_trains_as_eager(model: PreTrainedModel) -> None:
    found = train(model)
    for part in (each for each in model.modules() if isinstance(each, PreTrainedModel)):
        if part._can_set_experts_implementation():
            part.set_experts_implementation("eager")
    expected = train(model)
    assert found and found.keys() == expected.keys()
    for name, grad in found.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-6)


def implementation(model: PreTrainedModel) -> str | None:
    return model.config.get_text_config()._experts_implementation


def test_a_vlmoe_of_odd_shards_trains_before_and_after_saving(
    dense_model: Callable[..., Any], tmp_path: Path
) -> None:
    dense = dense_model("llava", "llama", intermediate_size=36)
    model = VLMoEForConditionalGeneration.from_dense(dense, 4, 2, **SPLIT)
    report = model.upcycling_report
    assert report.error <= 1e-5 and report.refused_sizes == [18, 36]
    assert "18, 36: not for grouped_mm; computed by auto" in report.table()
    model.save_pretrained(tmp_path)
    assert "experts_implementation" not in json.loads((tmp_path / "config.json").read_text())
    saved = VLMoEForConditionalGeneration.from_pretrained(tmp_path)
    for each in (model, saved):
        assert implementation(each) == "auto"
        assert_trains_as_eager(each)


@pytest.mark.parametrize("kind", NATIVE)
def test_a_native_model_of_odd_shards_trains_in_memory_and_from_its_folder(
    kind: str, tmp_path: Path
) -> None:
    dense = native_dense(NATIVE[kind]())
    made = native_model(dense, 4, 2, **SPLIT)
    assert implementation(made.model) == "auto" and made.report.refused_sizes == [18, 36]
    assert_trains_as_eager(made.model)

    dense.save_pretrained(tmp_path / "dense")
    asked = Upcycling(4, 2, **SPLIT)
    begin = partial(Conversion.begin, tmp_path / "dense", asked, target="native")
    report = upcycle_folder(begin, tmp_path / "sparse", {})
    assert report == UpcyclingReport.load(tmp_path / "sparse")
    assert report.refused_sizes == [18, 36]
    assert "18, 36: not for grouped_mm; computed by auto, in plain transformers" in report.table()
    auto = AutoModelForCausalLM if kind == "qwen3" else AutoModelForImageTextToText
    plain = auto.from_pretrained(tmp_path / "sparse")
    assert implementation(plain) == "eager" and train(plain)

    plain.save_pretrained(tmp_path / "plain")  # which does not write the field
    again = load_model(tmp_path / "plain")
    assert implementation(again) == "auto"
    assert_trains_as_eager(again)
    problem = r"rows of 18 numbers.*multiples of 4 in torch.float32; allowed: auto"
    with pytest.raises(ValueError, match=problem):
        build_model(str(tmp_path / "plain"), processor=Any, experts_implementation="grouped_mm")


def test_even_widths_keep_the_default_and_their_config(tmp_path: Path) -> None:
    dense = native_dense(language_config("qwen3"))
    dense.save_pretrained(tmp_path / "dense")
    begin = partial(Conversion.begin, tmp_path / "dense", Upcycling(4, 2), target="native")
    assert upcycle_folder(begin, tmp_path / "sparse", {}).refused_sizes == []
    assert "experts_implementation" not in (tmp_path / "sparse" / "config.json").read_text()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    assert refused_sizes(model) == [] and implementation(model) == "grouped_mm"


def test_our_trainer_trains_a_native_model_of_odd_shards_and_its_checkpoint_loads_plainly(
    tmp_path: Path,
) -> None:
    model = native_model(native_dense(NATIVE["qwen3"]()), 4, 2, **SPLIT).model
    model.set_experts_implementation("grouped_mm")  # as plain `from_pretrained` would
    assert model.name_or_path == model.config.name_or_path == ""
    trainer = VLMoETrainer(
        model,
        SHORT | {"output_dir": str(tmp_path)},
        train_dataset=[row(user(f"say {word}"), assistant(word)) for word in ("one", "two")],
        processing_class=tiny_processor("mixtral"),
    )
    trainer.train()
    assert implementation(model) == "auto"
    trainer.save_model()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert implementation(plain) == "eager" and train(plain)

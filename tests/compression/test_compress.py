"""Compression from end to end: folders, resume, errors, what a compressed model can do."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import assistant, picture, row, user
from compression_cases import CASES, model_and_processor, rows, vlmoe_model, vlmoe_processor
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
    TrainingArguments,
)

import vlmoe
from vlmoe.compression import compress_experts
from vlmoe.compression.banks import decoder_banks
from vlmoe.compression.report import CompressionReport
from vlmoe.hub.provenance import COMPRESSION_REPORT
from vlmoe_cli import main

Tensor = torch.Tensor
WAYS: dict[str, dict[str, Any]] = {"units": {"intermediate_size": 8}, "experts": {"experts": 3}}


def state(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    vlmoe_model().save_pretrained(folder)
    vlmoe_processor().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CASES)
def test_a_compressed_model_is_saved_and_loaded_as_any_other(
    name: str, way: str, tmp_path: Path
) -> None:
    model, processor = model_and_processor(name)
    before = sum(each.numel() for each in model.parameters())
    width = decoder_banks(model)[0].experts.down_proj.shape[-1]
    result = vlmoe.compress(model, rows(name != "mixtral"), processor, batch_size=4, **WAYS[way])
    assert result.folder is None
    assert result.report.after["parameters"]["total"] < before
    assert result.report.before["parameters"]["total"] == before
    model.save_pretrained(tmp_path / "small")
    auto = AutoModelForCausalLM if name == "mixtral" else AutoModelForImageTextToText
    loaded, info = auto.from_pretrained(tmp_path / "small", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    found = state(loaded)
    assert all(torch.equal(found[key], tensor) for key, tensor in state(model).items())
    layer = decoder_banks(loaded)[0]
    expected = {"units": (4, 8), "experts": (3, width)}[way]
    assert (layer.num_experts, layer.experts.down_proj.shape[-1]) == expected


@pytest.mark.parametrize("way", WAYS)
def test_a_compressed_folder_answers_without_the_package(
    way: str, saved: Path, tmp_path: Path, hub_process_without_vlmoe: Callable[..., Any]
) -> None:
    from reader_without_vlmoe import ask

    picture(1).save(tmp_path / "a.png")
    small = tmp_path / "small"
    result = vlmoe.compress(
        saved, rows(), output_dir=small, evaluation_rows=rows(first=50), batch_size=4, **WAYS[way]
    )
    assert result.folder == small
    assert {p.name for p in small.iterdir()} > {COMPRESSION_REPORT, "README.md", "compression.png"}
    assert not list(tmp_path.glob(".*compressing*"))
    inputs = (str(small), str(tmp_path / "a.png"), "what is it?", 4)
    there = hub_process_without_vlmoe(ask, *inputs)
    here = ask(*inputs)
    assert torch.equal(there["logits"], here["logits"])
    report = json.loads((small / COMPRESSION_REPORT).read_text())
    assert report["accuracy"]["questions"] == 12
    assert {"text", "image"} <= set(report["layers"][0]["error"])
    card = (small / "README.md").read_text()
    assert "## Compression" in card
    assert f"{result.report.after['parameters']['total']:,}" in card


def test_a_compressed_model_trains_and_takes_adapters(saved: Path, tmp_path: Path) -> None:
    small = vlmoe.compress(saved, rows(), output_dir=tmp_path / "s", keep=0.3, batch_size=4)
    assert decoder_banks(small.model)[0].experts.down_proj.shape[-1] == 8  # 7.2 and rounded up
    arguments = TrainingArguments(
        tmp_path / "t", max_steps=2, save_strategy="no", report_to=[], use_cpu=True
    )
    trainer = vlmoe.VLMoETrainer(str(tmp_path / "s"), arguments, train_dataset=rows())
    trainer.train()
    adapted = vlmoe.add_expert_lora(trainer.model, r=2)
    assert any("lora" in name for name, _ in adapted.named_parameters())
    with pytest.raises(ValueError, match=r"adapter on .*: merge it first"):
        vlmoe.compress(adapted.get_base_model(), rows(), vlmoe_processor(), keep=0.3)


@pytest.mark.parametrize("name", ["vlmoe", "qwen3_vl_moe"])
def test_copies_can_lose_any_expert_and_stay_exact(name: str) -> None:
    model, processor = model_and_processor(name)
    with torch.no_grad():
        for layer in decoder_banks(model):
            for parameter in layer.experts.parameters():
                parameter.copy_(parameter[:1].expand_as(parameter))
    whole = copy.deepcopy(model)
    result = vlmoe.compress(model, rows(), processor, experts=2, batch_size=4)
    assert result.report.is_exact
    assert "exact" in result.report.table()
    assert max(e for each in result.report.layers for e in each["error"].values()) < 1e-6
    ids = torch.randint(20, 90, (2, 9))
    with torch.no_grad():
        found, expected = model(input_ids=ids).logits, whole(input_ids=ids).logits
    assert (found - expected).abs().max() < 1e-6 * expected.abs().max()


@pytest.mark.parametrize("way", WAYS)
def test_a_killed_compression_goes_on_to_the_same_numbers(
    way: str, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    once = vlmoe.compress(saved, rows(), output_dir=tmp_path / "once", batch_size=4, **WAYS[way])
    function = "_narrow" if way == "units" else "_drop"
    own, called = getattr(compress_experts._Run, function), []

    def dies(self: Any, layer: Any, *more: Any) -> Any:
        called.append(layer.name)
        if len(called) == 3:
            raise KeyboardInterrupt
        return own(self, layer, *more)

    monkeypatch.setattr(compress_experts._Run, function, dies)
    target = tmp_path / "twice"
    with pytest.raises(KeyboardInterrupt):
        vlmoe.compress(saved, rows(), output_dir=target, batch_size=4, **WAYS[way])
    assert not target.exists()
    again = vlmoe.compress(saved, rows(), output_dir=target, batch_size=4, **WAYS[way])
    assert len(called) == 4, "finished layers are applied, not computed"
    one, two = (load_file(tmp_path / each / "model.safetensors") for each in ("once", "twice"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert again.report.layers == once.report.layers


def test_healing_brings_the_model_nearer_to_what_it_was() -> None:
    model, processor = vlmoe_model(), vlmoe_processor()
    frozen = {name: tensor.clone() for name, tensor in model.model.vision_tower.named_parameters()}
    result = vlmoe.compress(
        model, rows(), processor, intermediate_size=4, heal_steps=30, batch_size=6
    )
    assert result.report.healing is not None
    assert result.report.healing["last_loss"] < 0.5 * result.report.healing["first_loss"]
    for name, tensor in model.model.vision_tower.named_parameters():
        assert torch.equal(tensor, frozen[name])
    assert all(each.requires_grad for each in model.lm_head.parameters())
    assert not result.report.is_exact


def test_a_bank_that_shares_its_width_with_other_parts_is_refused() -> None:
    model = vlmoe_model(num_shared_experts=1)
    with pytest.raises(ValueError, match=r"moe_intermediate_size.*shared experts"):
        vlmoe.compress(model, rows(), vlmoe_processor(), intermediate_size=16, batch_size=4)


def test_shared_experts_keep_their_width_where_the_new_one_divides_it() -> None:
    model = vlmoe_model(num_shared_experts=1)
    shared = model.model.language_model.layers[0].mlp.shared_experts.gate_proj.weight.clone()
    vlmoe.compress(model, rows(), vlmoe_processor(), intermediate_size=8, batch_size=4)
    text = model.config.text_config
    assert (text.num_shared_experts, text.moe_intermediate_size) == (3, 8)
    kept = model.model.language_model.layers[0].mlp.shared_experts.gate_proj.weight
    assert torch.equal(kept, shared)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({}, r"nothing was given; .* exactly one"),
    ({"keep": 0.5, "experts": 3}, r"keep and experts was given"),
    ({"intermediate_size": 24}, r"`intermediate_size` is 24; allowed: 1 to 23"),
    ({"intermediate_size": 6}, r"is 6, and grouped_mm takes multiples of 4 .* 4 or 8"),
    ({"keep": 1.5}, r"`keep` is 1.5; allowed: more than 0"),
    ({"experts": 1}, r"`experts` is 1; allowed: 2 \(num_experts_per_tok\) to 3"),
    ({"experts": 4}, r"`experts` is 4; allowed: 2"),
    ({"keep": 0.5, "criterion": "reap"}, r"it needs `experts`"),
    ({"experts": 3, "criterion": "best"}, r"'best'; allowed: fisher, frequency"),
    ({"keep": 0.5, "heal_steps": -1}, r"`heal_steps` is -1"),
    ({"keep": 0.5, "evaluation_rows": rows(first=6)}, r"6 of 12 .*the first: row 6"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=[each[1][:24] for each in REFUSED])
def test_what_cannot_be_is_refused_and_the_model_stays(
    options: dict[str, Any], message: str
) -> None:
    model = vlmoe_model()
    before = state(model)
    with pytest.raises(ValueError, match=message):
        vlmoe.compress(model, rows(), vlmoe_processor(), **options)
    assert all(torch.equal(before[name], tensor) for name, tensor in state(model).items())
    assert model.config.text_config.moe_intermediate_size == 24


def test_rows_without_images_are_refused_for_a_model_with_a_tower() -> None:
    model, processor = vlmoe_model(), vlmoe_processor()
    with pytest.raises(ValueError, match="None of the calibration rows holds an image"):
        vlmoe.compress(model, rows(has_images=False), processor, keep=0.5)
    result = vlmoe.compress(model, rows(has_images=False), processor, keep=0.5, text_only=True)
    assert result.report.calibration["tokens"]["image"] == 0


def test_groups_stay_equal() -> None:
    model = vlmoe_model(num_experts=6, n_group=2, topk_group=2)
    with pytest.raises(ValueError, match=r"`experts` is 5; allowed: multiples of n_group=2"):
        vlmoe.compress(model, rows(), vlmoe_processor(), experts=5)
    result = vlmoe.compress(model, rows(), vlmoe_processor(), experts=4, batch_size=4)
    for layer in result.report.layers:
        assert sum(expert < 3 for expert in layer["kept"]) == 2


def test_an_odd_width_is_rounded_up_on_request() -> None:
    result = vlmoe.compress(
        vlmoe_model(), rows(), vlmoe_processor(), intermediate_size=6, round_up=True, batch_size=4
    )
    assert result.model.config.text_config.moe_intermediate_size == 8
    assert result.report.options["intermediate_size"] == 8


def test_a_dense_model_is_refused() -> None:
    model = vlmoe_model(mlp_only_layers=[0, 1, 2])
    with pytest.raises(ValueError, match="has no experts"):
        vlmoe.compress(model, rows(), vlmoe_processor(), keep=0.5)


def test_the_command_writes_a_smaller_model(
    saved: Path, data_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(data_folder, tmp_path / "data")
    out = tmp_path / "small"
    command = [
        "compress",
        str(saved),
        "--dataset",
        str(tmp_path / "data"),
        "--output_dir",
        str(out),
    ]
    assert main.main([*command, "--keep", "0.5", "--evaluate", "test"]) == 0
    shown = capsys.readouterr().out
    assert "narrower experts" in shown
    assert "exact match" in shown
    assert main.main([*command, "--keep", "0.5"]) == 2
    assert "not an empty folder" in capsys.readouterr().err
    assert main.main([*command, "--keep", "0.5", "--evaluate", "train"]) == 2
    assert "the split that the model is calibrated on" in capsys.readouterr().err


def test_a_report_is_read_back(saved: Path, tmp_path: Path) -> None:
    result = vlmoe.compress(saved, rows(), output_dir=tmp_path / "s", keep=0.5, batch_size=4)
    read = json.loads((tmp_path / "s" / COMPRESSION_REPORT).read_text())
    assert CompressionReport(**{k: v for k, v in read.items() if k != "is_exact"}) == result.report


def test_rows_are_told_apart_by_words_and_images() -> None:
    from vlmoe.compression.overlap import row_digest

    def digest(seed: int, words: str) -> bytes:
        return row_digest(row(user("what?", 1), assistant(words), images=[picture(seed)]))

    assert digest(0, "red") == digest(0, "red")
    assert len({digest(0, "red"), digest(1, "red"), digest(0, "blue")}) == 3

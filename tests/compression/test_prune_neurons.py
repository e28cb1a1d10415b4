"""Cutting neurons of zeros off: the same function, by models loaded plainly; what cannot be cut."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from native_processors import tiny_processor
from native_sparse import FAMILIES, sparse_model
from sparse_families import sparse_family
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

import vlmoe
from vlmoe import VLMoEForConditionalGeneration, VLMoEProcessor
from vlmoe.compression import PruningReport, prune_neurons
from vlmoe.compression.prune_neurons import PruningError
from vlmoe.hub.export import publish_layout
from vlmoe.hub.model_card import write_model_card
from vlmoe.routing.neuron_banks import NeuronBank, neuron_banks
from vlmoe_cli.main import main

ALIVE = (5, 0, 3, 1)
"""Neurons that stay, of each expert: by their number, spread over its width."""
FAST = ("llama", "qwen3_vl")
REFUSED = {"hunyuan_v1_dense": "other weights follow intermediate_size"}
"""Families whose experts cannot be cut, and why."""


def kill(banks: list[NeuronBank], alive: tuple[int, ...] = ALIVE) -> None:
    """Set all but some neurons of each expert to zero; not the first ones."""
    for number, bank in enumerate(banks):
        for e, count in enumerate(alive):
            keep = torch.randperm(bank.width, generator=torch.Generator().manual_seed(e + number))
            dead = [i for i in range(bank.width) if i not in keep[:count].tolist()]
            with torch.no_grad():
                bank.gate_and_up[e, :, dead] = 0
                bank.down[e, :, dead] = 0


def logits(model: PreTrainedModel) -> torch.Tensor:
    """Answer two rows of tokens that are no image tokens, in fp32."""
    held = model.config.to_dict().items()
    special = {value for name, value in held if name.endswith(("token_id", "token_index"))}
    words = [token for token in range(60) if token not in special][:38]
    tokens = torch.tensor(words).reshape(2, 19)
    with torch.no_grad():
        result: torch.Tensor = model.eval()(input_ids=tokens).logits.float()
    return result


def plainly(folder: Path) -> PreTrainedModel:
    config = json.loads((folder / "config.json").read_text())
    auto = AutoModelForImageTextToText if "vision_config" in config else AutoModelForCausalLM
    model: PreTrainedModel = auto.from_pretrained(folder, dtype="auto")
    return model


@pytest.mark.parametrize(
    ("fields", "dtype"),
    [
        ({}, torch.float32),
        ({}, torch.bfloat16),
        ({"num_shared_experts": 1}, torch.float32),
        ({"decoder_sparse_step": 2}, torch.float32),
    ],
)
def test_a_pruned_model_answers_as_before(
    fields: dict[str, Any], dtype: torch.dtype, tiny_model: Any, processor: Any, tmp_path: Path
) -> None:
    model = tiny_model(text={"vocab_size": len(processor.tokenizer)} | fields).to(dtype)
    kill(neuron_banks(model)[0])
    model.save_pretrained(tmp_path / "whole")
    processor.save_pretrained(tmp_path / "whole")
    report = vlmoe.prune(tmp_path / "whole", tmp_path / "cut")
    assert report.error <= 1e-5 and report.same_argmax == 1
    smaller = plainly(tmp_path / "cut")
    assert smaller.config.text_config.moe_intermediate_size == 8
    before, after = logits(model), logits(smaller)
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    assert (after - before).abs().max() <= tolerance * before.abs().max()
    banks = neuron_banks(smaller)[0]
    assert len(banks) == len(report.neurons) == len(neuron_banks(model)[0])
    for bank in banks:
        assert report.neurons[bank.name] == list(ALIVE)
        assert bank.gate_up.shape == (4, 16, 32) and bank.down.shape == (4, 32, 8)
        assert bank.alive().sum(1).tolist() == list(ALIVE)
    assert report.parameters["after"]["total"] == sum(p.numel() for p in smaller.parameters())
    assert VLMoEProcessor.from_pretrained(tmp_path / "cut").tokenizer.vocab
    assert PruningReport.load(tmp_path / "cut") == report
    card = (tmp_path / "cut" / "README.md").read_text()
    assert "## Pruning" in card and "from width 24 to 8" in card
    assert f"{report.parameters['after']['total']:,}" in card
    write_model_card(tmp_path / "cut")  # again, of the files alone


@pytest.mark.parametrize(
    "family", [f if f in FAST else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES]
)
def test_native_models_are_cut_in_the_layout_of_their_family(family: str, tmp_path: Path) -> None:
    model = sparse_model(family)
    banks = neuron_banks(model)[0]
    kill(banks)
    model.save_pretrained(tmp_path / "whole")
    if family in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[family]):
            vlmoe.prune(tmp_path / "whole", tmp_path / "cut")
        assert not (tmp_path / "cut").exists()
        return
    report = vlmoe.prune(tmp_path / "whole", tmp_path / "cut")
    assert report.error <= 1e-5 and report.width["after"] < report.width["before"]
    smaller = plainly(tmp_path / "cut")
    before, after = logits(model), logits(smaller)
    assert (after - before).abs().max() <= 1e-5 * before.abs().max()
    assert all(counts == list(ALIVE) for counts in report.neurons.values())


@pytest.mark.parametrize("family", ["qwen3_vl_moe", "mixtral"])
def test_native_models_are_compared_on_what_their_processor_makes(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor = tiny_processor(family)
    monkeypatch.setattr(prune_neurons, "read_processor", lambda source: processor)
    model = sparse_family(family)
    banks = neuron_banks(model)[0]
    kill(banks, ALIVE[:1] * banks[0].down.shape[0])
    model.save_pretrained(tmp_path / "whole")
    publish_layout(tmp_path / "whole")
    report = vlmoe.prune(tmp_path / "whole", tmp_path / "cut")
    assert report.error <= 1e-5 and report.sample["rows"] == 3
    assert (tmp_path / "cut" / "chat_template.jinja").is_file()


def test_what_cannot_be_cut_is_refused_and_leaves_no_folder(
    tiny_model: Any, tiny_moe: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cases: list[tuple[PreTrainedModel, str]] = [
        (tiny_model(), "Nothing can be cut: the widest expert has 24 neurons of 24"),
        (tiny_moe("GptOssForCausalLM"), "GptOss.* cannot be cut"),
    ]
    shared = tiny_model(text={"num_shared_experts": 1})
    kill(neuron_banks(shared)[0], (12, 0, 3, 1))  # 16 wide, of which 24 is no multiple
    cases.append((shared, r"other weights follow moe_intermediate_size"))
    for number, (model, facts) in enumerate(cases):
        folder = tmp_path / str(number)
        model.save_pretrained(folder)
        with pytest.raises(ValueError, match=facts):
            vlmoe.prune(folder, tmp_path / "cut")
        assert sorted(os.listdir(tmp_path)) == [str(n) for n in range(number + 1)]
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "file").touch()
    assert main(["prune", str(tmp_path / "0"), "--output_dir", str(tmp_path / "cut")]) == 2
    assert "is not an empty folder" in capsys.readouterr().err


def test_a_cut_that_changes_the_function_is_an_error(
    tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: VLMoEForConditionalGeneration = tiny_model()
    kill(neuron_banks(model)[0])
    model.save_pretrained(tmp_path / "whole")
    alive = NeuronBank.alive
    monkeypatch.setattr(NeuronBank, "alive", lambda bank: alive(bank).roll(1, 1))
    with pytest.raises(PruningError, match="differ by"):
        vlmoe.prune(tmp_path / "whole", tmp_path / "cut")
    assert os.listdir(tmp_path) == ["whole"]

"""Every command about saved models, on transformers' own sparse models."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import picture
from hub_process import command, logits_of_class
from hub_server import HubServer
from huggingface_hub import ModelCard
from native_dense import vision_config
from native_processors import tiny_processor
from sparse_families import EXPERTS, TOP_K, family_config, sparse_family
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

from vlmoe import add_expert_lora
from vlmoe.hub.active_parameters import parameter_counts
from vlmoe.hub.card_facts import model_facts, parameters_of
from vlmoe.hub.model_card import render_model_card
from vlmoe_cli.main import main

LLAVA, MIXTRAL = "llava_qwen3_moe", "mixtral"


@pytest.fixture(params=[LLAVA, MIXTRAL])
def native(request: Any, tmp_path: Path) -> Path:
    """Make a saved model with its processor, in a folder that is named after its family."""
    folder = tmp_path / request.param
    sparse_family(request.param).save_pretrained(folder)
    tiny_processor(request.param).save_pretrained(folder)
    return folder


def loaded(folder: Path) -> Any:
    """Load a model by transformers alone."""
    auto = AutoModelForCausalLM if folder.name.startswith(MIXTRAL) else AutoModelForImageTextToText
    return auto.from_pretrained(folder).eval()


def test_the_card_tells_how_plain_transformers_loads_it(native: Path) -> None:
    assert main(["card", str(native), "--repo_id", "user/some", "--license", "mit"]) == 0
    card = ModelCard.load(native / "README.md")
    tag = "text-generation" if native.name == MIXTRAL else "image-text-to-text"
    assert (card.data.pipeline_tag, card.data.license) == (tag, "mit")
    assert card.data.tags == ["mixture-of-experts"]
    assert "trust_remote_code" not in card.text and "import vlmoe" not in card.text
    model = loaded(native)
    bank = sum(
        p.numel() for name, p in model.named_parameters() if ".experts." in name and p.dim() == 3
    )
    total = sum(p.numel() for p in model.parameters())
    embedding = model.get_input_embeddings().weight
    decoder = sum(p.numel() for p in model.get_decoder().parameters())
    active = decoder + model.get_output_embeddings().weight.numel() + embedding.shape[1]
    active -= embedding.numel() + bank * (EXPERTS - TOP_K) // EXPERTS
    for fact in (f"| parameters | {total:,} |", f"| active for a text token | {active:,} |"):
        assert fact in card.text
    assert f"| experts in each | {EXPERTS}, top-{TOP_K} |" in card.text
    snippet = card.text.split("```python\n")[1].split("```")[0]
    text: dict[str, Any] = {}
    exec(snippet.replace('"user/some"', repr(str(native))), text)


def test_an_adapter_is_merged_into_the_files_of_its_base(
    native: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapted = add_expert_lora(loaded(native), r=2)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.5)
    adapter, merged = tmp_path / "adapter", tmp_path / f"{native.name}_merged"
    adapted.save_pretrained(adapter)
    assert main(["merge", str(adapter), "--output_dir", str(merged)]) == 0, capsys.readouterr().err
    ids = torch.tensor([[20, 30, 40, 50]])
    with torch.no_grad():
        expected, logits = adapted(input_ids=ids).logits, loaded(merged)(input_ids=ids).logits
        base = loaded(native)(input_ids=ids).logits
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (base - expected).abs().max() > 1e-3
    assert type(AutoProcessor.from_pretrained(merged)) is type(
        AutoProcessor.from_pretrained(native)
    )


def test_training_and_evaluation_write_their_part_of_the_card(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    native, output, data = (tmp_path / name for name in (LLAVA, "llava_trained", "data.jsonl"))
    sparse_family(LLAVA).save_pretrained(native)
    tiny_processor(LLAVA).save_pretrained(native)
    rows = []
    for number in range(4):
        picture(number).save(tmp_path / f"{number}.png")
        rows.append({"image": f"{number}.png", "question": "what?", "answer": "red"})
    data.write_text("\n".join(map(json.dumps, rows)))
    where = ["--dataset", str(data), "--output_dir", str(output), "--report_to", "none"]
    options = ["--max_steps", "1", "--use_cpu", "--per_device_train_batch_size", "2"]
    assert main(["train", "--model", str(native), *where, *options]) == 0, capsys.readouterr().err
    where = ["--model", str(output), "--dataset", str(data), "--split", "train"]
    assert main(["evaluate", *where, "--max_new_tokens", "2"]) == 0, capsys.readouterr().err
    text = (output / "README.md").read_text()
    assert "## Training" in text and "| optimizer steps | 1 (" in text
    assert "## Routing" in text and "4 questions of" in text
    stages = json.loads((output / "training_stages.json").read_text())
    assert stages[0]["parameters"]["total"] == sum(p.numel() for p in loaded(output).parameters())


def test_the_card_of_a_dense_model_calls_it_no_mixture(tmp_path: Path) -> None:
    vision_config("llava", "qwen3").save_pretrained(tmp_path)
    card = ModelCard(render_model_card(tmp_path))
    assert not card.data.tags and "mixture-of-experts" not in card.text
    assert "A vision-language model: it takes" in card.text


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("ernie4_5_vl_moe", ([1], EXPERTS, TOP_K, 24, 2)),
        ("gpt_oss", ([0, 1], EXPERTS, TOP_K, 48, 0)),
        ("deepseek_v3", ([1], EXPERTS, TOP_K, 24, 1)),
        ("gemma4", ([0, 1], EXPERTS, TOP_K, 24, 0)),
    ],
)
def test_the_facts_of_a_card_are_those_of_the_family(family: str, expected: Any) -> None:
    config = family_config(family)
    facts = model_facts(config, Path())
    sizes = facts.num_experts, facts.top_k, facts.width, facts.num_shared_experts
    assert (facts.sparse_layers, *sizes) == expected


def test_a_token_passes_through_the_bank_of_its_modality_alone() -> None:
    model = sparse_family("ernie4_5_vl_moe")
    counts = parameter_counts(model)
    assert counts == parameters_of(model.config)
    banks = {"text": 0, "vision": 0}
    for name, parameter in model.named_parameters():
        for kind in banks:
            if f".{kind}_moe." in name:
                share = TOP_K / EXPERTS if ".experts." in name else 1
                banks[kind] += round(parameter.numel() * share)
    decoder = model.get_decoder()
    tower = counts["total"] - sum(p.numel() for p in decoder.parameters())
    tower -= model.get_output_embeddings().weight.numel()
    hidden = model.config.get_text_config().hidden_size
    difference = counts["image_token"] - counts["text_token"]
    assert difference == tower - hidden + banks["vision"] - banks["text"]


def test_a_dataset_is_checked_by_the_models_own_processor(
    native: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture(0, (30, 20)).save(tmp_path / "good.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    image: dict[str, str] = {} if native.name == MIXTRAL else {"image": "good.png"}
    rows: list[dict[str, Any]] = [
        image | {"question": "what?", "answer": "red"},
        {"image": "broken.png", "question": "what?", "answer": "red"},
        {"question": "nothing to learn", "answer": ""},
        {"question": "long" * 80, "answer": "b"},
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    figure = ["--output", str(tmp_path / "data.png")]
    assert main(["data", str(data), "--model", str(native), *figure]) == 2
    printed = capsys.readouterr()
    assert "has 3 faults" in printed.err
    assert "positions for 256 tokens" in printed.out and "more than 256." in printed.out
    assert "«red<|im_end|>»" in printed.out and "no token to learn" in printed.out
    assert "broken.png" in printed.out
    if native.name == LLAVA:
        assert "[<image> x 4]" in printed.out and "30/30/30 pixels wide" in printed.out


def test_a_pushed_model_loads_by_its_id_without_this_package(
    native: Path,
    hub: HubServer,
    hub_process: Callable[..., Any],
    hub_process_without_vlmoe: Callable[..., Any],
) -> None:
    repo = f"tester/{native.name}"
    code, out, error = hub_process(command, "push", str(native), "--repo_id", repo)
    assert code == 0, error
    assert not any(name.endswith(".py") for name in out.split())
    auto = "AutoModelForCausalLM" if native.name == MIXTRAL else "AutoModelForImageTextToText"
    logits = hub_process_without_vlmoe(logits_of_class, repo, auto)
    with torch.no_grad():
        expected = loaded(native)(input_ids=torch.tensor([[20, 30, 40, 50]])).logits
    assert np.array_equal(logits, expected.numpy())
    asked = ["generate", "what?", "--model", repo, "--max_new_tokens", "2", "--device", "cpu"]
    code, _, error = hub_process(command, *asked)
    assert code == 0, error

"""A run and an evaluation by name on transformers' own sparse models."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from native_processors import tiny_processor
from peft import PeftModel
from sparse_families import sparse_family

from vlmoe import answer, evaluate
from vlmoe.data.loading import load_rows
from vlmoe.hub.saved_model import load_model
from vlmoe.training.build import build_model, model_for_answers
from vlmoe.training.data import TrainingData
from vlmoe.training.run import train
from vlmoe_cli.main import main

FAMILY = "llava_qwen3_moe"
SHORT = {"max_steps": 2, "report_to": "none", "use_cpu": True, "disable_tqdm": True}


@pytest.fixture
def native(tmp_path: Path) -> Path:
    folder = tmp_path / "native"
    sparse_family(FAMILY).save_pretrained(folder)
    tiny_processor(FAMILY).save_pretrained(folder)
    return folder


def test_a_run_trains_evaluates_and_saves_a_native_model(
    native: Path, data_folder: Path, tmp_path: Path
) -> None:
    data = TrainingData(str(data_folder), eval_split="train", max_eval_rows=2)
    output = tmp_path / "trained"
    result = train(str(native), data, SHORT | {"output_dir": str(output)})
    written = json.loads((output / "train_results.json").read_text())
    assert written["steps"] == 2 and written["eval_loss"] > 0
    counted = written["parameters"]
    layers = result.model.config.text_config.num_hidden_layers
    bank = sum(
        p.numel() for name, p in result.model.named_parameters() if "layers.0.mlp.experts" in name
    )
    idle = layers * bank // 2  # two of four experts
    embedding = result.model.get_input_embeddings().weight.numel()
    assert counted["total"] - counted["image_token"] == idle + embedding
    again = train(
        str(native), data, SHORT | {"output_dir": str(output), "resume_from_checkpoint": "last"}
    )
    assert again.metrics["resumed_at_step"] == 2
    trained, _ = build_model(str(output))
    for model in (again.model, trained):
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, result.model.state_dict()[name]), name


def test_a_native_model_is_asked_and_evaluated(native: Path, data_folder: Path) -> None:
    rows = load_rows(str(data_folder), "train", limit=3)
    model, processor = model_for_answers(str(native))
    evaluation = evaluate(model, processor, rows, batch_size=2, max_new_tokens=3)
    assert evaluation.questions == len(evaluation.predictions) > 0
    assert evaluation.expert_load is not None
    assert all(count > 0 for count in evaluation.expert_load["tokens"]["image"])
    first, picture = evaluation.predictions[0], rows[0]["images"][0]
    image: Any = picture["path"] if isinstance(picture, dict) else picture
    assert (
        answer(model, processor, image, first["question"], max_new_tokens=3) == first["prediction"]
    )


def test_the_commands_take_a_native_model(
    native: Path, data_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "trained"
    train_arguments = ["--output_dir", str(output), "--max_steps", "1", "--use_cpu"]
    where = ["--model", str(native), "--dataset", str(data_folder)]
    assert main(["train", *where, *train_arguments, "--report_to", "none"]) == 0
    assert "active" in capsys.readouterr().out
    where[1] = str(output)
    evaluate_arguments = ["--split", "train", "--max_rows", "2", "--max_new_tokens", "2"]
    assert main(["evaluate", *where, *evaluate_arguments]) == 0
    assert json.loads((output / "evaluate_results.json").read_text())["questions"] > 0
    figure = ["--output", str(tmp_path / "data.png")]
    assert main(["data", str(data_folder), "--model", str(output), *figure]) == 0
    assert main(["generate", "what?", "--model", str(output), "--max_new_tokens", "2"]) == 0


def test_an_adapter_of_a_native_models_experts_is_trained(
    native: Path, data_folder: Path, tmp_path: Path
) -> None:
    output = tmp_path / "adapter"
    options = {"r": 2, "attention": False, "dropout": 0.0}
    arguments = SHORT | {"output_dir": str(output), "learning_rate": 1e-2}
    train(str(native), TrainingData(str(data_folder)), arguments, lora=options)  # type: ignore[arg-type]
    adapted = PeftModel.from_pretrained(load_model(native), output)
    moved = [p for name, p in adapted.named_parameters() if "lora_B" in name]
    assert moved and all(p.abs().sum() > 0 for p in moved)
    assert not (output / "model.safetensors").exists()

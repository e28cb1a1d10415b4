"""`vlmoe train`: models from presets and folders, results, what is saved."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from vlmoe import VLMoEForConditionalGeneration, VLMoEProcessor
from vlmoe.hub.whole_model import model_problems
from vlmoe.training.arguments import training_arguments
from vlmoe.training.data import TrainingData
from vlmoe.training.run import train
from vlmoe_cli import main

TINIER = {
    "text_config": {"hidden_size": 32, "num_attention_heads": 2, "moe_intermediate_size": 24},
    "vision_config": {"hidden_size": 24, "num_hidden_layers": 1, "image_size": 16, "patch_size": 4},
    "pixel_shuffle_factor": 2,
}
FAST = ["--use_cpu", "--max_steps", "3", "--logging_steps", "1", "--learning_rate", "1e-2"]


def test_a_preset_is_trained_evaluated_saved_and_answers(
    tmp_path: Path, data_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    arguments = ["--dataset", str(data_folder), "--eval_split", "test", "--output_dir", str(output)]
    more = ["--model_overrides", json.dumps(TINIER), "--save_strategy", "steps"]
    code = main.main(["train", *arguments, *more, *FAST, "--eval_strategy", "steps"])
    assert code == 0
    printed = capsys.readouterr().out
    results = json.loads((output / "train_results.json").read_text())
    assert "training tokens per second" in printed and f"Saved to {output}" in printed
    assert f"{results['parameters']['total']:,}" in printed
    assert results["steps"] == 3 and results["seed"] == 42 and results["tokens"] > 0
    assert results["parameters"].keys() == {"total", "image_token", "text_token"}
    assert 0 <= results["eval_exact_match"] <= 1 and results["eval_loss"] > 0
    assert model_problems(output) == []
    assert list((output / "runs").rglob("events.*")), "no TensorBoard log"
    assert not [path.name for path in output.iterdir() if path.name[0] in "._"]

    model = VLMoEForConditionalGeneration.from_pretrained(output)
    processor = VLMoEProcessor.from_pretrained(output)
    inputs = processor(images=[Image.new("RGB", (9, 7))], text=["<image> hi"], return_tensors="pt")
    assert model.generate(**inputs, max_new_tokens=2).shape[0] == 1
    assert model.config.text_config.eos_token_id == processor.tokenizer.eos_token_id
    assert model.generation_config.eos_token_id == processor.tokenizer.eos_token_id


def test_training_lowers_the_loss_and_a_saved_model_goes_on_where_it_was(
    tmp_path: Path, data_folder: Path, saved_model: Path
) -> None:
    def run(model: Path, name: str) -> dict[str, Any]:
        arguments = training_arguments(
            output_dir=str(tmp_path / name),
            max_steps=12,
            learning_rate=1e-2,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
        )
        data = TrainingData(str(data_folder), eval_split="test")
        return train(str(model), data, arguments).metrics

    first, second = run(saved_model, "first"), run(tmp_path / "first", "second")
    assert first["eval_loss"] is not None and first["train_loss"] < 2
    assert second["train_loss"] < first["train_loss"]


def test_without_evaluation_data_there_is_no_evaluation(
    tmp_path: Path, data_folder: Path, saved_model: Path
) -> None:
    arguments = training_arguments(
        output_dir=str(tmp_path), max_steps=1, report_to="none", use_cpu=True
    )
    data = TrainingData(str(data_folder), without_images=True)
    result = train(str(saved_model), data, arguments)
    assert result.metrics["eval_loss"] is None
    assert arguments.eval_strategy == "epoch", "the caller's arguments were changed"


def test_a_loss_that_is_not_a_number_ends_the_run(
    tmp_path: Path,
    data_folder: Path,
    saved_model: Path,
    tiny_model: Callable[..., VLMoEForConditionalGeneration],
) -> None:
    model = VLMoEForConditionalGeneration.from_pretrained(saved_model)
    with torch.no_grad():
        model.model.language_model.norm.weight.fill_(3e38)
    model.save_pretrained(tmp_path / "model")
    VLMoEProcessor.from_pretrained(saved_model).save_pretrained(tmp_path / "model")
    arguments = training_arguments(
        output_dir=str(tmp_path / "out"),
        max_steps=2,
        logging_steps=1,
        save_steps=1,
        save_strategy="steps",
        report_to="none",
        use_cpu=True,
    )
    data = TrainingData(str(data_folder))
    with pytest.raises(ValueError, match="loss is nan at step 1"):
        train(str(tmp_path / "model"), data, arguments)
    assert not list((tmp_path / "out").glob("checkpoint-*"))


def test_the_seed_decides_a_presets_first_weights_and_workers_change_nothing(
    tmp_path: Path, data_folder: Path
) -> None:
    def losses(name: str, **fields: Any) -> list[float]:
        arguments = training_arguments(
            output_dir=str(tmp_path / name),
            max_steps=2,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            **fields,
        )
        data = TrainingData(str(data_folder))
        log = train("tiny", data, arguments, model_overrides=TINIER).log_history
        return [entry["loss"] for entry in log if "loss" in entry]

    torch.manual_seed(1)
    first = losses("first")
    torch.manual_seed(2)
    assert losses("again") == first
    assert losses("workers", dataloader_num_workers=2) == first
    assert losses("other", seed=7) != first


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one_and_resume(tmp_path: Path, data_folder: Path) -> None:
    """`python -m vlmoe_cli.train`, alone and under torch.distributed, with the same batches."""

    def losses(name: str, launcher: list[str], rows: int, *flags: str) -> list[float]:
        output = tmp_path / name
        command = [sys.executable, *launcher, "-m", "vlmoe_cli.train", *flags]
        command += ["--dataset", str(data_folder), "--output_dir", str(output), *FAST]
        command += ["--model_overrides", json.dumps(TINIER), "--report_to", "none"]
        command += ["--per_device_train_batch_size", str(rows)]
        command += ["--save_strategy", "steps", "--save_steps", "1", "--save_total_limit", "9"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env=environment, timeout=300
        )
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.count("training tokens per second") == 1
        state = json.loads((output / "checkpoint-3" / "trainer_state.json").read_text())
        return [entry["loss"] for entry in state["log_history"] if "loss" in entry]

    two = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    gloo = ["--ddp_backend", "gloo"]
    alone, together = losses("one", [], 2), losses("two", two, 1, *gloo)
    assert together == pytest.approx(alone, rel=1e-5)
    for step in (2, 3):
        (tmp_path / "two" / f"checkpoint-{step}" / "trainer_state.json").unlink()
    assert losses("two", two, 1, *gloo, "--resume_from_checkpoint", "last") == together


def test_what_happens_to_long_rows_is_chosen(
    tmp_path: Path, data_folder: Path, saved_model: Path, capsys: Any, caplog: Any
) -> None:
    rows = [json.loads(line) for line in (data_folder / "test.jsonl").read_text().splitlines()]
    question = "what color is the shape? " * 9
    rows[1]["messages"][0][0]["content"][1]["text"] = question
    data = data_folder / "long_train.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    base = ["train", "--model", str(saved_model), "--dataset", str(data), *FAST]
    try:
        for policy, code, said in (
            ("error", 2, r"row 'train[1]' ('what color is the shape"),
            ("drop", 0, "training rows with more than 40 tokens: 1; they are left out."),
            ("shorten-prompt", 0, "training rows with more than 40 tokens: 1; the start of"),
        ):
            where = ["--output_dir", str(tmp_path / policy), "--max_length", "40"]
            assert main.main([*base, *where, "--on_long_rows", policy]) == code, policy
            assert said in capsys.readouterr().err + caplog.text
            caplog.clear()
        stage = json.loads((tmp_path / "drop" / "training_stages.json").read_text())[-1]
        assert stage["data"]["rows"] == 2
        assert main.main([*base, "--max_length", "129", "--output_dir", str(tmp_path / "x")]) == 2
        assert "max_position_embeddings=128" in capsys.readouterr().err
    finally:
        data.unlink()


def test_a_task_reads_its_columns_and_shortens_long_documents(
    tmp_path: Path, saved_model: Path, capsys: Any, caplog: Any
) -> None:
    rows = [{"document": "red " * length, "summary": "blue"} for length in (2, 99)]
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    base = ["train", "--model", str(saved_model), "--dataset", str(data), *FAST]
    base += ["--task", "summarization", "--prompt", "what?", "--max_length", "40"]
    assert main.main([*base, "--output_dir", str(tmp_path / "a")]) == 0
    said = capsys.readouterr().err + caplog.text
    assert "tokens: 1; the end of their longest text is cut off" in said
    refused = [*base, "--output_dir", str(tmp_path / "b"), "--on_long_rows", "error"]
    assert main.main(refused) == 2
    assert "row 'train[1]' ('what?" in capsys.readouterr().err
    assert main.main([*base, "--output_dir", str(tmp_path / "c"), "--task", "summarisation"]) == 2
    assert "did you mean 'summarization'" in capsys.readouterr().err

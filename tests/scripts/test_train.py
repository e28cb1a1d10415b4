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
from vlmoe_cli import main
from vlmoe_cli.loading import model_for_training
from vlmoe_cli.options import DataOptions, ModelOptions
from vlmoe_cli.train import train
from vlmoe_cli.training_arguments import training_arguments
from vlmoe_cli.training_checks import check_arguments

TINIER = {
    "text_config": {"hidden_size": 32, "num_attention_heads": 2, "moe_intermediate_size": 24},
    "vision_config": {"hidden_size": 24, "num_hidden_layers": 1, "image_size": 16, "patch_size": 4},
    "pixel_shuffle_factor": 2,
}
FAST = ["--use_cpu", "--max_steps", "3", "--logging_steps", "1", "--learning_rate", "1e-2"]


def texts() -> list[str]:
    return ["what color is the shape? blue"] * 3


def options(**fields: Any) -> ModelOptions:
    return ModelOptions(**{"model_overrides": json.dumps(TINIER)} | fields)


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
        data = DataOptions(dataset=str(data_folder), eval_split="test")
        return train(ModelOptions(model=str(model)), data, arguments).metrics

    first, second = run(saved_model, "first"), run(tmp_path / "first", "second")
    assert first["eval_loss"] is not None and first["train_loss"] < 2
    assert second["train_loss"] < first["train_loss"]


def test_without_evaluation_data_there_is_no_evaluation(
    tmp_path: Path, data_folder: Path, saved_model: Path
) -> None:
    arguments = training_arguments(
        output_dir=str(tmp_path), max_steps=1, report_to="none", use_cpu=True
    )
    data = DataOptions(dataset=str(data_folder), without_images=True)
    result = train(ModelOptions(model=str(saved_model)), data, arguments)
    assert result.metrics["eval_loss"] is None
    assert arguments.eval_strategy == "epoch", "the caller's arguments were changed"


def test_a_presets_ids_are_those_of_its_tokenizer() -> None:
    model, processor = model_for_training(options(tiling=True), texts)
    config, tokenizer = model.config, processor.tokenizer
    assert config.image_token_id == processor.image_token_id
    assert config.text_config.pad_token_id == tokenizer.pad_token_id
    assert config.text_config.vocab_size == 512 >= len(tokenizer)
    assert config.text_config.hidden_size == 32 and config.text_config.num_experts == 8
    assert processor.image_processor.do_image_splitting
    assert not model_for_training(options(), texts)[1].image_processor.do_image_splitting


def test_a_foreign_tokenizer_gets_the_tokens_of_the_chat_format(
    tmp_path: Path, saved_model: Path
) -> None:
    from transformers import PreTrainedTokenizerFast

    foreign = PreTrainedTokenizerFast.from_pretrained(saved_model)
    foreign.chat_template = "{{ messages }}"
    foreign.save_pretrained(tmp_path)
    model, processor = model_for_training(options(tokenizer=str(tmp_path)), texts)
    tokenizer = processor.tokenizer
    assert model.config.text_config.vocab_size == len(tokenizer)
    assert tokenizer.eos_token == "<|end|>" and "generation" in processor.chat_template
    assert tokenizer.convert_tokens_to_ids("<row_4_col_4>") != tokenizer.unk_token_id


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"model_overrides": "{"}, ValueError, "not valid JSON"),
        ({"model_overrides": "[1]"}, ValueError, "must be a JSON object"),
        ({"model_overrides": '{"text_config": {"num_expert": 4}}'}, ValueError, "num_experts"),
        ({"model_overrides": '{"pixel_shufle": 2}'}, ValueError, "no field 'pixel_shufle'"),
        ({"model_overrides": '{"text_config": {"num_experts": 1}}'}, ValueError, "num_experts_per"),
        ({"tokenizer": "./nowhere"}, FileNotFoundError, "no tokenizer folder ./nowhere"),
        ({"dtype": "float"}, ValueError, None),
        ({"dtype": "int64"}, ValueError, "no number type of weights"),
        ({"model": "tinny"}, ValueError, "did you mean tiny"),
        ({"model": "../no/such/folder"}, FileNotFoundError, "no model folder"),
    ],
)
def test_wrong_model_options_are_named(
    fields: dict[str, Any], error: type[Exception], message: str | None
) -> None:
    if message is None:  # torch.float is float32
        assert model_for_training(options(**fields), texts)[0].dtype == torch.float32
        return
    with pytest.raises(error, match=message):
        model_for_training(options(**fields), texts)


def test_fields_of_a_saved_model_can_be_replaced_but_not_its_sizes(saved_model: Path) -> None:
    given = '{"text_config": {"router_aux_loss_coef": 0.5}}'
    chosen = ModelOptions(
        model=str(saved_model),
        model_overrides=given,
        dtype="bfloat16",
        attn_implementation="eager",
        experts_implementation="eager",
    )
    model, _ = model_for_training(chosen, texts)
    text_config = model.config.text_config
    assert text_config.router_aux_loss_coef == 0.5 and model.dtype == torch.bfloat16
    assert text_config._attn_implementation == text_config._experts_implementation == "eager"
    for wrong, message in (
        ('{"text_config": {"router_aux_los": 1}}', "did you mean router_aux_loss_coef"),
        ('{"text_config": {"router_aux_loss_coef": -1}}', "router_aux_loss_coef"),
        ('{"text_config": {"hidden_size": 64}}', "are not those of"),
    ):
        with pytest.raises(ValueError, match=message):
            model_for_training(ModelOptions(model=str(saved_model), model_overrides=wrong), texts)
    with pytest.raises(ValueError, match="keeps its tokenizer"):
        model_for_training(ModelOptions(model=str(saved_model), tokenizer="x"), texts)


def test_a_model_of_another_type_is_refused(tmp_path: Path, saved_model: Path) -> None:
    for file in saved_model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text()) | {"model_type": "llava"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="`model_type` is 'llava'"):
        model_for_training(ModelOptions(model=str(tmp_path)), texts)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"label_smoothing_factor": 0.1}, "--label_smoothing_factor"),
        ({"remove_unused_columns": True}, "--remove_unused_columns"),
        ({"train_sampling_strategy": "group_by_length"}, "--train_sampling_strategy group_by_"),
        ({"train_sampling_strategy": "batch_rebalance"}, "--train_sampling_strategy batch_"),
    ],
)
def test_arguments_that_would_spoil_training_are_refused(
    fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_arguments(training_arguments(use_cpu=True, **fields))


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
    data = DataOptions(dataset=str(data_folder))
    with pytest.raises(ValueError, match="loss is nan at step 1"):
        train(ModelOptions(model=str(tmp_path / "model")), data, arguments)
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
        log = train(options(), DataOptions(dataset=str(data_folder)), arguments).log_history
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

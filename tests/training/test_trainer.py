"""`VLMoETrainer`: from rows to a model that answers, with what is given in place of its own."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback, TrainingArguments

from vlmoe import VLMoEForConditionalGeneration, VLMoEProcessor, VLMoETrainer
from vlmoe.data.loading import load_rows
from vlmoe.routing.finite_checks import StopOnNonFiniteRouting
from vlmoe.training.callbacks import StopOnBadLoss
from vlmoe.training.telemetry import RouterTelemetry

TINIER = {
    "text_config": {"hidden_size": 32, "num_attention_heads": 2, "moe_intermediate_size": 24},
    "vision_config": {"hidden_size": 24, "num_hidden_layers": 1, "image_size": 16, "patch_size": 4},
    "pixel_shuffle_factor": 2,
}
SHORT = {"max_steps": 2, "save_strategy": "no", "report_to": "none", "use_cpu": True}


def kinds(trainer: VLMoETrainer) -> list[type]:
    return [type(callback) for callback in trainer.callback_handler.callbacks]


def test_a_preset_is_trained_on_plain_rows(tmp_path: Path, make_image: Any) -> None:
    rows = [
        {"image": make_image(i), "question": "what color?", "answer": ("red", "blue")[i % 2]}
        for i in range(4)
    ]
    values = SHORT | {"output_dir": str(tmp_path)}
    trainer = VLMoETrainer("tiny", values, train_dataset=rows, model_overrides=TINIER)
    assert trainer.args.learning_rate == 1e-3 and not trainer.args.remove_unused_columns
    assert trainer.train().global_step == 2
    trainer.save_model()
    model = VLMoEForConditionalGeneration.from_pretrained(tmp_path)
    tokenizer = VLMoEProcessor.from_pretrained(tmp_path).tokenizer
    assert model.config.text_config.eos_token_id == tokenizer.eos_token_id
    [stage] = json.loads((tmp_path / "training_stages.json").read_text())
    assert (stage["start"]["name"], stage["data"]["rows"]) == ("tiny", 4)
    assert "vlmoe-tiny" in (tmp_path / "README.md").read_text()


def test_plain_training_arguments_are_copied_and_fit_the_rows(
    tmp_path: Path, saved_model: Path, data_folder: Path
) -> None:
    arguments = TrainingArguments(str(tmp_path), max_steps=1, report_to="none", use_cpu=True)
    rows = load_rows(str(data_folder), "train")
    trainer = VLMoETrainer(saved_model, arguments, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    assert 0 <= trainer.evaluate()["eval_exact_match"] <= 1
    assert arguments.remove_unused_columns, "the caller's arguments were changed"


def test_what_is_given_takes_the_place_of_ours(
    tmp_path: Path, saved_model: Path, data_folder: Path
) -> None:
    class Own(StopOnBadLoss):
        pass

    rows = load_rows(str(data_folder), "train")
    given: list[TrainerCallback] = [Own()]
    trainer = VLMoETrainer(
        saved_model,
        SHORT | {"output_dir": str(tmp_path)},
        train_dataset=rows,
        eval_dataset=rows,
        callbacks=given,
        compute_metrics=lambda prediction: {"shape": prediction.predictions.ndim},
    )
    found = kinds(trainer)
    assert Own in found and StopOnBadLoss not in found
    assert {StopOnNonFiniteRouting, RouterTelemetry} <= set(found)
    assert trainer.evaluate()["eval_shape"] == 3, "logits, no token ids"


def test_arguments_of_a_name_beside_a_model_are_refused(
    saved_model: Path, data_folder: Path
) -> None:
    model = VLMoEForConditionalGeneration.from_pretrained(saved_model)
    rows = load_rows(str(data_folder), "train")
    with pytest.raises(ValueError, match="are for a model that is given by its name"):
        VLMoETrainer(model, SHORT, train_dataset=rows, tiling=True)


def test_several_evaluation_sets_have_names(
    tmp_path: Path, saved_model: Path, data_folder: Path
) -> None:
    rows = load_rows(str(data_folder), "train")
    trainer = VLMoETrainer(
        saved_model,
        SHORT | {"output_dir": str(tmp_path)},
        train_dataset=rows,
        eval_dataset={"seen": rows, "one": [rows[0]]},
    )
    metrics = trainer.evaluate()
    assert {"eval_seen_exact_match", "eval_one_exact_match", "eval_seen_loss"} <= metrics.keys()
    with pytest.raises(ValueError, match="eval_one_loss is nan"):
        trainer.log({"eval_one_loss": float("nan")})


def test_rows_without_a_length_are_refused(saved_model: Path, data_folder: Path) -> None:
    rows = load_rows(str(data_folder), "train")
    with pytest.raises(ValueError, match="train_dataset is a generator, which has no length"):
        VLMoETrainer(saved_model, SHORT, train_dataset=(row for row in rows))  # type: ignore[arg-type]

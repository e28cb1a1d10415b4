"""A model that computes no numbers is not saved."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vlmoe import VLMoEForConditionalGeneration, VLMoEProcessor
from vlmoe.data.loading import load_rows
from vlmoe.training.arguments import training_arguments
from vlmoe.training.run import save_final_model
from vlmoe.training.trainer import VLMoETrainer
from vlmoe_cli import main


@pytest.fixture
def make_trainer(saved_model: Path, data_folder: Path, tmp_path: Path) -> Callable[..., Any]:
    """`make_trainer(model)`: as `vlmoe train` makes it."""

    def make(model: Any) -> Any:
        processor = VLMoEProcessor.from_pretrained(saved_model)
        arguments = training_arguments(
            output_dir=str(tmp_path / "out"), report_to="none", use_cpu=True
        )
        rows = load_rows(str(data_folder), "train")
        return VLMoETrainer(model, arguments, train_dataset=rows, processing_class=processor)

    return make


def test_a_weight_that_the_loss_does_not_see_is_seen(
    saved_model: Path, tmp_path: Path, make_trainer: Callable[..., Any]
) -> None:
    model = VLMoEForConditionalGeneration.from_pretrained(saved_model)
    save_final_model(make_trainer(model), tmp_path / "sound")
    with torch.no_grad():  # of a token that no row has
        model.get_input_embeddings().weight[-1, 3] = float("inf")
    with pytest.raises(ValueError, match=r"the tensor model\.language_model\.embed_tokens\.weight"):
        save_final_model(make_trainer(model), tmp_path / "out")
    assert not list((tmp_path / "out").glob(".incoming*"))
    assert not (tmp_path / "out" / "config.json").exists()


def test_the_loss_after_the_last_step_counts(
    saved_model: Path, data_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The weights are finite, and so are the losses of both steps."""
    output = tmp_path / "out"
    command = ["train", "--model", str(saved_model), "--dataset", str(data_folder)]
    command += ["--max_steps", "2", "--learning_rate", "1e30", "--save_strategy", "no"]
    command += ["--output_dir", str(output), "--report_to", "none", "--use_cpu"]
    assert main.main(command) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "The loss after the last step is nan: the model is not saved" in error
    assert "smaller learning rate" in error
    assert not (output / "config.json").exists()

    small = [each if each != "1e30" else "1e-5" for each in command]
    assert main.main(small) == 0
    assert json.loads((output / "config.json").read_text())["model_type"] == "vlmoe"

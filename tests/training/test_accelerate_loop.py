"""The raw Accelerate loop against Trainer, on rows with unequal numbers of label tokens."""

import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from builders import assistant, row, user
from PIL import Image
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from vlmoe import VLMoEForConditionalGeneration
from vlmoe.data.collator import VLMoECollator
from vlmoe.processing.processing_vlmoe import VLMoEProcessor

SCRIPT = Path(__file__).parents[2] / "examples" / "accelerate_loop.py"
ROWS_PER_STEP, LEARNING_RATE = 4, 0.1
ANSWERS = ["blue", "two", "yes, it is a red circle, and what a shape", "no"]


@pytest.fixture(scope="module")
def rows(make_image: Callable[..., Image.Image]) -> list[dict[str, Any]]:
    """Two optimizer steps: rows with one, two and no images, answers of unlike lengths."""
    rows = []
    for number in range(2 * ROWS_PER_STEP):
        images = [make_image(10 * number + i) for i in range((1, 2, 0)[number % 3])]
        answer = " and ".join(ANSWERS[: number % 4 + 1])
        rows.append(row(user("what is it?", len(images)), assistant(answer), images=images))
    return rows


@pytest.fixture
def make_model(
    tiny_model: Callable[..., VLMoEForConditionalGeneration], processor: VLMoEProcessor
) -> Callable[[], VLMoEForConditionalGeneration]:
    text = {"router_aux_loss_coef": 0.5, "router_z_loss_coef": 0.05}
    return lambda: tiny_model(text=text | {"vocab_size": len(processor.tokenizer)})


@pytest.fixture
def trained_by_trainer(
    make_model: Callable[[], VLMoEForConditionalGeneration],
    processor: VLMoEProcessor,
    rows: list[dict[str, Any]],
    tmp_path: Path,
) -> Callable[[int], dict[str, torch.Tensor]]:
    """`trained_by_trainer(accumulate)`: the parameters after the two steps."""

    def train(accumulate: int) -> dict[str, torch.Tensor]:
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=ROWS_PER_STEP // accumulate,
            gradient_accumulation_steps=accumulate,
            num_train_epochs=1,
            optim="sgd",
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            train_sampling_strategy="sequential",
            remove_unused_columns=False,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
        )
        model, collate = make_model(), VLMoECollator(processor)
        Trainer(model, arguments, data_collator=collate, train_dataset=rows).train()
        return dict(model.named_parameters())

    return train


@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_the_updates_are_those_of_trainer_and_save_state_keeps_them(
    accumulate: int,
    trained_by_trainer: Callable[[int], dict[str, torch.Tensor]],
    make_model: Callable[[], VLMoEForConditionalGeneration],
    processor: VLMoEProcessor,
    rows: list[dict[str, Any]],
    tmp_path: Path,
) -> None:
    expected = trained_by_trainer(accumulate)
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE)
    extra = rows[:1]  # less than a step: dropped
    loader = DataLoader(
        rows + (extra if accumulate > 1 else []),
        ROWS_PER_STEP // accumulate,
        collate_fn=VLMoECollator(processor),
    )
    AcceleratorState._reset_state(reset_partial_state=True)
    runpy.run_path(str(SCRIPT))["train"](
        model, optimizer, loader, accumulate, str(tmp_path / "state")
    )
    saved = load_file(tmp_path / "state" / "model.safetensors")
    initial = dict(make_model().named_parameters())
    for name, values in model.named_parameters():
        assert not values.requires_grad or not torch.equal(values, initial[name]), name
        torch.testing.assert_close(values, expected[name], rtol=1e-5, atol=1e-7, msg=name)
        assert name not in saved or torch.equal(saved[name], values), name

    fresh = make_model()
    optimizer = torch.optim.SGD(fresh.parameters(), 1.0)
    accelerator = Accelerator()
    accelerator.prepare(fresh, optimizer, loader)
    accelerator.load_state(tmp_path / "state")
    assert all(
        torch.equal(p, dict(model.named_parameters())[n]) for n, p in fresh.named_parameters()
    )
    assert optimizer.param_groups[0]["lr"] == LEARNING_RATE


def test_it_runs_as_a_script_of_at_most_forty_lines(
    saved_model: Path, data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(SCRIPT.read_text().splitlines()) <= 40
    arguments = [str(saved_model), str(data_folder / "train.jsonl"), str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    before = VLMoEForConditionalGeneration.from_pretrained(saved_model).state_dict()
    after = load_file(tmp_path / "model.safetensors")
    assert after.keys() <= before.keys()
    assert any(not torch.equal(values, before[name]) for name, values in after.items())

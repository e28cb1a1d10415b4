"""`vlmoe generate`: the answer of `model.generate`, streamed; errors that name the culprit."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from vlmoe import VLMoEForConditionalGeneration, VLMoEProcessor
from vlmoe_cli import main

QUESTION = "what shape is it?"


@pytest.fixture(scope="module")
def pictures(
    tmp_path_factory: pytest.TempPathFactory, make_image: Callable[..., Image.Image]
) -> list[str]:
    folder = tmp_path_factory.mktemp("pictures")
    paths = [folder / f"{number}.png" for number in range(2)]
    for number, path in enumerate(paths):
        make_image(number).save(path)
    return [str(path) for path in paths]


def expected(model_folder: Path, messages: list[dict[str, Any]]) -> str:
    model = VLMoEForConditionalGeneration.from_pretrained(model_folder).eval()
    processor = VLMoEProcessor.from_pretrained(model_folder)
    inputs = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    with torch.inference_mode():
        tokens = model.generate(
            **inputs,
            max_new_tokens=6,
            do_sample=False,
            pad_token_id=processor.tokenizer.pad_token_id,
            eos_token_id=processor.tokenizer.eos_token_id,
        )
    answer = tokens[0, inputs["input_ids"].shape[1] :]
    return processor.tokenizer.decode(answer, skip_special_tokens=True).strip()


@pytest.mark.parametrize("count", [0, 1, 2])
def test_the_answer_is_that_of_generate(
    count: int, saved_model: Path, pictures: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [flag for path in pictures[:count] for flag in ("--image", path)]
    more = ["--max_new_tokens", "6", "--device", "cpu", "--system", "be brief"]
    assert main.main(["generate", "--model", str(saved_model), *flags, *more, QUESTION]) == 0
    parts = [{"type": "image", "path": path} for path in pictures[:count]]
    answer = expected(
        saved_model,
        [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": [*parts, {"type": "text", "text": QUESTION}]},
        ],
    )
    assert capsys.readouterr().out.strip() == answer != ""


def test_sampling_depends_on_the_seed_alone(
    saved_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def answer(seed: int) -> str:
        sampling = ["--temperature", "5", "--top_p", "0.99", "--seed", str(seed)]
        more = ["--model", str(saved_model), "--max_new_tokens", "12", "--device", "cpu"]
        assert main.main(["generate", *sampling, *more, QUESTION]) == 0
        return capsys.readouterr().out

    assert answer(1) == answer(1) != answer(2)


def test_wrong_input_is_named(
    saved_model: Path, pictures: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ["--model", str(saved_model)]
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("no image")
    damaged = tmp_path / "damaged"
    shutil.copytree(saved_model, damaged)
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    cases = [
        ([*model, "--image", "nowhere.png"], "There is no image file nowhere.png"),
        ([*model, "--image", str(tmp_path / "empty.png")], "empty.png"),
        ([*model, "--image", str(tmp_path / "text.png")], "text.png"),
        (
            [*model, "--max_new_tokens", "0"],
            "'--max_new_tokens': must be greater than or equal to 1, got '0'",
        ),
        ([*model, "--temperature", "-1"], "or 0.0001 to 100, got '-1'"),
        ([*model, "--top_p", "0.5"], "--top_p changes nothing here: give --temperature above 0"),
        (["--model", str(tmp_path / "nowhere")], "There is no model folder"),
        (["--model", str(damaged)], "damaged holds no whole model: model.safetensors: damaged"),
        (["--model", "tiny"], "'tiny'"),
        ([*model, "--max_new_tokens", "128"], "leaves no room for a prompt"),
        ([*model, "--system", "what " * 99], "positions hold 64. Shorten it"),
    ]
    for arguments, message in cases:
        assert main.main(["generate", *arguments, QUESTION]) == 2, arguments
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("vlmoe generate: error: ") and message in error

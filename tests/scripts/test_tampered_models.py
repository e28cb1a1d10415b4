"""Every command refuses a model that is not whole, or whose weights are no numbers, in one line."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from peft import get_peft_model
from tampering import BANK, TAMPERED, Tensors, tamper

from vlmoe import VLMoEForConditionalGeneration, expert_lora_config
from vlmoe_cli import main

COMMANDS = {
    "evaluate": "evaluate --model {model} --dataset {data}",
    "generate": "generate --model {model} what?",
    "inspect": "inspect --model {model} --output_dir {output} what?",
    "inspect before": "inspect --model {sound} --before {model} --dataset {data} "
    "--output_dir {output}",
    "train": "train --model {model} --dataset {data} --output_dir {output}",
    "train lora": "train --model {model} --lora --dataset {data} --output_dir {output}",
    "merge": "merge {adapter} --model {model} --output_dir {output}",
    "upcycle": "upcycle {model} --output_dir {output}",
    "push": "push {model} --repo_id user/name",
    "card": "card {model}",
}
CONFIGS = {"empty": "{}", "foreign": '{"model_type": "llava"}', "folder": None}
READ_NUMBERS = sorted(COMMANDS.keys() - {"card"})


@pytest.fixture(scope="module")
def adapter(saved_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    model = VLMoEForConditionalGeneration.from_pretrained(saved_model)
    get_peft_model(model, expert_lora_config(model, r=2)).save_pretrained(folder)
    return folder


@pytest.fixture
def model(saved_model: Path, tmp_path: Path) -> Path:
    """A saved model of one's own to break."""
    return shutil.copytree(saved_model, tmp_path / "model")


@pytest.fixture
def refusal(
    model: Path,
    saved_model: Path,
    adapter: Path,
    data_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> Callable[[str], str]:
    """`refusal(command)`: the one line that it ends with, after it wrote nothing."""

    def run(command: str) -> str:
        before = {path: path.stat().st_mtime_ns for path in model.iterdir()}
        places = {"model": model, "sound": saved_model, "adapter": adapter, "data": data_folder}
        text = COMMANDS[command].format(**places, output=tmp_path / "output")
        assert main.main(text.split()) == 2
        assert not (tmp_path / "output").exists()
        assert {path: path.stat().st_mtime_ns for path in model.iterdir()} == before
        said = capsys.readouterr().err.strip().splitlines()
        assert not any("Traceback" in line or "LOAD REPORT" in line for line in said)
        return said[-1]

    return run


@pytest.mark.parametrize("kind", TAMPERED)
@pytest.mark.parametrize("command", COMMANDS)
def test_weights_of_another_model(
    model: Path, refusal: Callable[[str], str], command: str, kind: str
) -> None:
    change, said = TAMPERED[kind]
    tamper(model, change)
    assert re.search(rf"error: .*{re.escape(str(model))}.*{said}", refusal(command))


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_config_of_no_vlmoe(
    model: Path, refusal: Callable[[str], str], command: str, kind: str
) -> None:
    (model / "config.json").unlink()
    if CONFIGS[kind] is None:
        (model / "config.json").mkdir()
    else:
        (model / "config.json").write_text(CONFIGS[kind])
    other = "its config" if kind == "foreign" and command == "upcycle" else "config.json"
    assert other in refusal(command)


@pytest.mark.parametrize("command", READ_NUMBERS)
def test_weights_that_are_no_numbers(
    model: Path, refusal: Callable[[str], str], command: str
) -> None:
    def break_router(weights: Tensors) -> None:
        weights[BANK][1, 2, 3] = float("nan")

    tamper(model, break_router)
    assert re.search(rf"error: .*: the tensor {BANK} holds NaN", refusal(command))

# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Build the sdist, the wheel from it, and try the wheel out alone in fresh environments.

    python .ci/try_wheel.py

The environments hold the core dependencies only, one with the tested transformers, one with the
oldest that pyproject.toml allows. A model that this environment saves is loaded and asked there,
through the package and through a pipeline. Needs the package index.
"""

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "wheel"
CONSTRAINTS = ROOT / "constraints.txt"
NOT_SHIPPED = ("vlmoe/model_cards/README.md", "vlmoe/model_cards/vlmoe-tiny-easy-vqa/")
SAVE = """
import sys

from vlmoe import VLMoEConfig, VLMoEForConditionalGeneration, VLMoEProcessor
from vlmoe.data.tokenizer import train_tokenizer

tokenizer = train_tokenizer(["what color is the shape? red", "is it blue? no"], vocab_size=300)
text = {"vocab_size": len(tokenizer), "hidden_size": 32, "num_hidden_layers": 2}
vision = {"model_type": "siglip_vision_model", "image_size": 64, "hidden_size": 24}
config = VLMoEConfig(
    text_config=text | {"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 4},
    vision_config=vision | {"num_hidden_layers": 2, "num_attention_heads": 4},
    image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
)
VLMoEForConditionalGeneration(config).save_pretrained(sys.argv[1])
VLMoEProcessor.for_config(config, tokenizer).save_pretrained(sys.argv[1])
"""
ASK = """
import sys
from pathlib import Path

import transformers
from PIL import Image

import vlmoe
from vlmoe import *

assert Path(vlmoe.__file__).is_relative_to(sys.prefix), vlmoe.__file__
model = transformers.AutoModelForImageTextToText.from_pretrained(sys.argv[1])
processor = transformers.AutoProcessor.from_pretrained(sys.argv[1])
ask = transformers.pipeline("image-text-to-text", model=model, processor=processor)
content = [{"type": "image", "image": Image.new("RGB", (64, 64), "red")}]
content.append({"type": "text", "text": "what color is the shape?"})
(answer,) = ask(text=[{"role": "user", "content": content}], max_new_tokens=4)
versions = f"vlmoe {vlmoe.__version__} on transformers {transformers.__version__}"
print(versions, "answers", repr(answer["generated_text"][-1]["content"]))
"""


def main() -> None:
    """Build and try out; raise where something is missing or fails."""
    shutil.rmtree(BUILD, ignore_errors=True)
    for old in ROOT.glob("*.egg-info"):  # its list of files would hide that one is missing
        shutil.rmtree(old)
    run(sys.executable, "-m", "build", "--quiet", "--outdir", str(BUILD), str(ROOT))
    (wheel,) = BUILD.glob("*.whl")
    missing = data_files() - set(zipfile.ZipFile(wheel).namelist())
    if missing:
        raise SystemExit(f"{wheel.name} lacks {sorted(missing)}; see package-data in pyproject.")
    saved = BUILD / "saved"
    run(sys.executable, "-c", SAVE, str(saved))
    for name, constraints in (("tested", CONSTRAINTS), ("oldest", oldest_transformers())):
        run(sys.executable, "-m", "venv", str(BUILD / name))
        python = str(BUILD / name / ("Scripts" if os.name == "nt" else "bin") / "python")
        # torch alone first: the index of the constraint decides that it is the build for CPUs.
        run(python, "-m", "pip", "install", "--quiet", "-c", str(constraints), "torch")
        run(python, "-m", "pip", "install", "--quiet", "-c", str(constraints), str(wheel))
        run(python, "-c", ASK, str(saved))
        run(python, "-m", "vlmoe_cli.main", "--help")


def oldest_transformers() -> Path:
    """Write constraints with the oldest transformers that the package allows."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (floor,) = (each for each in project["dependencies"] if each.startswith("transformers>="))
    lines = CONSTRAINTS.read_text().splitlines()
    kept = [line for line in lines if not line.startswith(("transformers==", "tokenizers=="))]
    file = BUILD / "oldest.txt"
    file.write_text("\n".join([*kept, floor.replace(">=", "==")]) + "\n")
    return file


def run(*command: str) -> None:
    """Run a command outside of the checkout, whose folders would hide the installed package."""
    subprocess.run(command, check=True, cwd=BUILD.parent, stdin=subprocess.DEVNULL)


def data_files() -> set[str]:
    """List the wheel's paths of all files under version control in packages, code or not."""
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    tracked = subprocess.run(
        ["git", "ls-files"], check=True, cwd=ROOT, capture_output=True, text=True
    ).stdout.splitlines()
    files = {
        f"{package.replace('.', '/')}/{Path(file).relative_to(folder).as_posix()}"
        for package, folder in setuptools["package-dir"].items()
        for file in tracked
        if Path(file).is_relative_to(folder)
    }
    return {file for file in files if not file.startswith(NOT_SHIPPED)}


if __name__ == "__main__":
    main()

"""Every snippet of README and docs runs, on a CPU and offline, or is listed with a reason."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from builders import picture
from doc_pages import PAGES, ROOT, blocks, commands, run_page
from native_dense import dense_model, vision_config
from native_processors import TinyQwen3VLProcessor, tiny_processor
from sparse_families import sparse_family
from tiny_sizes import TEXT, VISION, VOCABULARY
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoProcessor,
    LlamaConfig,
    PreTrainedTokenizerBase,
    Qwen3VLConfig,
    Qwen3VLMoeConfig,
    SiglipVisionConfig,
)
from video_files import gray_levels, video

import vlmoe
from vlmoe import VLMoEForConditionalGeneration
from vlmoe_cli import main

INSTALLS = "installs packages"
EXCEPTIONS = {
    "pip install -c constraints.txt torch": INSTALLS,
    "pip install -c constraints.txt -e '.[train]'": INSTALLS,
    "pip install 'vlmoe[train] @ git+URL'": INSTALLS,
    "pip install 'vlmoe[train]'": INSTALLS,
    "make demo": "takes ten minutes; test_demo.py runs the command on a few images",
    "vlmoe demo --output_dir outputs/demo": "the same",
    "vlmoe demo --max_train_rows 8 --max_test_rows 2 --output_dir outputs/try": "test_demo.py",
    "make test": "runs this test",
    "make test-all": "the same",
    "make conformance": "downloads transformers' sources",
    "make docs": "installs packages; `.ci/run` builds the docs",
    "make lint": "installs packages; `.ci/run` lints",
    "accelerate launch examples/accelerate_loop.py outputs/tiny my_data outputs/accelerate": (
        "starts a process; test_accelerate_loop.py runs the script"
    ),
}
SLOW = {"docs/start/first_model.md", "docs/how-to/train.md"}
ON_A_HUB = {"docs/how-to/share.md", "docs/how-to/make_sparse.md"}
RUNNABLE = [
    pytest.param(page, marks=pytest.mark.slow if page in SLOW else [])
    for page in PAGES
    if blocks(page) and page not in ON_A_HUB
]


@pytest.fixture(scope="session")
def world(
    saved_model: Path,
    data_folder: Path,
    tiny_model: Callable[..., VLMoEForConditionalGeneration],
    tokenizer: PreTrainedTokenizerBase,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A folder with all that the pages name."""
    folder = tmp_path_factory.mktemp("world")
    for name in ("outputs/tiny", "outputs/demo/model"):
        shutil.copytree(saved_model, folder / name)
    dense = tiny_model(text={"mlp_only_layers": [0, 1, 2], "vocab_size": VOCABULARY})
    dense.save_pretrained(folder / "user" / "dense-vlm")
    for file in saved_model.iterdir():
        if not (folder / "user" / "dense-vlm" / file.name).exists():
            shutil.copy(file, folder / "user" / "dense-vlm")
    language = LlamaConfig(**TEXT | {"vocab_size": VOCABULARY})
    AutoModelForCausalLM.from_config(language).save_pretrained(folder / "user/language-model")
    tokenizer.save_pretrained(folder / "user/language-model")
    vision = SiglipVisionConfig(**VISION, vision_use_head=False)
    AutoModel.from_config(vision).save_pretrained(folder / "user/vision-encoder")
    sparse_family("deepseek_v3").save_pretrained(folder / "user/sparse-model")
    sparse_family("llava_qwen3_moe").save_pretrained(folder / "user/sparse-vlm")
    tiny_processor("llava_qwen3_moe").save_pretrained(folder / "user/sparse-vlm")
    dense_model(vision_config("qwen3_vl")).save_pretrained(folder / "outputs/dense")
    tiny_processor("qwen3_vl", marked=True).save_pretrained(folder / "outputs/dense")
    shutil.copytree(data_folder, folder / "my_data")
    (folder / "my_pairs").mkdir()
    for number, caption in enumerate(("a red circle", "a blue square")):
        picture(number).save(folder / "my_pairs" / f"{number}.png")
        with (folder / "my_pairs" / "test.jsonl").open("a") as rows:
            rows.write(json.dumps({"image": f"{number}.png", "text": caption}) + "\n")
    picture(3, (32, 32)).save(folder / "picture.png")
    picture(3, (32, 32)).save(folder / "my_data" / "picture.png")
    for number, place in enumerate(("train/cat", "train/dog", "test/cat", "test/dog")):
        (folder / "pets" / place).mkdir(parents=True)
        picture(number, (32, 32)).save(folder / "pets" / place / "0.png")
    for path in (folder / "clip.mp4", folder / "my_data" / "clip.mp4"):
        path.write_bytes(video(gray_levels(16)))
    return folder


@pytest.fixture
def in_world(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that folder as the current one."""
    shutil.copytree(world, tmp_path / "world")
    monkeypatch.chdir(tmp_path / "world")
    monkeypatch.setenv("CI", "1")  # TRL reports each run to the Hub, except on CI
    return tmp_path / "world"


@pytest.mark.parametrize("page", RUNNABLE)
def test_the_snippets_of_a_page_run(page: str, in_world: Path) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    run_page(page, EXCEPTIONS, {})
    AcceleratorState._reset_state(reset_partial_state=True)


def run_in(folder: str, page: str) -> None:
    """Run a page in a process whose Hub is the test's, under the name of its user."""
    os.chdir(folder)
    for config in (Qwen3VLConfig, Qwen3VLMoeConfig):  # its own needs torchvision
        AutoProcessor.register(config, TinyQwen3VLProcessor, exist_ok=True)
    run_page(page, EXCEPTIONS, {"user/": "tester/"})


@pytest.mark.parametrize("page", sorted(ON_A_HUB))
def test_the_snippets_of_a_page_run_on_a_hub(
    page: str, in_world: Path, hub: object, hub_process: Callable[..., None]
) -> None:
    hub_process(run_in, str(in_world), page)


def test_every_exception_is_a_command_of_some_page() -> None:
    there = {
        command
        for page in PAGES
        for block in blocks(page)
        if block.language == "bash"
        for command in commands(block)
    }
    assert EXCEPTIONS.keys() <= there


def test_readme_states_the_lowest_accuracy_of_the_demo() -> None:
    seeds = json.loads((ROOT / "benchmarks/results/demo_seeds.json").read_text())["seeds"]
    lowest = min(seed["accuracy"] for seed in seeds.values())
    assert (
        f"The lowest accuracy of three seeds is {lowest:.2%}." in (ROOT / "README.md").read_text()
    )


def test_the_reference_has_every_public_name_and_command() -> None:
    pages = "".join(path.read_text() for path in (ROOT / "docs" / "reference").glob("*.md"))
    names = {name for name in dir(vlmoe) if not name.startswith("_")}
    assert set(re.findall(r"^::: vlmoe\.(\w+)$", pages, re.MULTILINE)) == names
    assert set(re.findall(r"^\{\{ help (\S+) \}\}$", pages, re.MULTILINE)) == set(main.MODULES)

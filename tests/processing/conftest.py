"""Fixtures of the processor's tests."""

import copy
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase


@pytest.fixture(scope="session")
def tile(processor) -> int:
    """The side of a tile in pixels."""
    return processor.image_processor.max_image_size["longest_edge"]


@pytest.fixture(scope="session")
def seq(processor) -> str:
    """The image tokens of one tile."""
    return "<image>" * processor.image_seq_len


@pytest.fixture(scope="session")
def with_tokens(
    tokenizer: PreTrainedTokenizerBase,
) -> Callable[[Iterable[str]], PreTrainedTokenizerBase]:
    """`with_tokens(tokens)`: the tokenizer with further special tokens."""

    def make(tokens: Iterable[str] = ()) -> PreTrainedTokenizerBase:
        copied = copy.deepcopy(tokenizer)
        copied.add_tokens(list(tokens), special_tokens=True)
        return copied

    return make


@pytest.fixture
def hub_folder(tmp_path: Path) -> Callable[..., Path]:
    """`hub_folder(tokenizer, tokenizer_fields={...}, **{file name: content})`: as on the Hub.

    Contents are dicts, for JSON, or strings. A field that is None is taken out of the tokenizer's.
    """

    def make(
        tokenizer: PreTrainedTokenizerBase,
        tokenizer_fields: dict[str, Any] | None = None,
        **files: dict[str, Any] | str,
    ) -> Path:
        tokenizer.save_pretrained(tmp_path)
        path = tmp_path / "tokenizer_config.json"
        fields = json.loads(path.read_text()) | (tokenizer_fields or {})
        path.write_text(json.dumps({k: v for k, v in fields.items() if v is not None}))
        for name, content in files.items():
            text = content if isinstance(content, str) else json.dumps(content)
            (tmp_path / name).write_text(text)
        return tmp_path

    return make

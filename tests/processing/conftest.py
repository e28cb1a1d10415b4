"""Fixtures of the processor's tests."""

import copy
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from dense_sources import GOT_OCR2, IDEFICS3_TOKENS, INTERNVL_TOKENS, SMOLVLM, TEMPLATE
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
        # a tokenizer that was part of a processor once names its class
        fields = json.loads(path.read_text()) | {"processor_class": None} | (tokenizer_fields or {})
        path.write_text(json.dumps({k: v for k, v in fields.items() if v is not None}))
        for name, content in files.items():
            text = content if isinstance(content, str) else json.dumps(content)
            (tmp_path / name).write_text(text)
        return tmp_path

    return make


@pytest.fixture
def llava_config(tiny_config):
    """The configuration of a converted Llava model with a CLIP or a SigLIP tower."""

    def make(kind: str) -> Any:
        if kind == "siglip":
            return tiny_config(pixel_shuffle_factor=1)
        return tiny_config(
            vision={"model_type": "clip_vision_model"},
            vision_feature_select_strategy="default",
            pixel_shuffle_factor=1,
        )

    return make


@pytest.fixture
def idefics3_config(tiny_config):
    return tiny_config(vision={"model_type": "idefics3_vision"}, text={"vocab_size": 400})


@pytest.fixture
def internvl_source(hub_folder, with_tokens, tiny_config):
    """`internvl_source(**image processor fields)`: a folder as on the Hub, and its config."""

    def make(**fields: Any) -> tuple[Path, Any]:
        tokenizer = with_tokens(INTERNVL_TOKENS.values())
        extra = {"extra_special_tokens": INTERNVL_TOKENS, "padding_side": None}
        files = {
            "preprocessor_config.json": GOT_OCR2 | fields,
            "processor_config.json": {
                "image_seq_length": 4,
                "processor_class": "InternVLProcessor",
            },
            "chat_template.jinja": TEMPLATE,
        }
        config = tiny_config(
            vision={"model_type": "internvl_vision", "image_size": [16, 16], "patch_size": [4, 4]},
            text={"vocab_size": 400},
            vision_feature_select_strategy="default",
            image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        )
        return hub_folder(tokenizer, extra, **files), config

    return make


@pytest.fixture
def smolvlm_source(hub_folder, with_tokens, tiny_config):
    """`smolvlm_source(**image processor fields)`: a folder as on the Hub, and its config."""

    def make(**fields: Any) -> tuple[Path, Any]:
        files = {
            "preprocessor_config.json": SMOLVLM | fields,
            "processor_config.json": {"image_seq_len": 4, "processor_class": "SmolVLMProcessor"},
            "chat_template.json": {"chat_template": TEMPLATE},
        }
        config = tiny_config(vision={"model_type": "smolvlm_vision"}, text={"vocab_size": 400})
        return hub_folder(
            with_tokens(IDEFICS3_TOKENS), {"truncation_side": "left"}, **files
        ), config

    return make

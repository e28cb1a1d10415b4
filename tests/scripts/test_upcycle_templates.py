"""`vlmoe upcycle`: which chat template the sparse model's processor has."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, SiglipVisionModel

from vlmoe import VLMoEConfig, VLMoEProcessor
from vlmoe_cli import main

TEMPLATE = "{% for message in messages %}[{{ message.role }}]{{ message.content }}{% endfor %}"
CHAT = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "red?"}]}]


@pytest.fixture
def parts(
    tmp_path: Path,
    tiny_config: Callable[..., VLMoEConfig],
    tokenizer: PreTrainedTokenizerBase,
) -> list[str]:
    """`vlmoe upcycle` of a language model, with a text-only template, and a vision encoder."""
    config = tiny_config()
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    sizes = {name: getattr(config.text_config, name) for name in names}
    text = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=len(tokenizer), head_dim=8))
    text.save_pretrained(tmp_path / "text")
    own = copy.deepcopy(tokenizer)
    own.chat_template = TEMPLATE
    own.save_pretrained(tmp_path / "text")
    SiglipVisionModel(config.vision_config).save_pretrained(tmp_path / "vision")
    command = ["upcycle", str(tmp_path / "text"), "--vision", str(tmp_path / "vision")]
    return [*command, "--num_experts", "4", "--output_dir", str(tmp_path / "sparse")]


def rendered(tmp_path: Path) -> str:
    return VLMoEProcessor.from_pretrained(tmp_path / "sparse").apply_chat_template(CHAT)


def test_a_language_models_own_template_takes_images(parts: list[str], tmp_path: Path) -> None:
    assert main.main(parts) == 0
    assert rendered(tmp_path) == "[user]<image>red?"


def test_a_template_from_a_file_takes_images_too(parts: list[str], tmp_path: Path) -> None:
    file = tmp_path / "template.jinja"
    file.write_text(TEMPLATE.replace("[", "<<"))
    assert main.main([*parts, "--chat_template", str(file)]) == 0
    assert rendered(tmp_path) == "<<user]<image>red?"


@pytest.mark.parametrize(("content", "message"), [(None, "cannot be read"), (" \n", "is empty")])
def test_a_file_without_a_template_is_refused(
    parts: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    content: str | None,
    message: str,
) -> None:
    file = tmp_path / "template.jinja"
    if content is not None:
        file.write_text(content)
    assert main.main([*parts, "--chat_template", str(file)]) != 0
    assert f"--chat_template {file} {message}" in capsys.readouterr().err
    assert not (tmp_path / "sparse").exists()

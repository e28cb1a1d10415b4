# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""The files beside a dense model's weights that its native sparse version takes as they are."""

from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import snapshot_download
from transformers import PreTrainedConfig

TOKENIZER = ("tokenizer.json", "vocab*", "merges.txt", "*.model", "*.tiktoken", "tekken.json")
"""Of these a tokenizer has one at least."""
PROCESSOR = "*processor_config.json"
COMPANIONS = (
    *TOKENIZER,
    "*token*.json",
    "special_tokens_map.json",
    PROCESSOR,
    "chat_template*",
    "additional_chat_templates/*",
    "generation_config.json",
    "LICENSE*",
)
"""Tokenizer, processor, chat templates, generation config and license."""
TEMPLATE = "chat_template.jinja"


def companion_files(source: str, chat_template: str | None = None) -> dict[str, str | Path]:
    """Return the contents of these files by name: another file, or a text.

    Args:
        source: the dense model's folder or Hub id.
        chat_template: the text of a template that replaces the source's.
    """
    folder = Path(source).expanduser()
    if not folder.is_dir():
        folder = Path(snapshot_download(source, allow_patterns=list(COMPANIONS)))
    found = [*folder.glob("*"), *folder.glob("additional_chat_templates/*")]
    names = sorted(str(path.relative_to(folder)) for path in found if path.is_file())
    files: dict[str, str | Path] = {
        name: folder / name for name in names if any(fnmatch(name, each) for each in COMPANIONS)
    }
    if chat_template is not None:
        files = {n: content for n, content in files.items() if not n.startswith("chat_template")}
        files[TEMPLATE] = chat_template
    return files


def absent_parts(folder: Path, config: PreTrainedConfig) -> list[str]:
    """Return what a model needs besides its weights and has no file of: tokenizer, processor."""
    names = [path.name for path in folder.iterdir()]

    def has_any(patterns: Iterable[str]) -> bool:
        return any(fnmatch(name, pattern) for name in names for pattern in patterns)

    needed: dict[str, tuple[str, ...]] = {"tokenizer": TOKENIZER}
    if hasattr(config, "vision_config"):
        needed["processor"] = (PROCESSOR,)
    return [part for part, patterns in needed.items() if not has_any(patterns)]

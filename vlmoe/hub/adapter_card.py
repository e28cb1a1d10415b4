# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""What an adapter's files tell others of its base model: a Hub id, never a path of this machine.

PEFT writes the base model's path into the card's metadata, where the Hub refuses it, and into
adapter_config.json, where it finds the model again. So the card is rewritten where it is saved, and
the config only in what is pushed.
"""

import json
import logging
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from .atomic_files import atomic_path
from .json_files import read_json
from .provenance import hub_models

logger = logging.getLogger(__name__)

CARD_FILE, CONFIG_FILE = "README.md", "adapter_config.json"
BASE = "base_model_name_or_path"


def pushed_instead(folder: Path) -> dict[str, bytes]:
    """By name, the content of an adapter's files that others get in place of those in `folder`.

    Without an adapter, and where its base model is one of the Hub, there are none.
    """
    if not (folder / CONFIG_FILE).is_file():
        return {}
    config = read_json(folder / CONFIG_FILE)
    base = config.get(BASE)
    if not base or hub_models(base):
        return {}
    logger.warning(
        "The base model of this adapter, %s, is a folder of this machine, which others are not "
        "told. Push it too, and write its repo into %s as %s.",
        base,
        folder / CONFIG_FILE,
        BASE,
    )
    files = {CONFIG_FILE: f"{json.dumps(config | {BASE: None}, indent=2, sort_keys=True)}\n"}
    if (folder / CARD_FILE).is_file():
        files[CARD_FILE] = _card_without_path(folder / CARD_FILE, base)
    return {name: text.encode() for name, text in files.items()}


def tidy_adapter_card(folder: Path, pipeline_tag: str) -> None:
    """Take the base model's path out of the card that PEFT wrote, and say what the model does."""
    config, card = folder / CONFIG_FILE, folder / CARD_FILE
    if not config.is_file() or not card.is_file():
        return
    text = _card_without_path(card, read_json(config).get(BASE) or "", pipeline_tag)
    with atomic_path(card) as temporary:
        temporary.write_text(text, encoding="utf-8")


def hide_base_model(folder: Path) -> None:
    """Take the base model's path out of the adapter's config, too."""
    for name, content in pushed_instead(folder).items():
        with atomic_path(folder / name) as temporary:
            temporary.write_bytes(content)


def _card_without_path(file: Path, base: str, pipeline_tag: str | None = None) -> str:
    card = ModelCard(file.read_text(encoding="utf-8"), ignore_metadata_errors=True)
    data: Any = card.data
    data.pipeline_tag = pipeline_tag or data.pipeline_tag
    data.base_model = hub_models(data.base_model)
    marks = [tag for tag in data.tags or () if tag.startswith("base_model:")]
    local = [tag for tag in marks if not hub_models(tag.rpartition(":")[2])]
    data.tags = [tag for tag in data.tags or () if tag not in local] or None
    if base and not hub_models(base):
        card.text = card.text.replace(base, Path(base).name)
    return str(card)

# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Keep paths of this machine out of an adapter's files: its base model is a Hub id or unnamed.

PEFT writes the base model's path into the card's metadata, where the Hub refuses it, and into
adapter_config.json, where it finds the model again. So the card is rewritten where it is saved, and
the config only in the pushed copy.
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
    """Return, by name, the contents to push in place of an adapter's own files.

    There are none without an adapter, or for a base model of the Hub.
    """
    if not (folder / CONFIG_FILE).is_file():
        return {}
    config = read_json(folder / CONFIG_FILE)
    base = config.get(BASE)
    if not base or hub_models(base):
        return {}
    logger.warning(
        "The base model of this adapter, %s, is a folder of this machine, so the pushed config "
        "names none. Push it too, and write its repo into %s as %s.",
        base,
        folder / CONFIG_FILE,
        BASE,
    )
    files = {CONFIG_FILE: f"{json.dumps(config | {BASE: None}, indent=2, sort_keys=True)}\n"}
    if (folder / CARD_FILE).is_file():
        files[CARD_FILE] = _card_without_path(folder / CARD_FILE, base)
    return {name: text.encode() for name, text in files.items()}


def tidy_adapter_card(folder: Path, pipeline_tag: str) -> None:
    """Remove the base model's path from the card that PEFT wrote, and set its pipeline tag."""
    config, card = folder / CONFIG_FILE, folder / CARD_FILE
    if not config.is_file() or not card.is_file():
        return
    text = _card_without_path(card, read_json(config).get(BASE) or "", pipeline_tag)
    with atomic_path(card) as temporary:
        temporary.write_text(text, encoding="utf-8")


def hide_base_model(folder: Path) -> None:
    """Remove the base model's path from the adapter's config, too."""
    for name, content in pushed_instead(folder).items():
        with atomic_path(folder / name) as temporary:
            temporary.write_bytes(content)


def _card_without_path(file: Path, base: str, pipeline_tag: str | None = None) -> str:
    card = ModelCard(file.read_text(encoding="utf-8"), ignore_metadata_errors=True)
    data: Any = card.data  # CardData takes any attribute
    data.pipeline_tag = pipeline_tag or data.pipeline_tag
    data.base_model = hub_models(data.base_model)
    marks = [tag for tag in data.tags or () if tag.startswith("base_model:")]
    local = [tag for tag in marks if not hub_models(tag.rpartition(":")[2])]
    data.tags = [tag for tag in data.tags or () if tag not in local] or None
    if base and not hub_models(base):
        card.text = card.text.replace(base, Path(base).name)
    return str(card)

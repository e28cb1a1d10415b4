"""Folders whose model card is rendered."""

import shutil
from pathlib import Path

import pytest
from cards import COMMITTED

from vlmoe.hub.model_card import CARD_SOURCES


@pytest.fixture
def measured(tmp_path: Path) -> Path:
    """What the committed demo card is rendered from, in a folder of its name."""
    [demo] = [folder for folder in COMMITTED if (folder / "metrics.json").is_file()]
    folder = tmp_path / demo.name
    folder.mkdir()
    for name in CARD_SOURCES:
        if (demo / name).is_file():
            shutil.copyfile(demo / name, folder / name)
    return folder

# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Processors of transformers without their video part, which needs torchvision.

Where torchvision is not installed, `AutoProcessor` refuses a processor that has a video part, such
as Qwen3-VL's, also for images. Here the other parts are loaded.
"""

import logging
import os
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoProcessor, PreTrainedTokenizerBase, ProcessorMixin
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.utils import is_torchvision_available

from .json_files import read_json

logger = logging.getLogger(__name__)

VIDEO = "video_processor"
VIDEO_FILE = "video_preprocessor_config.json"
"""Of folders that were saved before transformers 5."""


class WithoutVideo(ProcessorMixin):
    """Behind a processor's own class: leaves its video part out, and saves the settings of it."""

    video_fields: dict[str, Any] | None = None

    def __init__(self, *parts: Any, **named: Any) -> None:
        given = {name: part for name, part in named.items() if name != VIDEO or part is not None}
        super().__init__(*(part for part in parts if part is not None), **given)

    @classmethod
    def get_attributes(cls) -> list[str]:
        """Leave the video part out."""
        return [name for name in super().get_attributes() if name != VIDEO]

    def to_dict(self) -> dict[str, Any]:
        """Keep the settings of the video part, so that a saved copy has them."""
        fields = super().to_dict()
        return fields if self.video_fields is None else fields | {VIDEO: self.video_fields}


def load_processor(source: str | os.PathLike[str]) -> ProcessorMixin | PreTrainedTokenizerBase:
    """Load by `AutoProcessor` from a folder or a Hub id, without a video part if that is missing.

    Raises:
        ImportError: another package than torchvision is missing.
    """
    try:
        return AutoProcessor.from_pretrained(source)
    except ImportError:
        if is_torchvision_available():
            raise
        own = PROCESSOR_MAPPING.get(type(AutoConfig.from_pretrained(source)), None)
        if own is None or VIDEO not in own.get_attributes():
            raise
    logger.warning(
        "The video part of %s needs torchvision, which is not installed: it takes images and texts "
        "alone.",
        own.__name__,
    )
    # the class keeps its name, which is saved
    made: type[WithoutVideo] = type(own.__name__, (own, WithoutVideo), {})
    processor = made.from_pretrained(source)
    fields, _ = ProcessorMixin.get_processor_dict(source)
    alone = Path(source) / VIDEO_FILE
    processor.video_fields = fields.get(VIDEO) or (read_json(alone) if alone.is_file() else None)
    return processor

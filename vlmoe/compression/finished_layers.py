# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""The folder of a compression: layers that are finished, and in the end the whole model.

A killed compression leaves a hidden folder beside its target, with one report for each finished
layer, and its repaired down projections. It continues there if it is asked for the same again; what
it has finished is applied, not computed. The target appears when everything is written.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel
from transformers.utils import logging

from ..hub.atomic_files import atomic_path, open_to_readers, write_json
from ..hub.experts_implementation import keep_suited
from ..hub.folder_lock import new_folder
from ..hub.input_errors import writing
from ..hub.json_files import read_json
from ..hub.model_card import write_model_card
from ..hub.provenance import REPORT_NAME, STAGES_FILE
from ..hub.saved_model import Processor, Source
from ..routing.routed_layers import RoutedLayer
from .banks import down_of, keep_experts, keep_units
from .report import CompressionReport, LayerReport

if TYPE_CHECKING:
    from .compress_experts import Compression

logger = logging.get_logger(__name__)

ORIGINS = (STAGES_FILE, REPORT_NAME)
"""Files of the source that say where its weights come from."""


@dataclass(frozen=True)
class FinishedLayers:
    """What a compression has written so far.

    Attributes:
        target: the folder that the model will be in.
        staging: the hidden folder beside it.
    """

    target: Path
    staging: Path

    def load(self, number: int, layer: RoutedLayer) -> LayerReport | None:
        """Apply a finished layer and return its report; None if it is not finished."""
        file = self._report(number)
        if not file.is_file():
            return None
        report: LayerReport = json.loads(file.read_text(encoding="utf-8"))
        weights = file.with_suffix(".safetensors")
        if weights.is_file():
            kept = torch.tensor(report["kept"])
            keep_units(layer.experts, kept, load_file(weights)["down_proj"])
        else:
            keep_experts(layer, report["kept"])
        return report

    def save_layer(self, number: int, layer: RoutedLayer, report: LayerReport) -> None:
        """Keep a finished layer; its report comes last."""
        file = self._report(number)
        if report["kept"] and isinstance(report["kept"][0], list):
            with atomic_path(file.with_suffix(".safetensors")) as temporary:
                save_file({"down_proj": down_of(layer.experts).detach().cpu()}, temporary)
        write_json(file, report)

    def save(
        self,
        model: PreTrainedModel,
        processor: Processor,
        report: CompressionReport,
        source: str,
    ) -> None:
        """Write model, processor, report and card, and publish the folder."""
        whole = self.staging / "model"
        shutil.rmtree(whole, ignore_errors=True)
        with writing(self.target):
            model.save_pretrained(whole)
            open_to_readers(whole)
            processor.save_pretrained(whole)
            for name in ORIGINS:
                if (origin := Path(source).expanduser() / name).is_file():
                    shutil.copyfile(origin, whole / name)
            report.save(whole)
            keep_suited(whole, model)
            write_model_card(whole, metadata={"model_name": self.target.name})
            if self.target.is_dir():
                self.target.rmdir()
            os.replace(whole, self.target)
            shutil.rmtree(self.staging)

    def _report(self, number: int) -> Path:
        return self.staging / f"layer-{number}.json"


@contextmanager
def compressed_folder(
    output_dir: Source | None, source: str, options: "Compression"
) -> Iterator[FinishedLayers | None]:
    """Yield the folder to write into, locked; None without one.

    Raises:
        ValueError: the folder is not empty, or another process writes there.
        OSError: it cannot be written into.
    """
    if output_dir is None:
        yield None
        return
    with new_folder(output_dir) as target:
        staging = target.with_name(f".{target.name}.compressing")
        request = {"source": source, **asdict(options)}
        asked = staging / "request.json"
        if staging.is_dir() and (not asked.is_file() or read_json(asked) != request):
            logger.warning(f"{staging} holds another compression, which is discarded.")
            shutil.rmtree(staging)
        elif staging.is_dir():
            logger.warning(f"Continuing the compression in {staging}.")
        write_json(asked, request)
        yield FinishedLayers(target, staging)

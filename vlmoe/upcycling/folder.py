# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Write a conversion into a folder, shard by shard.

The two models are never in memory together. The dense one answers the sample. Its tensors are
written, shard by shard, into a hidden folder beside the target. The sparse one is loaded from
there, checked, and moved to the target by one rename. A run that was killed continues with the
missing shards, and its files are the same to the byte.
"""

import errno
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers.utils import cached_file, logging

from ..hub.atomic_files import atomic_path, write_json
from ..hub.folder_lock import folder_lock, refuse_dangling
from ..hub.model_card import write_model_card
from ..modeling_vlmoe.modeling_vlmoe import VLMoEForConditionalGeneration
from .conversion import Conversion
from .origins import Origin
from .report import UpcyclingReport

logger = logging.get_logger(__name__)

Tensor = torch.Tensor


def upcycle_folder(
    begin: Callable[[], Conversion],
    target: str | os.PathLike[str],
    request: Mapping[str, Any],
    *,
    bases: Sequence[dict[str, Any]] = (),
    max_shard_size: str = "5GB",
) -> UpcyclingReport:
    """Convert dense models into a folder with weights, configuration, code, processor and report.

    Args:
        begin: starts the conversion.
        target: the folder to make; it must be empty or absent.
        request: the options of the conversion, as JSON can hold them; one that was killed continues
            if they are the same.
        bases: facts from the dense models' cards, for the new card; see `saved_model`.
        max_shard_size: of a weights file.

    Raises:
        ValueError: the model does not fit exactly, an option is not allowed, or another process
            makes that folder.
        OSError: a file is missing or damaged, or the disk is full; finished shards are kept.
        UpcyclingError: the logits differ by more than 1e-5 of their largest, in fp32.
    """
    target = Path(target).expanduser()
    refuse_dangling(target)
    target = target.resolve()
    with folder_lock(target, beside=True):
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise ValueError(f"{target} is not an empty folder; choose another one or remove it.")
        conversion = begin()
        staging = _staging(target, dict(request) | {"max_shard_size": max_shard_size})
        plan = _write_weights(conversion, staging, max_shard_size)
        conversion.config.architectures = [VLMoEForConditionalGeneration.__name__]
        conversion.config.save_pretrained(staging)
        for part in (conversion.generation_config, conversion.processor):
            if part is not None:
                part.save_pretrained(staging)
        conversion.weights = {}  # release the dense model before the sparse one is loaded
        model = VLMoEForConditionalGeneration.from_pretrained(staging, dtype="auto")
        report = replace(conversion.check(model, plan), bases=list(bases))
        report.save(staging)
        write_model_card(staging, metadata={"model_name": target.name})
        os.replace(staging, target)
        _request_file(target).unlink()
    return report


def source_fingerprint(source: str) -> dict[str, str | list[int] | None]:
    """Return size and time of each file of a folder, or the commit of a Hub id."""
    folder = Path(source).expanduser()
    if not folder.is_dir():
        return {"config.json": cached_file(source, "config.json")}  # with the commit in its path
    files = sorted(path for path in folder.iterdir() if path.is_file())
    return {f.name: [f.stat().st_size, f.stat().st_mtime_ns] for f in files}


def _staging(target: Path, request: dict[str, Any]) -> Path:
    """Return the hidden folder beside the target; one of another request is emptied."""
    staging, asked = target.with_name(f".{target.name}.upcycling"), _request_file(target)
    given = json.loads(json.dumps(request))  # as it is read back
    if staging.is_dir():
        if asked.is_file() and json.loads(asked.read_text(encoding="utf-8")) == given:
            logger.warning(f"Continuing the conversion in {staging}.")
            for half_written in staging.glob(".*.tmp*"):
                half_written.unlink()
            return staging
        logger.warning(f"{staging} holds another conversion, which is discarded.")
        shutil.rmtree(staging)
    write_json(asked, given)
    staging.mkdir()
    return staging


def _request_file(target: Path) -> Path:
    return target.with_name(f".{target.name}.upcycling.json")


def _write_weights(conversion: Conversion, folder: Path, max_shard_size: str) -> dict[str, Origin]:
    """Write the missing shards and the index; return the origin of each tensor."""
    with torch.device("meta"):
        skeleton = VLMoEForConditionalGeneration(conversion.config)
    tied = set(skeleton.all_tied_weights_keys)
    target = {name: t for name, t in skeleton.state_dict().items() if name not in tied}
    plan = conversion.plan(target)
    sized = {
        name: tensor.to(plan[name].dtype or conversion.dtype) for name, tensor in target.items()
    }
    split = split_torch_state_dict_into_shards(sized, max_shard_size=max_shard_size)
    missing = {
        file: names
        for file, names in split.filename_to_tensors.items()
        if not (folder / file).is_file()
    }
    needed = sum(sized[name].nbytes for names in missing.values() for name in names)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(errno.ENOSPC, _disk_full(folder, needed, free))
    with logging.tqdm(total=needed, desc="Writing experts", unit="B", unit_scale=True) as bar:
        for file, names in missing.items():
            _write_shard(conversion.weights, plan, names, folder / file, needed - bar.n)
            bar.update(sum(sized[name].nbytes for name in names))
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(folder / "model.safetensors.index.json", index)
    return plan


@torch.no_grad()
def _write_shard(
    weights: Mapping[str, Tensor],
    plan: Mapping[str, Origin],
    names: list[str],
    path: Path,
    needed: int,
) -> None:
    tensors = {name: plan[name].tensor(weights).contiguous() for name in names}
    try:
        with atomic_path(path) as temporary:
            save_file(tensors, temporary, metadata={"format": "pt"})
    except (OSError, SafetensorError) as error:
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        if not full:
            raise
        free = shutil.disk_usage(path.parent).free
        raise OSError(errno.ENOSPC, _disk_full(path.parent, needed, free)) from error


def _disk_full(folder: Path, needed: int, free: int) -> str:
    return (
        f"no space for the sparse model's weights: {needed / 1e9:.1f} GB remain to be written, "
        f"{free / 1e9:.1f} GB are free beside {folder}. Free some space and start again: finished "
        "files are kept"
    )

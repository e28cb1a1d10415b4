# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""A dense model's folder becomes a sparse one's, tensor by tensor.

The two models are never in memory together: the dense one answers the sample, its tensors are
written shard by shard into a hidden folder beside the target, and the sparse one is loaded from
there, checked, and put in its place by one rename. A run that was killed goes on with the shards
that are missing; what it writes is the same to the byte.
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

from ..configuration.configuration_vlmoe import VLMoEConfig
from ..hub.atomic_files import atomic_path, write_json
from ..hub.folder_lock import folder_lock, refuse_dangling
from ..hub.model_card import write_model_card
from ..modeling_vlmoe.modeling_vlmoe import VLMoEForConditionalGeneration
from .conversion import Conversion, SampleFor, described
from .report import UpcyclingReport
from .weight_plan import Origin

logger = logging.get_logger(__name__)

Tensor = torch.Tensor


def upcycle_folder(
    begin: Callable[[SampleFor], Conversion],
    target: str | Path,
    request: Mapping[str, Any],
    *,
    processor_for: Callable[[VLMoEConfig], Any] | None = None,
    sample_for: Callable[[Any], Mapping[str, Tensor]] | None = None,
    bases: Sequence[dict[str, Any]] = (),
    max_shard_size: str = "5GB",
) -> UpcyclingReport:
    """Convert dense models into a folder with weights, configuration, code and report.

    Args:
        begin: starts the conversion; what it is given makes the sample.
        target: the folder to make; it must not hold anything.
        request: what is asked for, as JSON can hold it; a conversion that was killed goes on if
            it is the same.
        processor_for: makes the processor to save beside the model, from its configuration.
        sample_for: makes the inputs that dense and sparse model are compared on, from that
            processor; by default drawn pictures and random words.
        bases: what the dense models' cards say, for the new one's; see `saved_model`.
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
        return _upcycle_folder(
            begin, target, request, processor_for, sample_for, bases, max_shard_size
        )


def _upcycle_folder(
    begin: Callable[[SampleFor], Conversion],
    target: Path,
    request: Mapping[str, Any],
    processor_for: Callable[[VLMoEConfig], Any] | None,
    sample_for: Callable[[Any], Mapping[str, Tensor]] | None,
    bases: Sequence[dict[str, Any]],
    max_shard_size: str,
) -> UpcyclingReport:
    """`upcycle_folder`, while nobody else makes that folder."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} is not an empty folder; choose another one or remove it.")
    processors: list[Any] = []

    def sample(config: VLMoEConfig) -> Mapping[str, Tensor] | None:
        if processor_for is None:
            return None
        processors.append(processor_for(config))
        return None if sample_for is None else sample_for(processors[0])

    conversion = begin(sample)
    staging = _staging(target, dict(request) | {"max_shard_size": max_shard_size})
    tensors = _write_weights(conversion, staging, max_shard_size)
    conversion.config.architectures = [VLMoEForConditionalGeneration.__name__]
    conversion.config.save_pretrained(staging)
    for part in (conversion.generation_config, *processors):
        if part is not None:
            part.save_pretrained(staging)
    conversion.weights = {}  # the dense model goes before the sparse one comes
    model = VLMoEForConditionalGeneration.from_pretrained(staging, dtype="auto")
    report = replace(conversion.check(model, tensors), bases=list(bases))
    report.save(staging)
    write_model_card(staging, metadata={"model_name": target.name})
    os.replace(staging, target)
    _request_file(target).unlink()
    return report


def source_fingerprint(source: str) -> dict[str, Any]:
    """Size and time of each file of a folder, the commit of a Hub id: a changed source is seen."""
    folder = Path(source).expanduser()
    if not folder.is_dir():
        return {"config.json": cached_file(source, "config.json")}  # with the commit in its path
    files = sorted(path for path in folder.iterdir() if path.is_file())
    return {f.name: [f.stat().st_size, f.stat().st_mtime_ns] for f in files}


def _staging(target: Path, request: dict[str, Any]) -> Path:
    """The hidden folder beside the target; one of another request is begun anew."""
    staging, asked = target.with_name(f".{target.name}.upcycling"), _request_file(target)
    given = json.loads(json.dumps(request))  # as it is read back
    if staging.is_dir():
        if asked.is_file() and json.loads(asked.read_text(encoding="utf-8")) == given:
            logger.warning(f"Going on with the conversion in {staging}.")
            for half_written in staging.glob(".*.tmp*"):
                half_written.unlink()
            return staging
        logger.warning(f"{staging} holds another conversion; it is begun anew.")
        shutil.rmtree(staging)
    write_json(asked, given)
    staging.mkdir()
    return staging


def _request_file(target: Path) -> Path:
    return target.with_name(f".{target.name}.upcycling.json")


def _write_weights(conversion: Conversion, folder: Path, max_shard_size: str) -> list[dict]:
    """Write the shards that are missing, and the index; returns the report's tensors."""
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
    return described(plan, target)


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
        f"no space for the sparse model's weights: {needed / 1e9:.1f} GB are still to be written, "
        f"{free / 1e9:.1f} GB are free beside {folder}. Free some and run the command again: "
        "finished files are kept"
    )

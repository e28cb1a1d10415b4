# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Write a conversion into a folder, shard by shard.

The two models are never in memory together. The dense one answers the sample. The sparse one's
tensors are made and written, one expert after the other, into a hidden folder beside the target.
The sparse model is loaded from there, checked, and moved to the target by one rename. A run that
was killed continues with the missing shards, and its files are the same to the byte.
"""

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from transformers import PreTrainedModel
from transformers.utils import cached_file, logging

from ..hub.atomic_files import atomic_path, write_json
from ..hub.experts_implementation import keep_suited
from ..hub.folder_lock import new_folder
from ..hub.model_card import write_model_card
from ..hub.published_layout import PublishedView, published_views
from ..hub.tensor_files import StreamedTensor, write_tensors
from .companion_files import absent_parts
from .conversion import Conversion
from .native_target import NativeTarget
from .origins import Origin
from .report import UpcyclingReport
from .stored_model import stored_model

logger = logging.get_logger(__name__)

Tensor = torch.Tensor
Files = Mapping[str, str | Path]
"""Contents of files by name: a text, or another file."""


@dataclass(frozen=True)
class WrittenWeights:
    """The tensors of the sparse model's files.

    Attributes:
        plan: the origin of each tensor of the model.
        views: the tensors of the files.
    """

    plan: dict[str, Origin]
    views: dict[str, PublishedView]


def upcycle_folder(
    begin: Callable[[], Conversion],
    target: str | os.PathLike[str],
    request: Mapping[str, Any],
    *,
    bases: Sequence[dict[str, Any]] = (),
    files: Callable[[], Files] | None = None,
    not_native: str | None = None,
    max_shard_size: str = "5GB",
) -> UpcyclingReport:
    """Convert dense models into a folder with weights, configuration, processor and report.

    A native model needs no code of ours; VLMoE's is saved beside its weights.

    Args:
        begin: starts the conversion.
        target: the folder to make; it must be empty or absent.
        request: the options of the conversion, as JSON can hold them; one that was killed continues
            if they are the same.
        bases: facts from the dense models' cards, for the new card; see `saved_model`.
        files: finds the files of the dense model that a native one takes as they are, such as the
            processor's.
        not_native: for the report.
        max_shard_size: of a weights file.

    Raises:
        ValueError: the model does not fit exactly, an option is not allowed, or another process
            makes that folder.
        OSError: a file is missing or damaged, or the disk is full; finished shards are kept.
        UpcyclingError: the logits differ by more than 1e-5 of their largest, in fp32.
    """
    with new_folder(target) as target:
        conversion = begin()
        staging = _staging(target, dict(request) | {"max_shard_size": max_shard_size})
        written = _write_weights(conversion, staging, max_shard_size)
        conversion.config.architectures = [conversion.target.model_class.__name__]
        conversion.config.save_pretrained(staging)
        if conversion.generation_config is not None:
            conversion.generation_config.save_pretrained(staging)
        if files is not None:
            _copy(files(), staging)
        elif conversion.processor is not None:
            conversion.processor.save_pretrained(staging)
        conversion.weights = {}  # release the dense model before the sparse one is loaded
        model = _saved_model(conversion, staging, written.views)
        checked = conversion.check(model, written.plan)
        absent = [] if files is None else absent_parts(staging, conversion.config)
        report = replace(checked, bases=list(bases), not_native=not_native, absent=absent)
        report.save(staging)
        keep_suited(staging, model)
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


def _copy(files: Files, folder: Path) -> None:
    """Write texts, and copies of files, into a folder; each of them is whole or absent."""
    for name, content in files.items():
        with atomic_path(folder / name) as temporary:
            if isinstance(content, Path):
                shutil.copyfile(content, temporary)
            else:
                temporary.write_text(content, encoding="utf-8")


def _saved_model(
    conversion: Conversion, folder: Path, views: Mapping[str, PublishedView]
) -> PreTrainedModel:
    model_class = conversion.target.model_class
    if conversion.target.name == NativeTarget.name:
        return stored_model(model_class, conversion.config, folder, views)
    return model_class.from_pretrained(folder, dtype="auto")


def _write_weights(conversion: Conversion, folder: Path, max_shard_size: str) -> WrittenWeights:
    """Write the missing shards and the index."""
    with torch.device("meta"):
        skeleton = conversion.target.model_class(conversion.config)
    tied = set(skeleton.all_tied_weights_keys)
    target = {name: t for name, t in skeleton.state_dict().items() if name not in tied}
    plan = conversion.plan(target)
    dtypes = {name: origin.stored_dtype(conversion.weights) for name, origin in plan.items()}
    views = published_views(skeleton, dtypes)
    sized = {n: torch.empty(v.shape, dtype=v.dtype, device="meta") for n, v in views.items()}
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
    made = _Maker(conversion.weights, plan)
    with logging.tqdm(total=needed, desc="Writing experts", unit="B", unit_scale=True) as bar:
        for file, names in missing.items():
            tensors = {name: made.streamed(views[name]) for name in names}
            _write_shard(tensors, folder / file, needed)
            written = sum(sized[name].nbytes for name in names)
            needed -= written
            bar.update(written)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(folder / "model.safetensors.index.json", index)
    return WrittenWeights(plan, views)


class _Maker:
    """Makes the tensors of the files, one expert after the other."""

    def __init__(self, weights: Mapping[str, Tensor], plan: Mapping[str, Origin]) -> None:
        self.weights, self.plan = weights, plan
        # gate and up of an expert are parts of one slice, as are the shards of a bank
        self.expert = lru_cache(maxsize=2)(lambda name, i: plan[name].expert(weights, i))

    def streamed(self, view: PublishedView) -> StreamedTensor:
        """Return a tensor that is made while it is written."""
        return StreamedTensor(view.shape, view.dtype, lambda: self._parts(view))

    @torch.no_grad()
    def _parts(self, view: PublishedView) -> Iterator[Tensor]:
        origin = self.plan[view.source]
        if origin.make_expert is None:
            yield view.of(origin.tensor(self.weights))
        else:
            for expert in view.experts:
                yield view.of_expert(expert, self.expert(view.source, expert))


def _write_shard(tensors: Mapping[str, StreamedTensor], path: Path, needed: int) -> None:
    try:
        write_tensors(tensors, path, {"format": "pt"})
    except OSError as error:
        if error.errno != errno.ENOSPC and "No space left" not in str(error):
            raise
        free = shutil.disk_usage(path.parent).free
        raise OSError(errno.ENOSPC, _disk_full(path.parent, needed, free)) from error


def _disk_full(folder: Path, needed: int, free: int) -> str:
    return (
        f"no space for the sparse model's weights: {needed / 1e9:.1f} GB remain to be written, "
        f"{free / 1e9:.1f} GB are free beside {folder}. Free some space and start again: finished "
        "files are kept"
    )

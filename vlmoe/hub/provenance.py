# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Training provenance: the stages of training, kept beside the weights in training_stages.json.

Each stage is a dict: start, data, hyperparameters, steps, machine and versions. A run that starts
from a saved folder takes over the stages written there, so that the list goes back to the first
weights. The model card is rendered from it (model_card.py). Paths are left out: of a local folder
or file only its name is kept.
"""

import platform
import re
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import ModelCard
from transformers import PreTrainedModel, TrainerState, TrainingArguments

from .active_parameters import parameter_counts
from .input_errors import InputError
from .json_files import JsonObject, read_json

STAGES_FILE = "training_stages.json"
RESULTS_FILE = "train_results.json"
REPORT_NAME = "upcycling_report.json"  # of a conversion
COMPRESSION_REPORT = "compression_report.json"
PRUNING_REPORT = "pruning_report.json"
PRESET_LICENSE = "apache-2.0"
"""The license of weights that were trained from a preset: the package's own."""

_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
LICENSE_FIELDS = ("license", "license_name", "license_link")
PACKAGES = ("vlmoe", "torch", "transformers", "accelerate", "datasets", "tokenizers")


@dataclass(frozen=True)
class RunOrigin:
    """Facts about a run that a Trainer does not know.

    Attributes:
        preset: the preset whose sizes the model has, if it was trained from scratch.
        dataset: the training data, as `load_rows` takes it.
        split: its split.
        rows: rows trained on, altered copies included.
        altered_copies: of these, copies of every row with altered images.
        with_images: False where the images were left out.
        evaluation: the data evaluated on during training, such as "easy_vqa, test, 64 rows".
    """

    preset: str | None = None
    dataset: str | None = None
    split: str | None = None
    rows: int | None = None
    altered_copies: int = 0
    with_images: bool = True
    evaluation: str | None = None


def read_stages(folder: str | Path) -> list[JsonObject]:
    """Read the stages behind the weights in `folder`; an empty list if none are recorded.

    The last one holds the results of train_results.json as `results`.
    """
    file = Path(folder) / STAGES_FILE
    stages = saved_json(file, list) or []
    if not all(isinstance(stage, dict) for stage in stages):
        raise InputError(f"{file}: must hold a list of objects, one for each training.")
    if stages:
        stages[-1]["results"] = saved_json(Path(folder) / RESULTS_FILE)
    return stages


def describe_stage(
    model: PreTrainedModel,
    start: JsonObject,
    origin: RunOrigin,
    arguments: TrainingArguments,
    state: TrainerState,
) -> JsonObject:
    """Describe the stage that is being trained, at its present step.

    Args:
        model: the model, without wrappers.
        start: see `starting_point`.
        origin: facts that Trainer does not know.
        arguments: Trainer's arguments.
        state: Trainer's state.
    """
    name, is_local = dataset_name(origin.dataset)
    return {
        "start": start,
        "data": {
            "name": name,
            "local": is_local,
            "split": origin.split,
            "rows": origin.rows,
            "altered_copies": origin.altered_copies,
            "with_images": origin.with_images,
            "evaluation": origin.evaluation,
        },
        "steps": state.global_step,
        "epochs": state.epoch or 0.0,
        "parameters": parameter_counts(model),
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "hyperparameters": hyperparameters(arguments, str(model.dtype).removeprefix("torch.")),
        "hardware": {
            "device": device_name(arguments.device),
            "processes": arguments.world_size,
            "threads": torch.get_num_threads(),
        },
        "versions": versions(),
    }


def starting_point(model: PreTrainedModel, preset: str | None) -> JsonObject:
    """Return the start of a training: `kind` (preset, hub, folder or config) and `name`.

    For a saved model, license and base model of its card are added; see `saved_model`.
    """
    source = model.name_or_path
    if preset is not None:
        return {"kind": "preset", "name": preset, "license": PRESET_LICENSE}
    if not source:
        return {"kind": "config", "name": None}
    return saved_model(source)


def saved_model(source: str) -> JsonObject:
    """Return `kind` (hub or folder), `name`, and license and base model of a readable card."""
    folder = Path(source)
    if folder.is_dir():
        card = _card_data(folder / "README.md") if (folder / "README.md").is_file() else {}
        known = {name: card.get(name) for name in (*LICENSE_FIELDS, "base_model")}
        return {"kind": "folder", "name": folder.resolve().name, **known}
    card = _card_data(source)
    known = {name: card.get(name) for name in LICENSE_FIELDS}
    return {"kind": "hub", "name": source, **known, "base_model": source}


def hyperparameters(arguments: TrainingArguments, dtype: str) -> JsonObject:
    """Return the arguments that affect the weights, as plain values.

    Args:
        arguments: Trainer's arguments.
        dtype: the number type of the weights, such as "float32".
    """
    mixed = "bf16" if arguments.bf16 else "fp16" if arguments.fp16 else None
    batch = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
    return {
        "epochs": None if arguments.max_steps > 0 else arguments.num_train_epochs,
        "max_steps": arguments.max_steps if arguments.max_steps > 0 else None,
        "rows_per_device": arguments.per_device_train_batch_size,
        "accumulation": arguments.gradient_accumulation_steps,
        "rows_per_step": batch * arguments.world_size,
        "learning_rate": arguments.learning_rate,
        "schedule": str(getattr(arguments.lr_scheduler_type, "value", arguments.lr_scheduler_type)),
        "warmup_steps": arguments.warmup_steps,
        "weight_decay": arguments.weight_decay,
        "optimizer": str(getattr(arguments.optim, "value", arguments.optim)),
        "betas": [arguments.adam_beta1, arguments.adam_beta2],
        "max_grad_norm": arguments.max_grad_norm,
        "precision": f"{mixed} autocast, {dtype} weights" if mixed else dtype,
        "seed": arguments.seed,
    }


def device_name(device: torch.device) -> str:
    """Return the name of a GPU, or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return f"{device.type} of {platform.machine()}"
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that the numbers depend on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # data can come without `datasets`
            continue
    return found


def dataset_name(source: str | None) -> tuple[str | None, bool]:
    """Return the name of a dataset without its path, and whether it is none on the Hub.

    That is a local file or folder, or the names of several sources.
    """
    path = Path(source or "").expanduser()
    is_local = bool(source) and path.exists()
    is_several = " + " in (source or "")
    return (path.resolve().name if is_local else source), is_local or is_several


def hub_models(names: Any) -> Any:
    """Return a model's name, or names, that may be Hub ids and are no files here; else None."""
    if isinstance(names, list):
        return [name for name in names if hub_models(name)] or None
    is_id = isinstance(names, str) and _HUB_ID.fullmatch(names) and not Path(names).exists()
    return names if is_id else None


def saved_json(file: Path, kind: type = dict) -> Any:
    """Return the content of a JSON file, or None if there is no such file.

    Raises:
        InputError: it is not valid JSON, or not of the kind; the message names the file.
    """
    return read_json(file, kind) if file.is_file() else None


def _card_data(source: str | Path) -> Any:
    """Return the metadata of a card, from a file or the Hub; empty if it cannot be read."""
    try:
        return ModelCard.load(source, ignore_metadata_errors=True).data
    except (OSError, ValueError, yaml.YAMLError):
        return {}

# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""A callback that logs the routing in training, and writes it in full to a JSON file."""

import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..hub.atomic_files import atomic_path
from ..hub.json_files import JsonObject, json_text, read_json
from ..routing.load import ExpertLoad, record_expert_load
from .callbacks import Logs

if TYPE_CHECKING:
    from transformers import Trainer

TELEMETRY_FILE = "router_telemetry.json"
DIGITS = 5
Json: TypeAlias = "dict[str, Json] | list[Json] | str | float | None"

WAIT_PER_WRITING = 100  # between two writings of the file, in times that one took


class RouterTelemetry(TrainerCallback):
    """Records the routing of the training forwards, over all ranks and micro-batches.

    `Trainer` tells a callback neither itself nor its loggers, so it is handed over:

        trainer.add_callback(RouterTelemetry(trainer))

    With every logged training loss, what was recorded since the one before goes to
    - the loggers, as `router/layer_<index>/max_violation`, `dead_experts`, `router_entropy` (of all
      tokens) and `overlap` (of image and text tokens); of experts in the vision tower and in the
      connector as `router/vision_layer_<index>/...` and `router/connector/...`
    - `router_telemetry.json` in the output folder: a list with an entry per logged loss, with
      `step`, `epoch` and all that `ExpertLoad.as_dict` tells. Written atomically: with every saved
      checkpoint, at the end, and in between as often as costs no time; a resumed run goes on with
      the list as it was at its checkpoint.

    Evaluations and forwards without gradient are not recorded.
    """

    def __init__(self, trainer: "Trainer"):
        self._trainer = trainer
        self._hooks = ExitStack()
        self._load: ExpertLoad | None = None
        self._path = Path(trainer.args.output_dir, TELEMETRY_FILE)
        self._entries: list[str] = []  # as JSON
        self._write_after = 0.0

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        """Start to record; of an earlier session keep the entries up to the checkpoint.

        Raises:
            ValueError: the model has no sparse layer, or the file of an earlier session is damaged.
        """
        self._hooks.close()
        self._load = self._hooks.enter_context(
            record_expert_load(self._trainer.model, training_only=True)
        )
        self._entries = []
        if state.is_world_process_zero and state.global_step and self._path.exists():
            entries = read_telemetry(self._path)
            self._entries = [
                json_text(entry, TELEMETRY_FILE)
                for entry in entries
                if entry["step"] <= state.global_step
            ]

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Logs | None = None,
        **kwargs: object,
    ) -> None:
        """Hand on what was recorded since the last logged loss."""
        if self._load is None or "loss" not in (logs or {}):
            return
        figures = self._load.summed_over_ranks().as_dict()
        self._load.reset()
        entry = {"step": state.global_step, "epoch": state.epoch} | figures
        self._entries.append(json_text(_rounded(entry), TELEMETRY_FILE))
        if control.should_save or time.monotonic() >= self._write_after:
            self._write(state)
        self._trainer.log(scalars(figures))

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        """Write the file."""
        self._write(state)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        """Write the file and stop recording."""
        self._write(state)
        self._hooks.close()
        self._load = None

    def _write(self, state: TrainerState) -> None:
        if not (state.is_world_process_zero and self._entries):
            return
        start = time.monotonic()
        with atomic_path(self._path) as temporary:
            temporary.write_text("[\n" + ",\n".join(self._entries) + "\n]\n", encoding="utf-8")
        end = time.monotonic()
        self._write_after = end + WAIT_PER_WRITING * (end - start)


def read_telemetry(path: str | Path) -> list[JsonObject]:
    """Read the entries of a `router_telemetry.json`, oldest first.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        entries = read_json(path, list, finite=False)
        if all(isinstance(entry["step"], int) for entry in entries):
            return entries
        problem = "it holds no list of entries with a `step`"
    except (ValueError, KeyError, TypeError) as error:
        problem = repr(error)
    raise ValueError(f"{path} is damaged ({problem}); delete it to record anew.")


def scalars(figures: JsonObject) -> dict[str, float]:
    """Return the loggers' part of `ExpertLoad.as_dict`: four numbers per layer, if known."""
    scalars = _scalars(figures, "layer_{}")
    for place, of_place in figures.get("vision", {}).items():
        scalars |= _scalars(of_place, "vision_layer_{}" if place == "tower" else place)
    return scalars


def _scalars(figures: JsonObject, layer_name: str) -> dict[str, float]:
    names = ("max_violation", "dead_experts", "router_entropy")
    columns = {name: figures[name]["all"] for name in names} | {"overlap": figures["overlap"]}
    return {
        f"router/{layer_name.format(layer)}/{name}": float(column[i])
        for i, layer in enumerate(figures["layers"])
        for name, column in columns.items()
        if column[i] is not None
    }


def _rounded(value: Json) -> Json:
    """Numbers with `DIGITS` decimals, through dicts and lists."""
    if isinstance(value, float):
        return round(value, DIGITS)
    if isinstance(value, dict):
        return {name: _rounded(each) for name, each in value.items()}
    return [_rounded(each) for each in value] if isinstance(value, list) else value

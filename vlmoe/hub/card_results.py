# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Read the measured results that a model card shows: metrics.json and evaluate_results.json."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import EvalResult

from .input_errors import InputError
from .json_files import JsonObject
from .provenance import saved_json

METRICS_FILE = "metrics.json"  # of `vlmoe demo`
EVALUATION_FILE = "evaluate_results.json"  # of `vlmoe evaluate`
PIPELINE_TAG = "image-text-to-text"
HUB_TASKS = {"image-captioning": "image-to-text"}  # the Hub has another name


@dataclass(frozen=True)
class CardResult:
    """Measured answers to the questions of one dataset.

    Attributes:
        dataset: its name, without a path.
        split: its split.
        remark: a restriction of the evaluation, such as "without images", or "".
        questions: how many.
        exact_match: share of right answers, 0..1; None for a task without answers.
        by_type: the share of each question type.
        counts: the questions of each type.
        baselines: name, share, and share by type, of each.
        expert_load: as `ExpertLoad.as_dict` gives it, if it was recorded.
        task: the name of the task, if any.
        metrics: further figures by name.
    """

    dataset: str
    split: str
    remark: str
    questions: int
    exact_match: float | None
    by_type: dict[str, float]
    counts: dict[str, int]
    baselines: list[tuple[str, float, dict[str, float]]] = field(default_factory=list)
    expert_load: JsonObject | None = None
    task: str | None = None
    metrics: dict[str, float] = field(default_factory=dict)

    def results(self) -> list[EvalResult]:
        """Return the entries of the card's model-index."""
        shares = {} if self.exact_match is None else {"exact match": self.exact_match}
        shares |= {f"exact match ({kind})": share for kind, share in self.by_type.items()}
        figures = [("exact_match", name, share) for name, share in shares.items()]
        figures += [(name, name, value) for name, value in self.metrics.items()]
        return [
            EvalResult(
                task_type=HUB_TASKS.get(self.task or PIPELINE_TAG, self.task or PIPELINE_TAG),
                dataset_type=self.dataset,
                dataset_name=self.dataset,
                dataset_split=self.split,
                metric_type=kind,
                metric_name=name,
                metric_value=value,
            )
            for kind, name, value in figures
        ]


def read_results(folder: Path) -> list[CardResult]:
    """Read both result files; if they cover the same split, metrics.json wins.

    Raises:
        InputError: a file is no JSON, or lacks a field; the message names it.
    """
    readers: dict[str, Callable[[JsonObject], CardResult]] = {
        METRICS_FILE: _demo_result,
        EVALUATION_FILE: _command_result,
    }
    known: list[CardResult] = []
    for file, read in readers.items():
        values = saved_json(folder / file)
        try:
            known += [] if values is None else [read(values)]
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{folder / file} is not in the format of this version of vlmoe ({error!r}): "
                "write it again, or remove it."
            ) from error
    unique = {(each.dataset, each.split, each.remark): each for each in reversed(known)}
    return list(reversed(unique.values()))


def _demo_result(metrics: JsonObject) -> CardResult:
    return CardResult(
        dataset=metrics["dataset"],
        split=metrics["split"],
        remark=_remark(metrics["max_test_rows"]),
        questions=metrics["questions"],
        exact_match=metrics["accuracy"],
        by_type=metrics["accuracy_by_type"],
        counts=metrics["questions_by_type"],
        baselines=[
            (name, each["exact_match"], each["exact_match_by_type"])
            for name, each in metrics["baselines"].items()
        ],
        expert_load=metrics["expert_load"],
    )


def _command_result(results: JsonObject) -> CardResult:
    options = results["options"]
    return CardResult(
        dataset=results["dataset"],
        split=options["split"],
        remark=_remark(options["max_rows"], options["without_images"]),
        questions=results["questions"],
        exact_match=results["exact_match"],
        by_type=results["exact_match_by_type"],
        counts=results["count_by_type"],
        expert_load=results["expert_load"],
        task=results.get("task"),  # files of earlier versions have no tasks
        metrics=results.get("metrics", {}),
    )


def _remark(rows: int | None, without_images: bool = False) -> str:
    remarks = ["without images"] if without_images else []
    return ", ".join([*remarks, *([] if rows is None else [f"first {rows:,} rows"])])

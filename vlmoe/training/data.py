# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""The data of a training run by name: which rows are read, and what the model card says of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..data.rows import Rows
from ..hub.provenance import RunOrigin, dataset_name
from ..processing.image_sources import ImageLimits
from ..tasks.loading import load_rows
from ..tasks.mixture import DataSource


class TrainingRows(NamedTuple):
    """Rows to train on, and those to evaluate on during training, if any."""

    train: Rows
    evaluation: Rows | None


@dataclass(frozen=True)
class TrainingData:
    """What to train on, and what to evaluate on during training.

    Attributes:
        dataset: training data, as for `load_rows`: a name, or a list of sources.
        train_split: its split.
        eval_dataset: data to evaluate on; by default `dataset`.
        eval_split: its split. With neither `eval_split` nor `eval_dataset` there is no evaluation;
            with `eval_dataset` alone it is test.
        max_train_rows: train on the first so many rows only.
        max_eval_rows: evaluate on the first so many rows only.
        altered_copies: of every training row, with images that are shifted and mirrored a little.
        without_images: leave the images out.
        task: whose columns the rows have, see `vlmoe.TASKS`.
        prompt: its instruction, by default the task's own.
        allow_outside_images: open image files outside the data's own folder.
        allow_image_urls: download images that rows name by http(s) URL.
        max_image_pixels: refuse larger images; by default the processor's limit.
        max_image_side: refuse images with a longer side; by default the processor's limit.
    """

    dataset: str | Sequence[DataSource]
    train_split: str = "train"
    eval_dataset: str | None = None
    eval_split: str | None = None
    max_train_rows: int | None = None
    max_eval_rows: int | None = None
    altered_copies: int = 0
    without_images: bool = False
    task: str | None = None
    prompt: str | None = None
    allow_outside_images: bool = False
    allow_image_urls: bool = False
    max_image_pixels: int | None = None
    max_image_side: int | None = None

    @property
    def has_evaluation(self) -> bool:
        """Whether there are rows to evaluate on."""
        return bool(self.eval_dataset or self.eval_split)

    def load(self) -> TrainingRows:
        """Read the rows; raise as `load_rows` does."""
        train = self._load(self.dataset, self.train_split, self.max_train_rows, self.altered_copies)
        if not self.has_evaluation:
            return TrainingRows(train, None)
        split = self.eval_split or "test"
        source: str | Sequence[DataSource] = self.eval_dataset or self.dataset
        if not isinstance(source, str):
            source = [{**each, "split": split} for each in source]
        return TrainingRows(train, self._load(source, split, self.max_eval_rows))

    def origin(self, rows: TrainingRows, preset: str | None) -> RunOrigin:
        """Return what the model card says of the rows, and of the preset that is trained."""
        evaluation = None
        if rows.evaluation is not None:
            name, _ = dataset_name(self.eval_dataset or self._name)
            evaluation = f"{name}, {self.eval_split or 'test'}, {len(rows.evaluation):,} rows"
        return RunOrigin(
            preset=preset,
            dataset=self._name,
            split=self.train_split,
            rows=len(rows.train),
            altered_copies=self.altered_copies,
            with_images=not self.without_images,
            evaluation=evaluation,
        )

    @property
    def _name(self) -> str:
        """The dataset, or the names of the sources."""
        if isinstance(self.dataset, str):
            return self.dataset
        return " + ".join(str(dataset_name(each["source"])[0]) for each in self.dataset)

    def _load(
        self,
        source: str | Sequence[DataSource],
        split: str,
        limit: int | None,
        altered_copies: int = 0,
    ) -> Rows:
        asked = {"max_pixels": self.max_image_pixels, "max_side": self.max_image_side}
        given = {name: value for name, value in asked.items() if value is not None}
        return load_rows(
            source,
            split,
            limit=limit,
            with_images=not self.without_images,
            task=self.task,
            prompt=self.prompt,
            altered_copies=altered_copies,
            allow_outside_images=self.allow_outside_images,
            allow_image_urls=self.allow_image_urls,
            image_limits=ImageLimits(**given),
        )

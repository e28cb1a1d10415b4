# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""`VLMoETrainer`: a `transformers.Trainer` that knows our rows, routers and model cards.

trainer = VLMoETrainer("tiny", train_dataset=rows)
trainer.train()
answer(trainer.model, trainer.processing_class, "red.png", "what color?")
"""

from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import cast

from torch import Tensor, nn
from transformers import (
    DataCollator,
    EvalPrediction,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from ..data.collator import VLMoECollator
from ..data.long_rows import length_limit, usable_rows
from ..data.native_collator import NativeCollator
from ..data.native_rows import usable_native_rows
from ..data.row_formats import RowReader
from ..data.row_weights import RowWeights
from ..data.rows import ConversationRows, Rows, as_rows
from ..hub.experts_implementation import keep_suited
from ..hub.export import publish_layout
from ..hub.provenance import RunOrigin
from ..hub.saved_model import Processor, is_own_processor, read_processor
from ..processing.image_sources import DEFAULT_LIMITS, ImageLimits
from ..routing.balancing import RouterBiasCallback
from ..routing.finite_checks import StopOnNonFiniteRouting
from ..routing.record import has_experts
from ..tasks.loading import load_rows
from ..tasks.long_texts import default_on_long_rows, shortening
from ..tasks.mixture import DataSource, is_mixture
from ..tasks.table import task_reader
from ..tasks.task import Task
from .answer_accuracy import answer_accuracy, most_likely_tokens
from .arguments import prepared_arguments
from .build import ModelOptions, build_model, is_preset, row_texts
from .callbacks import StopOnBadLoss, TrainingPrinter, TrainingProgress
from .card import ModelCardMixin
from .native import has_moving_bias, native_arguments, require_images_for_fsdp
from .overrides import Fields
from .row_weighting import RowWeightsMixin, count_row_weights, require_weighable
from .strict_resume import StrictResumeMixin
from .telemetry import RouterTelemetry

StateDict = dict[str, Tensor]


class VLMoETrainer(RowWeightsMixin, StrictResumeMixin, ModelCardMixin, Trainer):
    """`transformers.Trainer` for conversations about images and sparse models.

    Beyond `Trainer` it collates rows, checks their lengths before the first step, updates router
    biases where the config asks for it, stops on losses and router logits that are not finite,
    logs the routing (`RouterTelemetry`), measures the exact match of answers, and writes a model
    card with every save. Callbacks, metrics and collator that are given replace its own.

    A model of transformers, of another family with experts, is trained with its own processor and
    by `SparseLoss`; where its routers have a selection bias, `RouterBiasCallback` moves it. Its
    files have the layout that its family publishes.

    Args:
        model: a preset's name, whose weights are new; a saved model's folder or Hub id; or a model,
            also one that PEFT wraps. The last three may be of transformers' own families.
        args: `TrainingArguments`, or values over our defaults (`arguments.TRAINING_DEFAULTS`), such
            as `{"max_steps": 100}`. Where those give no length and rate, a preset takes
            `arguments.FROM_SCRATCH_LENGTH` and `FROM_SCRATCH_RATE`.
        train_dataset: rows as `load_rows` returns them, or a list of rows, or of sources as it
            takes them: `[{"source": "a.json", "task": "image-captioning", "weight": 1}, ...]`.
            Rows with a `loss_weight` are weighted, see `vlmoe.data.row_weights`.
        eval_dataset: rows to evaluate on, or several sets of them by name; each conversation counts
            as one sample.
        processing_class: the processor; by default that of the saved model, or for a preset a new
            one with a tokenizer trained on the texts of `train_dataset`.
        data_collator: by default a `VLMoECollator`, for a processor of transformers a
            `NativeCollator`.
        compute_metrics: by default `exact_match`, see `answer_accuracy`; None for the loss alone.
        callbacks: added to ours. An instance of one of our classes takes the place of ours.
        tokenizer: folder or Hub id of a tokenizer for a preset.
        tiling: whether a preset cuts large images into tiles.
        model_overrides: fields of the config to replace, nested configs as dicts.
        task: whose columns the rows have, see `TASKS`; by default any common form is read.
        prompt: the task's instruction, by default its own.
        max_length: the longest row in tokens; by default as many as the model has positions.
        on_long_rows: "error", "drop" or "shorten-prompt"; see `usable_rows`. By default the task's
            choice, without one "error".
        origin: facts for the model card that the rows do not tell.
        **trainer_kwargs: further arguments of `Trainer`.

    Attributes:
        model: the trained model.
        processing_class: its processor.

    Raises:
        ValueError: an argument, the model or a row cannot be used; the message names it.
        FileNotFoundError: there is no such model folder.
    """

    def __init__(
        self,
        model: str | PathLike | PreTrainedModel | nn.Module,
        args: TrainingArguments | Mapping[str, object] | None = None,
        *,
        train_dataset: Rows,
        eval_dataset: Rows | Mapping[str, Rows] | None = None,
        processing_class: Processor | None = None,
        data_collator: DataCollator | None = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = answer_accuracy,
        callbacks: Sequence[TrainerCallback] | None = None,
        tokenizer: str | None = None,
        tiling: bool = False,
        model_overrides: Fields | None = None,
        task: str | Task | None = None,
        prompt: str | None = None,
        max_length: int | None = None,
        on_long_rows: str | None = None,
        origin: RunOrigin | None = None,
        **trainer_kwargs: object,
    ):
        name = str(model) if isinstance(model, str | PathLike) else None
        preset = name if name is not None and is_preset(name) else None
        reader = task_reader(task, prompt)
        train_dataset = _rows(train_dataset, "train_dataset", reader)
        evaluated = _evaluated_rows(eval_dataset, reader)
        arguments = prepared_arguments(args, preset, bool(evaluated))
        options = ModelOptions(tokenizer=tokenizer, tiling=tiling, model_overrides=model_overrides)
        if isinstance(model, str | PathLike):
            set_seed(arguments.seed)
            texts = row_texts(train_dataset)
            model, processing_class = build_model(str(model), texts, processing_class, **options)
        else:
            processing_class = _processor_of(model, processing_class, options)
        on_long_rows = on_long_rows or default_on_long_rows(task)
        if data_collator is None:
            data_collator = row_collator(model, processing_class, max_length, on_long_rows, task)
        if isinstance(data_collator, RowCollator):
            data_collator.row_weights = count_row_weights(train_dataset, data_collator)
            check = (data_collator, on_long_rows, arguments.process_index == 0)
            train_dataset = checked_rows(train_dataset, "training", *check)
            evaluated = {
                key: cast(Rows, ConversationRows(checked_rows(rows, "evaluation", *check)))
                for key, rows in evaluated.items()
            }
            require_images_for_fsdp(model, train_dataset, arguments)
        if compute_metrics is answer_accuracy:
            trainer_kwargs.setdefault("preprocess_logits_for_metrics", most_likely_tokens)
        callbacks = callbacks or []
        trainer_kwargs = native_arguments(model, arguments, trainer_kwargs) | trainer_kwargs
        self.row_weights = getattr(data_collator, "row_weights", RowWeights())
        if self.row_weights.tasks:
            require_weighable(model, trainer_kwargs.get("compute_loss_func"))
        super().__init__(
            model,
            arguments,
            train_dataset=train_dataset,
            eval_dataset=evaluated.get("", evaluated or None),
            processing_class=processing_class,
            data_collator=data_collator,
            compute_metrics=compute_metrics,
            callbacks=[*own_callbacks(model, callbacks), *callbacks],
            origin=origin or RunOrigin(preset=preset, rows=len(train_dataset)),
            **trainer_kwargs,
        )
        self._show_progress(callbacks)
        if has_experts(model) and not _has_kind(callbacks, RouterTelemetry):
            self.add_callback(RouterTelemetry(self))

    def _save(self, output_dir: str | None = None, state_dict: StateDict | None = None) -> None:
        """Save as `Trainer` does, in the layout in which the model's family publishes it."""
        super()._save(output_dir, state_dict)
        folder = output_dir or self.args.output_dir
        if self.args.should_save:
            publish_layout(folder)
            keep_suited(folder, self.model)

    def _show_progress(self, given: Sequence[TrainerCallback]) -> None:
        """Put our bar, or our printer where there is no bar, in the place of Trainer's."""
        default, own = (
            (PrinterCallback, TrainingPrinter())
            if self.args.disable_tqdm
            else (ProgressCallback, TrainingProgress())
        )
        if not _has_kind(given, default):
            self.remove_callback(default)
            self.add_callback(own)


def _rows(given: Rows | Sequence[DataSource], name: str, reader: RowReader) -> Rows:
    """Return rows, or those of the sources that were given."""
    return load_rows(given) if is_mixture(given) else as_rows(given, name, reader)


def _evaluated_rows(given: Rows | Mapping[str, Rows] | None, reader: RowReader) -> dict[str, Rows]:
    """Return the sets of rows to evaluate on by name; a single one is called ""."""
    if given is None:
        return {}
    if isinstance(given, Mapping):
        return {
            name: _rows(rows, f"eval_dataset[{name!r}]", reader) for name, rows in given.items()
        }
    return {"": _rows(given, "eval_dataset", reader)}


def _processor_of(
    model: PreTrainedModel, given: Processor | None, options: ModelOptions
) -> Processor:
    """Return the processor that was given, or else that of the folder that the model is from."""
    if any(options.values()):
        raise ValueError(
            "`tokenizer`, `tiling` and `model_overrides` are for a model that is given by its name."
        )
    if given is not None:
        return given
    if isinstance(source := model.name_or_path, str) and source:
        return read_processor(source)
    raise ValueError("`processing_class` is missing: give the model's processor.")


def own_callbacks(
    model: PreTrainedModel, given: Sequence[TrainerCallback]
) -> list[TrainerCallback]:
    """Return the callbacks that guard and balance the routing, but those that were given."""
    own: list[TrainerCallback] = [StopOnBadLoss(), StopOnNonFiniteRouting()]
    is_adapter = hasattr(model, "peft_config")  # an adapter leaves the biases as they are
    if not is_adapter and has_moving_bias(model):
        own.append(RouterBiasCallback())
    return [callback for callback in own if not _has_kind(given, type(callback))]


RowCollator = VLMoECollator | NativeCollator


def row_collator(
    model: PreTrainedModel,
    processor: Processor,
    max_length: int | None = None,
    on_long_rows: str = "error",
    task: str | Task | None = None,
    *,
    limits: ImageLimits = DEFAULT_LIMITS,
    allow_image_urls: bool = False,
) -> RowCollator:
    """Return the collator of the rows, with the length that the model and `max_length` allow.

    Args:
        model: will be trained.
        processor: of the model; a `VLMoEProcessor` has limits on images of its own.
        max_length: the longest row in tokens.
        on_long_rows: as for `VLMoETrainer`.
        task: of the rows; it decides which text is shortened.
        limits: on images, for a processor of transformers.
        allow_image_urls: download images that rows name by http(s) URL.
    """
    limit = length_limit(model.config, max_length)
    if not is_own_processor(processor):
        return NativeCollator(
            processor,
            limit,
            shorten_prompts=shortening(on_long_rows, task),
            limits=limits,
            allow_image_urls=allow_image_urls,
        )
    return VLMoECollator(
        processor,
        limit,
        shorten_prompts=shortening(on_long_rows, task),
        allow_image_urls=allow_image_urls,
    )


def checked_rows(
    rows: Rows, what: str, collator: RowCollator, on_long_rows: str, is_first_rank: bool
) -> Rows:
    """Return the rows that can be used; log once how many are too long.

    Raises:
        ValueError: a row is too long, malformed or has nothing to learn; it is named.
    """
    if isinstance(collator, NativeCollator):
        usable = usable_native_rows(rows, collator, on_long_rows, progress=is_first_rank)
    else:
        usable = usable_rows(rows, collator, on_long_rows, progress=is_first_rank)
    if is_first_rank:
        usable.log(what, collator.max_length)
    return usable.rows


def _has_kind(callbacks: Sequence[TrainerCallback | type], kind: type) -> bool:
    return any(callback is kind or isinstance(callback, kind) for callback in callbacks)

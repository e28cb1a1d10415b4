# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Compress the experts of a sparse model: narrower ones, or fewer, chosen on calibration rows."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from ..data.answers import evaluation_mode
from ..data.row_fields import Rows
from ..hub.active_parameters import parameter_counts
from ..hub.finite_weights import require_finite
from ..hub.provenance import versions
from ..hub.saved_model import Processor, Source, load_model, read_processor, require_model_source
from ..routing.kinds import KINDS
from ..routing.routed_layers import RoutedLayer
from ..training.evaluation import Evaluation, evaluate
from .banks import decoder_banks, down_of, keep_experts, keep_units
from .calibration import BankTokens, Calibration, bank_tokens, calibrate
from .finished_layers import FinishedLayers, compressed_folder
from .healing import heal, teacher_logits
from .overlap import require_apart
from .report import CompressionReport, LayerReport, Size, compared
from .sizes import allowed_width, expert_groups, set_count, set_width
from .subsets import (
    CRITERIA,
    AnswerTokens,
    Criterion,
    best_by_score,
    choose_subset,
    gather_answers,
    saliency,
)
from .units import narrow_bank

if TYPE_CHECKING:
    import datasets

Tensor = torch.Tensor
MANY_TOKENS, TIMED = 512, 5


@dataclass(frozen=True)
class Compression:
    """Options of `compress`; see there."""

    intermediate_size: int | None = None
    keep: float | None = None
    experts: int | None = None
    criterion: Criterion = "fisher"
    heal_steps: int = 0
    text_only: bool = False
    round_up: bool = False
    batch_size: int = 32
    max_new_tokens: int = 32
    allow_image_urls: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        """Check what needs no model."""
        given = [
            n for n in ("intermediate_size", "keep", "experts") if getattr(self, n) is not None
        ]
        if len(given) != 1:
            raise ValueError(
                f"{' and '.join(given) or 'nothing'} was given; allowed: exactly one of "
                "intermediate_size, keep (narrower experts) and experts (fewer experts)."
            )
        if self.criterion not in CRITERIA:
            raise ValueError(f"`criterion` is {self.criterion!r}; allowed: {', '.join(CRITERIA)}.")
        if self.criterion != "fisher" and self.experts is None:
            raise ValueError("`criterion` chooses experts: it needs `experts`.")
        if self.heal_steps < 0 or self.batch_size < 1:
            raise ValueError(
                f"`heal_steps` is {self.heal_steps}, `batch_size` {self.batch_size}; allowed: 0 or "
                "more, 1 or more."
            )


@dataclass(frozen=True)
class CompressionResult:
    """A compressed model, its processor and the report; `folder` is None without `output_dir`."""

    model: PreTrainedModel
    processor: Processor
    report: CompressionReport
    folder: Path | None


def compress(
    model: PreTrainedModel | Source,
    rows: "Rows | datasets.Dataset",
    processor: Processor | None = None,
    output_dir: Source | None = None,
    *,
    intermediate_size: int | None = None,
    keep: float | None = None,
    experts: int | None = None,
    criterion: Criterion = "fisher",
    heal_steps: int = 0,
    evaluation_rows: "Rows | datasets.Dataset | None" = None,
    text_only: bool = False,
    round_up: bool = False,
    batch_size: int = 32,
    max_new_tokens: int = 32,
    allow_image_urls: bool = False,
    seed: int = 0,
) -> CompressionResult:
    """Make the experts of a model's decoder narrower, or fewer.

    The result is a model of the same class with other numbers in its configuration, and loads
    wherever the model does. Narrower experts (`intermediate_size` or `keep`) save bytes and time:
    units are chosen by optimal brain surgeon on each expert's own tokens, layer after layer, and
    the down projections repaired. Fewer experts (`experts`) save bytes: the set of least Fisher
    error on the tokens that predict an answer.

    Args:
        model: a VLMoE or a sparse model of transformers, changed in place; or a folder or Hub id.
        rows: calibration rows, as for training: with images, where the model takes images, and with
            answers.
        processor: the model's; by default the one beside it.
        output_dir: an empty or absent folder for the result. A compression that is killed continues
            there after the layers that were finished, if it is asked for the same again.
        intermediate_size: the new width of the experts.
        keep: the share of their width that stays, in 0..1.
        experts: the new number of experts in each layer.
        criterion: how experts are chosen: "fisher"; or for comparison "frequency", "reap",
            "reap-answers", "random".
        heal_steps: steps of distillation from the model as it was, each on one batch of the rows.
        evaluation_rows: questions to measure the accuracy with, before and after; they must not be
            among the calibration rows.
        text_only: calibrate a model with a vision tower on rows without images.
        round_up: raise a width that grouped_mm does not take to the next one that it takes.
        batch_size: rows of a batch.
        max_new_tokens: the longest answer in the evaluation.
        allow_image_urls: download images that rows name by http(s) URL.
        seed: of sampled answers, of random experts, and of the order of batches in healing.

    Raises:
        FileNotFoundError: there is no such model.
        ValueError: an option is out of range; the model has no plain banks of experts, an adapter
            or quantized weights; calibration rows hold no images, or are evaluation rows.
        OSError: the output folder cannot be written into.
    """
    options = Compression(
        intermediate_size=intermediate_size,
        keep=keep,
        experts=experts,
        criterion=criterion,
        heal_steps=heal_steps,
        text_only=text_only,
        round_up=round_up,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        allow_image_urls=allow_image_urls,
        seed=seed,
    )
    source = model.name_or_path if isinstance(model, PreTrainedModel) else str(model)
    if evaluation_rows is not None:
        require_apart(rows, evaluation_rows)
    with compressed_folder(output_dir, source, options) as folder:
        network, processor = _model_and_processor(model, processor)
        name = source or type(network).__name__
        run = _Run(network, processor, options, rows, evaluation_rows)
        report = run.finish(name, folder)
        if folder is not None:
            folder.save(network, processor, report, source)
    return CompressionResult(network, processor, report, folder.target if folder else None)


def _model_and_processor(
    model: PreTrainedModel | Source, processor: Processor | None
) -> tuple[PreTrainedModel, Processor]:
    if isinstance(model, PreTrainedModel):
        return model, processor or read_processor(model.name_or_path)
    require_model_source(model)
    return load_model(model), processor or read_processor(model)


class _Run:
    """One compression, from its calibration to its report."""

    def __init__(
        self,
        model: PreTrainedModel,
        processor: Processor,
        options: Compression,
        rows: "Rows | datasets.Dataset",
        evaluation_rows: "Rows | datasets.Dataset | None",
    ):
        self.model, self.processor, self.options = model, processor, options
        self.layers = decoder_banks(model)
        self.evaluation_rows = evaluation_rows
        self.present = down_of(self.layers[0].experts).shape[-1]
        self.width = self._width()
        self.groups, self.counts = self._groups()
        self.calibration = calibrate(
            model,
            processor,
            rows,
            batch_size=options.batch_size,
            text_only=options.text_only,
            allow_image_urls=options.allow_image_urls,
        )

    def _width(self) -> int | None:
        if self.options.experts is not None:
            return None
        asked, share = self.options.intermediate_size, self.options.keep
        return allowed_width(self.layers, asked, share, self.options.round_up)

    def _groups(self) -> tuple[list[list[int]], list[int]]:
        if self.options.experts is None:
            return [], []
        return expert_groups(self.model.config, self.layers[0], self.options.experts)

    def finish(self, name: str, folder: "FinishedLayers | None") -> CompressionReport:
        """Compress, heal and measure."""
        stages: dict[str, Evaluation] = {}
        self._evaluate("before", stages)
        before, fast = size_of(self.model), speed_of(self.model, self.calibration)
        start = time.perf_counter()
        teacher: list[Tensor] = []
        if self.options.heal_steps:
            teacher = teacher_logits(self.model, self.calibration.batches)
        reports = self._compress_layers(folder)
        seconds = time.perf_counter() - start
        healing = None
        if self.options.heal_steps:
            self._evaluate("before healing", stages)
            start = time.perf_counter()
            healing = self._heal(teacher)
            seconds += time.perf_counter() - start
        require_finite(self.model.state_dict().items(), "the compressed model")
        self._evaluate("after", stages)
        calibration = self.calibration
        return CompressionReport(
            source=name,
            method="narrower experts" if self.width else "fewer experts",
            options=asdict(replace(self.options, intermediate_size=self.width, keep=None)),
            layers=reports,
            calibration={
                "rows": calibration.rows,
                "answer_tokens": calibration.answer_tokens,
                "tokens": calibration.tokens,
            },
            before=before,
            after=size_of(self.model),
            speed={"before": fast, "after": speed_of(self.model, calibration)},
            accuracy=compared(stages) if stages else None,
            healing=healing,
            seconds=seconds,
            versions=versions(),
        )

    def _evaluate(self, stage: str, stages: dict[str, Evaluation]) -> None:
        if self.evaluation_rows is not None:
            stages[stage] = evaluate(
                self.model,
                self.processor,
                self.evaluation_rows,
                batch_size=self.options.batch_size,
                max_new_tokens=self.options.max_new_tokens,
                allow_image_urls=self.options.allow_image_urls,
                progress=True,
            )

    def _compress_layers(self, folder: "FinishedLayers | None") -> list[LayerReport]:
        needs_answers = self.options.experts is not None and self.options.criterion == "fisher"
        answers: list[AnswerTokens] = []
        if needs_answers:
            answers = gather_answers(
                self.model, self.layers, self.calibration.batches, self.options.seed
            )
        scores: list[Tensor] = []
        if self.options.experts is not None and not needs_answers:
            scores = [self._scores(layer, number) for number, layer in enumerate(self.layers)]
        reports, kept = [], []
        for number, layer in enumerate(logging.tqdm(self.layers, desc="compressing", unit="layer")):
            finished = folder.load(number, layer) if folder else None
            if finished is not None:
                reports.append(finished)
                kept = finished["kept"]
                continue
            if self.width:
                report = self._narrow(layer)
            else:
                if answers:
                    kept = choose_subset(layer, answers[number], self.groups, self.counts)
                else:
                    kept = best_by_score(scores[number], self.groups, self.counts)
                report = self._drop(layer, kept)
            reports.append(report)
            if folder:
                folder.save_layer(number, layer, report)
        if self.width:
            set_width(self.model, self.present, self.width)
        else:
            set_count(self.model, kept)
        return reports

    def _scores(self, layer: RoutedLayer, number: int) -> Tensor:
        if self.options.criterion == "random":
            generator = torch.Generator().manual_seed(self.options.seed * 1000 + number)
            return torch.rand(layer.num_experts, generator=generator)
        return saliency(self.model, layer, self.calibration.batches, self.options.criterion)

    def _narrow(self, layer: RoutedLayer) -> LayerReport:
        assert self.width is not None
        tokens = bank_tokens(self.model, layer, self.calibration.batches)
        before = layer_output(layer, tokens)
        narrowed = narrow_bank(layer.experts, tokens, self.width)
        keep_units(layer.experts, narrowed.kept, narrowed.down)
        return {
            "name": layer.name,
            "kept": narrowed.kept.tolist(),
            "error": errors(before, layer_output(layer, tokens), tokens.kinds),
            "without_tokens": narrowed.without_tokens,
        }

    def _drop(self, layer: RoutedLayer, kept: list[int]) -> LayerReport:
        tokens = bank_tokens(self.model, layer, self.calibration.batches)
        before = layer_output(layer, tokens)
        keep_experts(layer, kept)
        after = bank_tokens(self.model, layer, self.calibration.batches)
        seen = set(tokens.chosen.unique().tolist())
        return {
            "name": layer.name,
            "kept": kept,
            "error": errors(before, layer_output(layer, after), tokens.kinds),
            "without_tokens": [e for e in range(layer.num_experts) if e not in seen],
        }

    def _heal(self, teacher: Sequence[Tensor]) -> dict[str, float]:
        layers = decoder_banks(self.model)
        steps, seed = self.options.heal_steps, self.options.seed
        losses = heal(self.model, layers, self.calibration.batches, teacher, steps, seed=seed)
        return {"steps": steps, "first_loss": losses[0], "last_loss": losses[-1]}


@torch.no_grad()
def layer_output(layer: RoutedLayer, tokens: BankTokens) -> Tensor:
    """(T, H): what a bank gives for tokens and their routing."""
    pieces = zip(
        tokens.hidden.split(4096),
        tokens.chosen.split(4096),
        tokens.weights.split(4096),
        strict=True,
    )
    return torch.cat([layer.experts(*piece) for piece in pieces])


def errors(before: Tensor, after: Tensor, kinds: Tensor) -> dict[str, float]:
    """Return |after - before| / |before| by kind of token, of kinds that there are."""
    found = {}
    for number, name in enumerate(KINDS):
        of_kind = kinds == number
        if of_kind.any():
            change = (after[of_kind] - before[of_kind]).norm()
            found[name] = float(change / before[of_kind].norm().clamp(min=1e-30))
    return found


def size_of(model: PreTrainedModel) -> Size:
    """Return a model's parameters and the bytes of its weights, tied ones once."""
    stored = {id(tensor): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())}
    return {"parameters": parameter_counts(model), "bytes": sum(stored.values())}


@torch.no_grad()
def speed_of(model: PreTrainedModel, calibration: Calibration) -> dict[str, float]:
    """Return tokens per second of one forward pass over 1 and over many text tokens: the median."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", MANY_TOKENS)
    answers = [b["input_ids"][b["labels"] >= 0] for b in calibration.batches]
    texts = torch.cat(answers).repeat(MANY_TOKENS)[: min(MANY_TOKENS, positions)]
    found = {}
    with evaluation_mode(model):
        for tokens in (texts[:1], texts):
            seconds = []
            for _ in range(TIMED):
                start = time.perf_counter()
                model(input_ids=tokens[None].to(model.device), use_cache=False)
                seconds.append(time.perf_counter() - start)
            found[str(len(tokens))] = len(tokens) / statistics.median(seconds)
    return found

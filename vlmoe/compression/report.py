# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""The report of a compression: sizes, errors, accuracy and speed, before and after."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from ..figures.plots import BLUE, GRAY, ORANGE, new_figure, save_figure
from ..hub.atomic_files import write_json
from ..hub.json_files import JsonObject
from ..hub.provenance import COMPRESSION_REPORT
from ..training.evaluation import Evaluation
from ..training.paired_bootstrap import paired_bootstrap

FIGURE_NAME = "compression.png"
EXACT = 1e-6
"""Relative error up to which a compressed layer computes the same, but for rounding."""


class LayerReport(TypedDict):
    """What became of one layer.

    `kept`: the experts, or for each expert the units, that stayed. `error`: by kind of token, the
    relative error of the layer's output, |after - before| / |before|, on the calibration tokens
    that reached it. `without_tokens`: experts that no calibration token was sent to.
    """

    name: str
    kept: list[Any]
    error: dict[str, float]
    without_tokens: list[int]


class Size(TypedDict):
    """A model's size: `parameters` as `parameter_counts` gives them, and `bytes` of its weights."""

    parameters: dict[str, int]
    bytes: int


@dataclass(frozen=True)
class CompressionReport:
    """What a compression did; saved beside the model as `compression_report.json`.

    Attributes:
        source: the model's folder or Hub id, or its class where it was given in memory.
        method: "narrower experts" or "fewer experts".
        options: of the compression.
        layers: one for each sparse layer of the decoder.
        calibration: `rows`, `answer_tokens`, and tokens by kind.
        before, after: sizes.
        speed: tokens per second `before` and `after`, of 1 and of many tokens in one forward pass.
        accuracy: exact match `before`, `after` and, where it was healed, `before healing`, by type
            of question and of all, and the paired `difference`; None without evaluation rows.
        healing: `steps`, and the loss of the first and the last; None without.
        seconds: of the compression, evaluation left out.
        versions: of the libraries.
    """

    source: str
    method: str
    options: dict[str, Any]
    layers: list[LayerReport]
    calibration: dict[str, Any]
    before: Size
    after: Size
    speed: dict[str, dict[str, float]]
    accuracy: dict[str, Any] | None
    healing: dict[str, float] | None
    seconds: float
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def is_exact(self) -> bool:
        """Whether every layer computes the same as before, but for rounding."""
        worst = max((e for layer in self.layers for e in layer["error"].values()), default=0.0)
        return worst <= EXACT and self.healing is None

    def save(self, folder: str | Path) -> Path:
        """Write the report and its figure into a folder; return the report's path."""
        path = Path(folder) / COMPRESSION_REPORT
        write_json(path, asdict(self) | {"is_exact": self.is_exact})
        plot_report(self, Path(folder) / FIGURE_NAME)
        return path

    def table(self) -> str:
        """Format the report in short, one line for each fact."""
        rows = [
            ("source", self.source),
            ("method", self.method),
            ("function", "exact" if self.is_exact else "approximate"),
        ]
        names = {"total": "parameters", "image_token": "active per image token"}
        names["text_token"] = "active per text token"
        old, new = self.before["parameters"], self.after["parameters"]
        rows += [(names[k], _change(old[k], new[k])) for k in names if k in old]
        rows.append(("bytes", _change(self.before["bytes"], self.after["bytes"])))
        for tokens, now in self.speed["after"].items():
            was = self.speed["before"][tokens]
            rows.append((f"tokens/s, {tokens}", f"{was:,.0f} -> {now:,.0f} ({now / was:.2f}x)"))
        for kind in self.layers[0]["error"]:
            each = ", ".join(f"{layer['error'][kind]:.1e}" for layer in self.layers[:8])
            more = ", ..." if len(self.layers) > 8 else ""
            rows.append((f"error, {kind} tokens", f"{each}{more}"))
        rows += self._accuracy()
        rows.append(("seconds", f"{self.seconds:.0f}"))
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)

    def _accuracy(self) -> list[tuple[str, str]]:
        if self.accuracy is None:
            return []
        stages = [s for s in ("before", "before healing", "after") if s in self.accuracy]
        found = " -> ".join(f"{self.accuracy[stage]['all']:.2%}" for stage in stages)
        gap = self.accuracy["difference"]
        mean, low, high = (100 * gap[key] for key in ("mean", "low", "high"))
        return [("exact match", found), ("points", f"{mean:+.2f} ({low:+.2f} to {high:+.2f})")]


def compared(stages: dict[str, Evaluation]) -> JsonObject:
    """Return the accuracies of all stages by type of question, and the difference of the last.

    The difference is "after" less "before", with its 95% interval, paired by question.
    """
    found: JsonObject = {
        name: {"all": each.exact_match, **each.exact_match_by_type} for name, each in stages.items()
    }
    after, before = (
        np.array([[each["correct"] for each in stages[name].predictions]], float)
        for name in ("after", "before")
    )
    return found | {"difference": paired_bootstrap(after, before), "questions": after.shape[1]}


def plot_report(report: CompressionReport, path: Path) -> Path:
    """Plot each layer's error by kind of token, and the bytes of the weights."""
    figure = new_figure(8.0, 3.2)
    errors, size = figure.subplots(1, 2, width_ratios=[3, 1])
    kinds = list(report.layers[0]["error"])
    places = np.arange(len(report.layers))
    for number, (kind, color) in enumerate(zip(kinds, (ORANGE, BLUE, GRAY), strict=False)):
        values = [100 * layer["error"][kind] for layer in report.layers]
        errors.bar(
            places + number * 0.8 / len(kinds), values, 0.8 / len(kinds), color=color, label=kind
        )
    errors.set(xlabel="sparse layer", ylabel="error of the layer's output, %")
    errors.set_xticks(places + 0.4 - 0.4 / len(kinds), [str(place) for place in places])
    errors.legend(title="tokens", frameon=False)
    megabytes = [report.before["bytes"] / 1e6, report.after["bytes"] / 1e6]
    size.bar(["before", "after"], megabytes, color=[GRAY, BLUE], width=0.6)
    size.set_ylabel("weights, MB")
    return save_figure(figure, path)


def _change(before: int, after: int) -> str:
    return f"{before:,} -> {after:,} ({after / before:.1%})"

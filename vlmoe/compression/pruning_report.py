# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""The report of a pruning: measured error, sizes, and the neurons that stayed."""

from dataclasses import asdict, dataclass, field
from pathlib import Path

from ..hub.atomic_files import write_json
from ..hub.json_files import read_json
from ..hub.provenance import PRUNING_REPORT


@dataclass(frozen=True)
class PruningReport:
    """The exactness report of `prune`; saved beside the model as `pruning_report.json`.

    Attributes:
        source: the model's folder or Hub id.
        model_type: the model's.
        dtype: of the weights.
        width: neurons of an expert, `before` and `after`.
        neurons: for each bank of experts, for each expert, those that are not zero.
        error: max|after - before| / max|before| of logits, computed in fp32.
        same_argmax: share of tokens with the same most likely next token.
        loss: `before` and `after`: next-token cross-entropy of the sample's text.
        sample: rows and tokens that were compared.
        parameters: `before` and `after`, as `active_parameters` counts them.
        versions: of the libraries.
    """

    source: str
    model_type: str
    dtype: str
    width: dict[str, int]
    neurons: dict[str, list[int]] = field(repr=False)
    error: float
    same_argmax: float
    loss: dict[str, float]
    sample: dict[str, int]
    parameters: dict[str, dict[str, int]]
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def zero_share(self) -> float:
        """Return the share of neurons that were zero."""
        counts = [count for bank in self.neurons.values() for count in bank]
        return 1 - sum(counts) / (len(counts) * self.width["before"])

    @property
    def empty_experts(self) -> int:
        """Return the number of experts without any neuron: their output is zero."""
        return sum(count == 0 for bank in self.neurons.values() for count in bank)

    def save(self, folder: str | Path) -> Path:
        """Write the report into a folder and return its path."""
        path = Path(folder) / PRUNING_REPORT
        shares = {"zero_share": self.zero_share, "empty_experts": self.empty_experts}
        write_json(path, asdict(self) | shares)
        return path

    @classmethod
    def load(cls, folder: str | Path) -> "PruningReport":
        """Read the report of a folder."""
        held = read_json(Path(folder) / PRUNING_REPORT)
        return cls(**{name: held[name] for name in cls.__dataclass_fields__})

    def table(self) -> str:
        """Format the report in short, one line for each fact."""
        before, after = self.parameters["before"], self.parameters["after"]
        experts = sum(map(len, self.neurons.values()))
        rows = [
            ("source", f"{self.source} ({self.model_type})"),
            ("neurons of zeros", f"{self.zero_share:.1%}"),
            ("experts of zeros", f"{self.empty_experts} of {experts}"),
            ("width of an expert", f"{self.width['before']:,} -> {self.width['after']:,}"),
            ("error in fp32", f"{self.error:.1e}, same next token {self.same_argmax:.2%}"),
            ("loss", f"{self.loss['before']:.6f} -> {self.loss['after']:.6f}"),
        ]
        names = {"total": "parameters", "image_token": "active per image token"}
        names["text_token"] = "active per text token"
        rows += [
            (title, f"{before[name]:,} -> {after[name]:,} ({after[name] / before[name]:.1%})")
            for name, title in names.items()
            if name in before
        ]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)

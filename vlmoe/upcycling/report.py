# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""The report of a conversion: measured error, parameters, and the origin of each tensor."""

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypedDict

from ..hub.provenance import REPORT_NAME


class TensorReport(TypedDict):
    """A tensor of the sparse model and the dense tensors that it is made of."""

    name: str
    shape: list[int]
    kind: str
    sources: list[str]


@dataclass(frozen=True)
class UpcyclingReport:
    """The exactness report of a conversion; saved beside the model as `upcycling_report.json`.

    Attributes:
        source: the dense model's folder or Hub id, or its class where it was given in memory.
        model_type: the dense model's.
        exactness: exact, exact at step 0 only, or not exact.
        options: of the conversion.
        dtype: of the weights.
        error: max|sparse - dense| / max|dense| of logits, computed in fp32.
        same_argmax: share of tokens with the same most likely next token.
        loss: of `dense` and `sparse` at step 0: next-token cross-entropy of the sample's text.
        stored_dtype: for weights in half precision, the `error` when computing in their dtype
            and, beside it, the dense model's own distance to fp32 (`dense_rounding`); None where
            these are not finite.
        sample: rows, images and tokens that were compared.
        parameters: of `dense` and `sparse`, as `active_parameters` counts them; without vision
            there is no `image_token`.
        frozen: vision parameters that no output depends on.
        tensors: for each tensor of the sparse model its name, shape, kind (copied, repeated, split,
            perturbed, extended, new) and the dense tensors that it is made of.
        versions: of the libraries.
        not_native: why the sparse model is a VLMoE, where no target was asked for.
        target: "vlmoe", or "native" for the sparse class of the dense model's own family.
        lost_fields: of the dense configuration, which the sparse class does not have; none of
            them changes the function.
        refused_sizes: sizes of rows of the experts that grouped_mm, transformers' default, refuses
            in some dtype. VLMoE and the toolkit compute such experts by "auto"; the config.json of
            a native model names "eager", which plain transformers has.
        absent: "tokenizer" or "processor", which a native model's folder lacks as the dense one's
            does; the models were then compared on random words and pixels.
        bases: facts from the dense models' cards, if they were read: `name`, `license`, ...
    """

    source: str
    model_type: str
    exactness: str
    options: dict[str, Any]
    dtype: str
    error: float
    same_argmax: float
    loss: dict[str, float]
    stored_dtype: dict[str, float] | None
    sample: dict[str, int]
    parameters: dict[str, dict[str, int]]
    frozen: list[str]
    tensors: list[TensorReport] = field(repr=False)
    versions: dict[str, str] = field(default_factory=dict)
    bases: list[dict[str, Any]] = field(default_factory=list)
    not_native: str | None = None
    target: str = "vlmoe"
    lost_fields: dict[str, Any] = field(default_factory=dict)
    refused_sizes: list[int] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)

    def save(self, folder: str | Path) -> Path:
        """Write the report into a folder and return its path."""
        path = Path(folder) / REPORT_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(asdict(self), indent=1, allow_nan=False)
        path.write_text(f"{text}\n", encoding="utf-8")
        return path

    @classmethod
    def load(cls, folder: str | Path) -> "UpcyclingReport":
        """Read the report of a folder."""
        return cls(**json.loads((Path(folder) / REPORT_NAME).read_text(encoding="utf-8")))

    def table(self) -> str:
        """Format the report in short, one line for each fact."""
        dense, sparse = self.parameters["dense"], self.parameters["sparse"]
        kinds = Counter(tensor["kind"] for tensor in self.tensors)
        rows = [
            ("source", f"{self.source} ({self.model_type})"),
            ("target", self.target),
            ("function", self.exactness),
            *self._weight_of_one(),
            ("error in fp32", f"{self.error:.1e}, same next token {self.same_argmax:.2%}"),
            ("loss at step 0", f"dense {self.loss['dense']:.6f}, sparse {self.loss['sparse']:.6f}"),
        ]
        if self.stored_dtype is not None:
            stored = self.stored_dtype
            rounding = f"dense to fp32 {stored['dense_rounding']:.1e}"
            rows.append((f"error in {self.dtype}", f"{stored['error']:.1e}, {rounding}"))
        rows += [
            ("parameters", f"dense {dense['total']:,}, sparse {sparse['total']:,}"),
            ("active per text token", f"{dense['text_token']:,}, {sparse['text_token']:,}"),
        ]
        if "image_token" in dense:  # a model with vision
            images = f"{dense['image_token']:,}, {sparse['image_token']:,}"
            rows.append(("active per image token", images))
        if self.not_native:
            rows.append(("not native, as", self.not_native))
        if self.refused_sizes:
            sizes, others = ", ".join(map(str, self.refused_sizes)), "auto"
            others += ", in plain transformers eager" if self.target == "native" else ""
            rows.append(("experts' rows", f"{sizes}: not for grouped_mm; computed by {others}"))
        if self.absent:
            rows.append(("absent", f"{', '.join(self.absent)}, as in the source"))
        if self.lost_fields:
            rows.append(("lost fields", ", ".join(map(str, self.lost_fields))))
        rows += [
            ("tensors", ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))),
        ]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)

    def _weight_of_one(self) -> list[tuple[str, str]]:
        """Return the row about routers that choose one expert, if they do."""
        chosen = self.options.get("norm_topk_prob")
        k = self.options.get("num_experts_per_tok", 0) * self.options.get("expert_split", 1)
        if k != 1 or chosen is None:
            return []
        meaning = "scores scale the experts" if not chosen else "no gradient of the task"
        return [("router of k = 1", f"{meaning} (norm_topk_prob={chosen})")]

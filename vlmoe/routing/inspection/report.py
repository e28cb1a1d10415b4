# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""The result of an inspection of a model's routing, its pictures of a dataset and its numbers."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path

from ...figures.plots import plot_shares
from ...hub.atomic_files import write_json
from ...hub.folder_lock import folder_lock
from ...hub.json_files import JsonObject
from ..kinds import KINDS
from .analysis import DatasetRouting, change, inspection_table, specialization
from .figures import plot_image_experts, plot_specialization
from .tokens import TracedPrompt

PAGE_FILE, NUMBERS_FILE = "inspection.html", "inspection.json"
LAYERS_IN_FULL = 6  # of deeper models the others are folded away, or not told of
VISION_TOKENS = {
    "tower": "patches",
    "connector": "image tokens",
    "vision": "image and video tokens",
}
"""What passes through each place with experts beside the decoder's."""
PLACE_NAMES = {"vision": "bank for images and videos"}
MOST_BOXES = 20_000
"""Tokens on a page, counted once for each layer; it keeps below 5 MB."""


@dataclass
class BeforeTraining:
    """An older state of the model on the same data; `change` as `inspection.change` gives it."""

    name: str
    routing: DatasetRouting
    change: JsonObject | None


@dataclass
class RoutingInspection:
    """Everything that the page shows; parts that were not asked for are None or empty.

    Attributes:
        model: its name.
        layers: the decoder's index of each sparse layer.
        num_experts, top_k: experts of a layer, and experts per token.
        prompts: questions with their answers.
        dataset: the dataset's name, split and number of rows.
        routing: of the dataset.
        types: `inspection.specialization` of it; None where the data name fewer than two types.
        before: an older state of the model.
        figures: PNG files by what they show: `load`, `load_tower`, `load_connector`, `types_text`,
            `types_image`, `information`, `before`.
    """

    model: str
    layers: tuple[int, ...]
    num_experts: int
    top_k: int
    prompts: list[TracedPrompt] = field(default_factory=list)
    dataset: str | None = None
    routing: DatasetRouting | None = None
    types: JsonObject | None = None
    before: BeforeTraining | None = None
    figures: dict[str, Path] = field(default_factory=dict)

    @property
    def is_deep(self) -> bool:
        """Whether there are so many layers that the page shows one at a time."""
        return len(self.layers) > LAYERS_IN_FULL + 1

    @property
    def boxes_per_layer(self) -> int:
        """How many tokens of each question there is room for."""
        return max(MOST_BOXES // (len(self.layers) * max(len(self.prompts), 1)), 1)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of tokens to compare: image and text, and video where the data hold some."""
        tokens = self.routing.load["tokens"] if self.routing else {}
        return ("image", "text", *(["video"] if any(tokens.get("video", [])) else []))

    @classmethod
    def of_prompts(cls, model: str, prompts: list[TracedPrompt]) -> "RoutingInspection":
        """Begin with questions, at least one."""
        routing = prompts[0].routing
        top_k = routing.experts.shape[-1]
        return cls(model, routing.layers, routing.num_experts, top_k, prompts)

    def add_rows(self, name: str, routing: DatasetRouting) -> None:
        """Add the routing of a dataset."""
        self.dataset, self.routing = name, routing
        self.types = specialization(routing.counts, routing.question_types)

    def compare(self, name: str, before: DatasetRouting) -> None:
        """Add an older state of the model on the same dataset.

        Raises:
            ValueError: its experts are others.
        """
        assert self.routing is not None
        self.before = BeforeTraining(name, before, change(before, self.routing))

    def shown_layers(self, values: Sequence[float]) -> list[int]:
        """Return positions of the layers to describe, in order.

        They are all of a shallow model, and of a deep one those with the largest values.
        """
        order = sorted(range(len(self.layers)), key=lambda number: -values[number])
        return sorted(order[:LAYERS_IN_FULL])

    def save(self, folder: str | PathLike[str]) -> Path:
        """Write the page (inspection.html), its figures and the numbers (inspection.json).

        Returns:
            The page's path.

        Raises:
            ValueError: another process writes into the folder.
            OSError: the folder cannot be written into.
        """
        from .page import write_page

        place = Path(folder).expanduser()
        with folder_lock(place):
            for number, prompt in enumerate(self.prompts, start=1):
                prompt.image_figures = [
                    plot_image_experts(
                        image,
                        self.layers,
                        self.num_experts,
                        place / f"question_{number}_image_{position}.png",
                    )
                    for position, image in enumerate(prompt.images, start=1)
                ]
            draw_figures(self, place)
            write_json(place / NUMBERS_FILE, numbers(self))
            return write_page(self, place / PAGE_FILE)

    def table(self) -> str:
        """Return the expert load of each layer as text; empty without rows."""
        return "" if self.routing is None else inspection_table(self.routing, self.types)


def draw_figures(inspection: RoutingInspection, folder: Path) -> None:
    """Draw what the page shows of the dataset into `folder`, and note the files in `figures`."""
    routing, types = inspection.routing, inspection.types
    if routing is None:
        return
    figures, layers = inspection.figures, inspection.layers
    figures["load"] = plot_shares(
        {f"{kind} tokens": routing.load[f"{kind}_share"] for kind in inspection.kinds},
        folder / "load.png",
        row_names=layers,
        row_label="sparse layer",
    )
    for place, load in routing.load.get("vision", {}).items():
        figures[f"load_{place}"] = plot_shares(
            {VISION_TOKENS[place]: load["image_share"]},
            folder / f"load_{place}.png",
            row_names=load["layers"],
            row_label="sparse layer",
            title=f"Expert load of the {PLACE_NAMES.get(place, place)}",
        )
    if types is not None:
        for kind in ("text", "image") if any(types["image"]["is_above_chance"]) else ("text",):
            figures[f"types_{kind}"] = plot_shares(
                {
                    f"layer {layers[number]}": types[kind]["shares"][number]
                    for number in inspection.shown_layers(types[kind]["information_bits"])
                },
                folder / f"question_types_{kind}_tokens.png",
                row_names=types["types"],
                title=f"Choices of {kind} tokens",
            )
        information = folder / "specialization.png"
        figures["information"] = plot_specialization(types, layers, information)
    if inspection.before is not None:
        states = {"before": inspection.before.routing, "after": routing}
        figures["before"] = plot_shares(
            {
                f"{name}, {kind} tokens": state.load[f"{kind}_share"]
                for name, state in states.items()
                for kind in sorted(inspection.kinds, key=KINDS.index)
            },
            folder / "before_after.png",
            row_names=layers,
            row_label="sparse layer",
        )


def numbers(inspection: RoutingInspection) -> JsonObject:
    """Return the numbers behind the page, for a JSON file.

    `expert_load` is `ExpertLoad.as_dict`, `question_types` what `specialization` gives, `before`
    holds the older model's `expert_load` and `changed` (see `inspection.change`), `prompts` each
    question's tokens with their experts.
    """
    before = inspection.before
    return {
        "model": inspection.model,
        "dataset": inspection.dataset,
        "layers": list(inspection.layers),
        "num_experts": inspection.num_experts,
        "num_experts_per_tok": inspection.top_k,
        "expert_load": inspection.routing and inspection.routing.load,
        "question_types": inspection.types,
        "before": before
        and {"model": before.name, "expert_load": before.routing.load, "changed": before.change},
        "prompts": [prompt.as_dict() for prompt in inspection.prompts],
    }

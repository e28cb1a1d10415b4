# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""The options of an upcycling, and the sparse configuration that follows from them."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..configuration.configuration_vlmoe import VLMoEConfig
from ..configuration.configuration_vlmoe_text import VLMoETextConfig
from ..data.row_fields import did_you_mean
from ..hub.json_files import JsonObject

EXPERT_INITS = ("copy", "shared", "drop", "noise")
TEXT_FIELDS = (
    "router_aux_loss_coef",
    "router_aux_loss_scope",
    "router_z_loss_coef",
    "router_local_entropy_coef",
    "router_global_entropy_coef",
    "router_global_entropy_experts",
    "router_bias_update_rate",
    "router_modality_bias",
    "modality_experts",
    "scoring_func",
    "n_group",
    "topk_group",
    "output_router_logits",
)
TOP_FIELDS = (
    "vision_num_experts",
    "vision_num_experts_per_tok",
    "vision_norm_topk_prob",
    "vision_sparse_layers",
    "projector_num_experts",
    "projector_num_experts_per_tok",
    "projector_norm_topk_prob",
)

NORMALIZES_VISION = ("vision_norm_topk_prob", "projector_norm_topk_prob")
CHOICE = (
    "`{k}` is 1 and `{field}` is not given. Choose: True keeps the dense function, but the weight "
    "of the one expert is always 1, so that no gradient of the task reaches the router; with False "
    "the router learns from the task, but its score scales the expert, so that the function "
    "changes. With `{k}` of 2 or more there is nothing to choose."
)


@dataclass(frozen=True)
class Upcycling:
    """The options of `VLMoEForConditionalGeneration.from_dense`.

    Args:
        num_experts: copies of the dense MLP in each sparse layer.
        num_experts_per_tok: copies that each token is sent to.
        expert_split: cut each copy into that many experts of `1 / expert_split` of its width, for
            fine-grained experts (https://arxiv.org/abs/2401.06066): the layer has `num_experts *
            expert_split` experts, and a token is sent to `num_experts_per_tok * expert_split`. The
            shards of a copy have equal router rows, so that they are chosen together until training
            separates them: exact at step 0.
        expert_init: `"copy"`: each expert is the dense MLP. `"shared"`: the dense MLP becomes a
            shared expert, and routed experts add nothing yet (`down_proj` zero, `gate_up_proj`
            copied). `"drop"`: copies with `drop_ratio` of the inner units redrawn from a normal
            distribution with the weight's mean and deviation (Drop-Upcycling,
            https://arxiv.org/abs/2502.19261). `"noise"`: copies plus normal noise of `noise_ratio`
            times the weight's deviation. The last two are not exact.
        norm_topk_prob: to be chosen where a token is sent to one expert (k = 1 without a split).
            True: the expert's weight is always 1, exact, but no gradient of the task reaches the
            router. False: the weight is the router's score, so that the router learns from the
            task, but the function changes; not with `expert_init="shared"`, whose routed experts
            add nothing yet. For k of 2 or more it is True.
        sparse_layers: decoder layers that get experts: `"all"`, `"second_half"`, a number n for
            every n-th layer, or a list of indices.
        drop_ratio, noise_ratio: see `expert_init`.
        sparse_type: of native targets, the `model_type` of the sparse text model where a family has
            more than one; by default the first of the table in native_pairs.py.
        router_std: standard deviation of the router's weights; by default the dense model's
            `initializer_range`. With 0 all experts tie, and copies stay equal in training.
        seed: of the router's weights, and of the draws of `expert_init`.
        fields: further fields of the configuration, of those in `TEXT_FIELDS` and `TOP_FIELDS`;
            experts of vision tower and connector are copies, whatever `expert_init` says.

    Raises:
        ValueError: a value is not allowed, or the result would not compute the dense function.
    """

    num_experts: int = 8
    num_experts_per_tok: int = 2
    expert_split: int = 1
    expert_init: str = "copy"
    norm_topk_prob: bool | None = None
    sparse_layers: str | int | Sequence[int] = "all"
    drop_ratio: float = 0.5
    noise_ratio: float = 0.05
    sparse_type: str | None = None
    router_std: float | None = None
    seed: int = 0
    fields: JsonObject = field(default_factory=dict)

    @classmethod
    def of(cls, num_experts: int, num_experts_per_tok: int, **options: Any) -> "Upcycling":
        """Make it from keyword arguments; those that are no option are fields of the config."""
        own = {option.name for option in dataclasses.fields(cls)}
        given = {name: value for name, value in options.items() if name in own}
        rest = {name: value for name, value in options.items() if name not in own}
        fields = {**given.pop("fields", {}), **rest}
        return cls(num_experts, num_experts_per_tok, **given, fields=fields)

    def __post_init__(self) -> None:
        """Check the options without the model's config, which checks the rest."""
        if not isinstance(self.sparse_layers, str | int):
            object.__setattr__(self, "sparse_layers", list(self.sparse_layers))  # for JSON
        _require("expert_init", self.expert_init, EXPERT_INITS)
        if self.expert_split < 1:
            raise ValueError(f"`expert_split` is {self.expert_split}; allowed: 1 or more.")
        if self.expert_split > 1 and self.expert_init != "copy":
            raise ValueError(
                f"`expert_split` is {self.expert_split} with `expert_init` {self.expert_init!r}; "
                "allowed: 1, or expert_init='copy'."
            )
        self._check_weights_of_one()
        if not 0 <= self.drop_ratio <= 1:
            raise ValueError(f"`drop_ratio` is {self.drop_ratio}; allowed: 0 to 1.")
        for name in ("noise_ratio", "router_std"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"`{name}` is {getattr(self, name)}; allowed: 0 or more.")
        for name in self.fields:
            if name not in (*TEXT_FIELDS, *TOP_FIELDS):
                own = [option.name for option in dataclasses.fields(self)]
                _require("an option", name, (*own, *TEXT_FIELDS, *TOP_FIELDS))
                raise ValueError(f"`fields` holds {name!r}, which is an option, not a field.")

    def _check_weights_of_one(self) -> None:
        """Require the choice that k = 1 needs, and refuse weights that do not add up to 1."""
        is_open = self.routes_to_one and self.expert_init != "shared"
        if is_open and self.norm_topk_prob is None:
            raise ValueError(CHOICE.format(k="num_experts_per_tok", field="norm_topk_prob"))
        if self.norm_topk_prob is False and not self.routes_to_one:
            raise ValueError(
                f"`norm_topk_prob` is False with {self.num_experts} experts, k of "
                f"{self.num_experts_per_tok} and `expert_split` {self.expert_split}: the weights "
                "of the chosen ones would not add up to 1; allowed: True."
            )
        for place in ("vision", "projector"):
            k, field = f"{place}_num_experts_per_tok", f"{place}_norm_topk_prob"
            some = self.fields.get(f"{place}_num_experts", 0)
            if some > 1 and self.fields.get(k) == 1 and self.fields.get(field) is None:
                raise ValueError(CHOICE.format(k=k, field=field))
            if some and self.fields.get(k) != 1 and self.fields.get(field) is False:
                raise ValueError(f"`{field}` is False; allowed: True, or `{k}` of 1.")

    @property
    def routes_to_one(self) -> bool:
        """Tell whether the router chooses one expert of several."""
        return self.num_experts_per_tok * self.expert_split == 1 < self.num_experts

    @property
    def normalizes(self) -> bool:
        """Tell whether the weights of the chosen experts are divided by their sum."""
        if self.norm_topk_prob is None:
            return not self.routes_to_one
        return self.norm_topk_prob

    @property
    def exactness(self) -> str:
        """Return how far the sparse model keeps the dense function."""
        scales = not self.normalizes and self.expert_init != "shared"
        scales |= any(self.fields.get(name) is False for name in NORMALIZES_VISION)
        if self.expert_init in ("drop", "noise") or scales:
            return "not exact"
        return "exact" if self.expert_split == 1 else "exact at step 0 only"

    def sparse_layer_indices(self, num_layers: int) -> list[int]:
        """Return the decoder layers that get experts.

        Raises:
            ValueError: `sparse_layers` names no layer, or one that there is not.
        """
        asked, every = self.sparse_layers, list(range(num_layers))
        if isinstance(asked, str):
            _require("sparse_layers", asked, ("all", "second_half"))
            return every if asked == "all" else every[num_layers // 2 :]
        if isinstance(asked, int):
            chosen = every[asked - 1 :: asked] if asked > 0 else []
        else:
            chosen = sorted(set(asked))
        if not chosen or not set(chosen) <= set(every):
            raise ValueError(
                f"`sparse_layers` is {asked!r}; allowed: 'all', 'second_half', a number from 1 to "
                f"{num_layers} (every n-th layer), or a list of indices from 0 to {num_layers - 1}."
            )
        return chosen

    def sparse_config(self, dense: JsonObject) -> VLMoEConfig:
        """Make the configuration of the sparse model from the fields of the dense one.

        Args:
            dense: as `dense_configs.vlmoe_fields` gives them.
        """
        if self.sparse_type is not None:
            raise ValueError(f"`sparse_type` is {self.sparse_type!r}; it is for native targets.")
        text, split = dense["text_config"], self.expert_split
        width = text["intermediate_size"]
        if width % split:
            raise ValueError(
                f"`expert_split` is {split}; allowed: divisors of the dense model's "
                f"`intermediate_size`, {width}."
            )
        sparse = self.sparse_layer_indices(text["num_hidden_layers"])
        sparse_text = VLMoETextConfig(
            **text
            | {name: value for name, value in self.fields.items() if name in TEXT_FIELDS}
            | {
                "num_experts": self.num_experts * split,
                "num_experts_per_tok": self.num_experts_per_tok * split,
                "norm_topk_prob": self.normalizes,
                "moe_intermediate_size": width // split,
                "num_shared_experts": int(self.expert_init == "shared"),
                "mlp_only_layers": [i for i in range(text["num_hidden_layers"]) if i not in sparse],
            }
        )
        self._check_whole_copies(sparse_text)
        top = {name: value for name, value in self.fields.items() if name in TOP_FIELDS}
        return VLMoEConfig(**dense | top | {"text_config": sparse_text})

    def _check_whole_copies(self, text: VLMoETextConfig) -> None:
        """Require that routers choose whole copies; otherwise the function changes."""
        if self.num_experts % text.n_group:
            raise ValueError(
                f"`n_group` is {text.n_group}; allowed: divisors of `num_experts` "
                f"{self.num_experts}, as the shards of a copy must be of one group."
            )
        for modality, experts in (text.modality_experts or {}).items():
            copies = {expert // self.expert_split for expert in experts}
            if len(experts) != len(copies) * self.expert_split:
                raise ValueError(
                    f"`modality_experts` gives {modality} tokens the experts {experts}, some of "
                    f"them without the others of their copy; allowed: whole copies of "
                    f"{self.expert_split} neighboring experts."
                )


def _require(name: str, value: object, allowed: Sequence[str]) -> None:
    if value not in allowed:
        meant = did_you_mean(str(value), allowed)
        raise ValueError(f"{name} is {value!r}{meant}; allowed: {', '.join(allowed)}.")

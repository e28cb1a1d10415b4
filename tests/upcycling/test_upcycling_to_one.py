"""Upcycling with k = 1: exact, or with a router that the task trains; the user chooses."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from native_dense import LANGUAGE_MODELS, language_config
from native_dense import dense_model as native_dense
from transformers import AutoModelForCausalLM

from vlmoe import VLMoEForConditionalGeneration, upcycle
from vlmoe.routing.routed_layers import routed_layers
from vlmoe.routing.scoring import weight_is_constant
from vlmoe.upcycling.conversion import Conversion, native_model
from vlmoe.upcycling.dense_to_sparse import native_problem
from vlmoe.upcycling.folder import upcycle_folder
from vlmoe.upcycling.native_config import native_config
from vlmoe.upcycling.options import Upcycling
from vlmoe.upcycling.report import UpcyclingReport

NOT_GIVEN = "`num_experts_per_tok` is 1 and `norm_topk_prob` is not given"
ONE = {"router_std": 1.0, "router_aux_loss_coef": 0.0}


def gradients(model: Any) -> tuple[float, float]:
    """The norm of the task's gradient on the first router, and that part of it between copies."""
    ids = torch.randint(6, 99, (8, 20), generator=torch.Generator().manual_seed(0))
    model.train().zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    grad = model.model.language_model.layers[0].mlp.router.weight.grad
    copies = grad.view(4, -1, grad.shape[1])
    return float(grad.norm()), float(copies.mean(1).norm())


@pytest.mark.parametrize("init", ["copy", "drop", "noise"])
def test_one_expert_of_several_asks_for_the_choice(
    init: str, dense_model: Callable[..., Any], tmp_path: Path
) -> None:
    dense = dense_model()
    with pytest.raises(ValueError, match=NOT_GIVEN):
        VLMoEForConditionalGeneration.from_dense(dense, 4, 1, expert_init=init)
    with pytest.raises(ValueError, match=NOT_GIVEN):
        native_model(dense, 4, 1, expert_init=init)
    dense.save_pretrained(tmp_path / "dense")
    for target in (None, "vlmoe", "native"):
        with pytest.raises(ValueError, match=NOT_GIVEN):
            options = {"num_experts_per_tok": 1, "target": target, "expert_init": init}
            upcycle(tmp_path / "dense", tmp_path / "sparse", **options)
    assert not (tmp_path / "sparse").exists()


def test_normalized_is_exact_and_scores_are_not_and_the_report_says_so(
    dense_model: Callable[..., Any],
) -> None:
    make = VLMoEForConditionalGeneration.from_dense
    exact = make(dense_model(), 4, 1, norm_topk_prob=True, **ONE)
    report = exact.upcycling_report
    assert report.exactness == "exact" and report.error <= 1e-5
    assert "no gradient of the task (norm_topk_prob=True)" in report.table()
    assert exact.config.text_config.norm_topk_prob is True and gradients(exact)[0] < 1e-6

    learning = make(dense_model(), 4, 1, norm_topk_prob=False, **ONE)
    report = learning.upcycling_report
    assert report.exactness == "not exact" and report.error > 1e-2
    assert "scores scale the experts (norm_topk_prob=False)" in report.table()
    assert learning.config.text_config.norm_topk_prob is False and gradients(learning)[0] > 1e-3


def test_beside_a_shared_expert_scores_are_exact_and_need_no_choice(
    dense_model: Callable[..., Any],
) -> None:
    model = VLMoEForConditionalGeneration.from_dense(dense_model(), 4, 1, expert_init="shared")
    assert model.config.text_config.norm_topk_prob is False
    assert model.upcycling_report.exactness == "exact" and model.upcycling_report.error <= 1e-5


def test_one_copy_in_shards_is_normalized_and_its_router_learns(
    dense_model: Callable[..., Any],
) -> None:
    """The shards of a copy share its weight: within the copy at once, between copies after it."""
    options = ONE | {"expert_split": 2, "router_std": 0.1}
    model = VLMoEForConditionalGeneration.from_dense(dense_model(), 4, 1, **options)
    text = model.config.text_config
    assert (text.num_experts_per_tok, text.norm_topk_prob) == (2, True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    whole, between = gradients(model)
    assert whole > 1e-2 and between < 1e-6 * whole
    optimizer.step()
    whole, between = gradients(model)
    assert whole > 1e-2 and between > 1e-3 * whole


def test_a_layer_of_one_expert_has_nothing_to_choose(dense_model: Callable[..., Any]) -> None:
    model = VLMoEForConditionalGeneration.from_dense(dense_model(), 1, 1)
    assert model.upcycling_report.exactness == "exact" and model.upcycling_report.error <= 1e-5


def test_experts_of_the_tower_ask_for_their_own_choice(dense_model: Callable[..., Any]) -> None:
    fields = {"vision_num_experts": 4, "vision_num_experts_per_tok": 1}
    make, dense = VLMoEForConditionalGeneration.from_dense, dense_model()
    with pytest.raises(ValueError, match="`vision_norm_topk_prob` is not given"):
        make(dense, 4, 2, **fields)
    exact = make(dense, 4, 2, **fields, vision_norm_topk_prob=True).upcycling_report
    assert exact.exactness == "exact" and exact.error <= 1e-5
    scaled = make(dense, 4, 2, **fields, vision_norm_topk_prob=False).upcycling_report
    assert scaled.exactness == "not exact" and scaled.error > 1e-3


@pytest.mark.parametrize("kind", sorted({*LANGUAGE_MODELS} - {"qwen3_vl_text"}))
def test_native_classes_normalize_or_take_the_choice(kind: str) -> None:
    """The reference is each family's own router, asked with drawn tokens."""
    dense = language_config(kind)

    def are_constant(choice: bool) -> set[bool]:
        options = Upcycling(4, 1, norm_topk_prob=choice)
        model = AutoModelForCausalLM.from_config(native_config(dense, options).config)
        return {weight_is_constant(layer) for layer in routed_layers(model)}

    assert are_constant(True) == {True}
    try:
        assert are_constant(False) == {False}
    except ValueError as error:
        assert "always normalize" in str(error) and 'target="vlmoe"' in str(error)
        assert kind not in ("qwen2", "qwen3", "lfm2", "olmo2")


def test_a_native_model_follows_the_choice(tmp_path: Path) -> None:
    dense = native_dense(language_config("qwen3"))
    exact = native_model(dense, 4, 1, norm_topk_prob=True).report
    assert exact.exactness == "exact" and exact.error <= 1e-5
    scaled = native_model(dense, 4, 1, norm_topk_prob=False, router_std=1.0)
    assert scaled.report.exactness == "not exact" and scaled.report.error > 1e-3
    dense.save_pretrained(tmp_path / "dense")
    asked = Upcycling(4, 1, norm_topk_prob=False)
    begin = partial(Conversion.begin, tmp_path / "dense", asked, target="native")
    upcycle_folder(begin, tmp_path / "sparse", {})
    assert UpcyclingReport.load(tmp_path / "sparse").exactness == "not exact"
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    assert saved.config.norm_topk_prob is False


def test_where_the_own_family_always_normalizes_the_target_is_vlmoe(
    dense_model: Callable[..., Any],
) -> None:
    dense = dense_model("llava", "llama")
    problem = "the routers of 'mixtral' always normalize"
    with pytest.raises(ValueError, match=problem):
        native_model(dense, 4, 1, norm_topk_prob=False)
    assert problem in str(native_problem(dense.config, Upcycling(4, 1, norm_topk_prob=False)))
    assert native_problem(dense.config, Upcycling(4, 1, norm_topk_prob=True)) is None

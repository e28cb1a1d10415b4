"""The report measures what it says, and a conversion that is not exact fails."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForImageTextToText

from vlmoe import VLMoEForConditionalGeneration
from vlmoe.upcycling import origins
from vlmoe.upcycling.exactness import UpcyclingError, inputs_for, outputs_of
from vlmoe.upcycling.report import UpcyclingReport
from vlmoe.upcycling.sample import drawn_sample

FAMILIES = ("llava", "llava_siglip", "internvl", "idefics3", "smolvlm")


def test_the_report_says_what_was_done(dense_model: Callable[..., Any], tmp_path: Any) -> None:
    dense = dense_model("llava", "phi3")
    model = VLMoEForConditionalGeneration.from_dense(dense, 4, 2, router_std=1.0, sparse_layers=2)
    report = model.upcycling_report
    assert report.parameters["dense"]["total"] == sum(p.numel() for p in dense.parameters())
    assert report.parameters["sparse"] == model.active_parameters()
    assert report.model_type == "llava" and report.dtype == "float32"
    assert report.sample == {"rows": 3, "images": 3, "tokens": report.sample["tokens"]}
    assert report.same_argmax == 1.0 and report.stored_dtype is None
    assert report.frozen == model.model.unused_vision_parameters != []
    tensors = {tensor["name"]: tensor for tensor in report.tensors}
    assert set(tensors) == set(model.state_dict())
    layer = "model.language_model.layers.1"
    fused = f"{layer}.mlp.gate_up_proj.weight"
    assert tensors[f"{layer}.mlp.experts.gate_up_proj"] == {
        "name": f"{layer}.mlp.experts.gate_up_proj",
        "shape": [4, 80, 32],
        "kind": "repeated",
        "sources": [fused, fused],
    }
    assert tensors[f"{layer}.mlp.router.weight"]["kind"] == "new"
    assert tensors["model.language_model.layers.0.mlp.up_proj.weight"]["kind"] == "copied"
    model.save_pretrained(tmp_path)
    assert UpcyclingReport.load(tmp_path) == report
    rows = dict(line.split("  ", 1) for line in report.table().splitlines())
    rows = {name: value.strip() for name, value in rows.items()}
    assert rows["error in fp32"] == f"{report.error:.1e}, same next token 100.00%"
    assert rows["tensors"] == f"{len(tensors) - 3} copied, 1 new, 2 repeated"


def test_the_loss_at_step_0_is_the_cross_entropy_of_the_text(
    dense_model: Callable[..., Any],
) -> None:
    dense = dense_model()
    model = VLMoEForConditionalGeneration.from_dense(dense, 4, 2, router_aux_loss_coef=0.0)
    sample = drawn_sample(dense, model.config, with_images=True)
    labels = sample["input_ids"].clone()
    labels[(labels == 5) | (sample["attention_mask"] == 0)] = -100
    with torch.no_grad():
        expected = model(**sample, labels=labels).loss.item()
    assert model.upcycling_report.loss["sparse"] == pytest.approx(expected, abs=1e-5)
    assert model.upcycling_report.loss["dense"] == pytest.approx(expected, abs=1e-4)


def _break_transposed(monkeypatch: Any) -> None:
    made = origins._shard_of_down
    monkeypatch.setattr(
        origins, "_shard_of_down", lambda down, m, shard: made(down.T.reshape(32, 40), m, shard)
    )


def _break_factor(monkeypatch: Any) -> None:
    made = origins._shard_of_down
    monkeypatch.setattr(origins, "_shard_of_down", lambda *given: made(*given) / given[1])


def _break_ties(monkeypatch: Any) -> None:
    monkeypatch.setattr(
        torch.Tensor, "repeat_interleave", lambda rows, m, dim: torch.randn(len(rows) * m, 32)
    )


@pytest.mark.parametrize("break_it", [_break_transposed, _break_factor, _break_ties])
def test_a_wrong_conversion_fails(
    break_it: Callable[[Any], None], dense_model: Callable[..., Any], monkeypatch: Any
) -> None:
    break_it(monkeypatch)
    with pytest.raises(UpcyclingError, match="differ from the dense model's by"):
        VLMoEForConditionalGeneration.from_dense(
            dense_model(), 4, 2, expert_split=4, router_std=1.0
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_half_precision_is_checked_in_fp32_and_beside_the_dense_models_own_rounding(
    family: str, dtype: torch.dtype, dense_model: Callable[..., Any], tmp_path: Any
) -> None:
    dense_model(family).save_pretrained(tmp_path)
    dense = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=dtype)
    model = VLMoEForConditionalGeneration.from_dense(dense, 4, 2, router_std=1.0)
    report = model.upcycling_report
    assert model.dtype == dense.dtype == dtype
    assert report.error <= 1e-5
    rounding = report.stored_dtype["dense_rounding"]
    assert rounding > 1e-4 and report.stored_dtype["error"] <= 3 * rounding

    # The fp32 computation is that of a copy whose weights are all in fp32.
    sample = drawn_sample(dense, model.config, with_images=True)
    model.set_experts_implementation("eager")
    for each in (dense, model):
        inputs = inputs_for(each, sample)
        computed = outputs_of(each, inputs, in_fp32=True)
        each.save_pretrained(tmp_path / "half")
        wide = type(each).from_pretrained(tmp_path / "half", dtype=torch.float32)
        assert outputs_of(wide, inputs, in_fp32=False).error(computed) <= 1e-6


@torch.no_grad()
def test_a_sample_of_ones_own_is_what_is_compared(dense_model: Callable[..., Any]) -> None:
    dense = dense_model()
    ids = torch.arange(6, 18)[None]
    sample = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    model = VLMoEForConditionalGeneration.from_dense(dense, 4, 2, sample=sample)
    report = model.upcycling_report
    assert report.sample == {"rows": 1, "images": 0, "tokens": 12}
    expected = F.cross_entropy(dense(ids).logits[0, :-1], ids[0, 1:]).item()
    assert report.loss["dense"] == pytest.approx(expected, abs=1e-6)

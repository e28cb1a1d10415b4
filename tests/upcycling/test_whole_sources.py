"""A dense model is whole, and holds numbers, or it is not converted."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tampering import Tensors, tamper
from transformers import ViTConfig, ViTForImageClassification

from vlmoe import VLMoEForConditionalGeneration

PART = "layers.1.mlp.up_proj.weight"


def name_of(folder: Path, part: str) -> str:
    """The tensor whose name has this part."""
    return next(name for name in load_file(folder / "model.safetensors") if part in name)


def drop(weights: Tensors, name: str) -> None:
    del weights[name]


def add(weights: Tensors, name: str) -> None:
    weights[name.replace("layers.1", "layers.9")] = weights[name].clone()


def reshape(weights: Tensors, name: str) -> None:
    weights[name] = weights[name][:-1].clone()


def no_number(weights: Tensors, name: str) -> None:
    weights[name][0, 1] = float("nan")


DAMAGES = {
    drop: r"1 missing \(.*layers\.1\.mlp\.up_proj\.weight\)",
    add: r"1 unexpected \(.*layers\.9\.mlp\.up_proj\.weight\)",
    reshape: r"1 of another shape \(.*layers\.1\.mlp\.up_proj\.weight is",
    no_number: r"the tensor .*layers\.1\.mlp\.up_proj\.weight holds NaN",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_dense_model_that_is_not_whole_is_refused(
    dense_model: Callable[..., Any], tmp_path: Path, damage: Any
) -> None:
    dense_model().save_pretrained(tmp_path)
    name = name_of(tmp_path, PART)
    tamper(tmp_path, lambda weights: damage(weights, name), name)
    with pytest.raises(ValueError, match=DAMAGES[damage]):
        VLMoEForConditionalGeneration.from_dense(tmp_path, 4, 2)


def test_a_dense_model_in_memory_holds_numbers(dense_model: Callable[..., Any]) -> None:
    dense = dense_model()
    with torch.no_grad():
        dense.get_input_embeddings().weight[7, 2] = float("inf")
    with pytest.raises(ValueError, match=r"embed_tokens\.weight holds NaN or infinite"):
        VLMoEForConditionalGeneration.from_dense(dense, 4, 2)


def test_an_encoder_may_lack_its_pooling_head_and_nothing_else(
    dense_parts: Callable[..., Any], vision_sizes: dict[str, Any], tmp_path: Path
) -> None:
    """Image classifiers are saved without one."""
    _, text = dense_parts()
    ViTForImageClassification(ViTConfig(**vision_sizes)).save_pretrained(tmp_path)
    model = VLMoEForConditionalGeneration.from_vision_text(tmp_path, text, 4, 2)
    assert model.upcycling_report.error <= 1e-5
    name = name_of(tmp_path, "patch_embeddings.projection.weight")
    tamper(tmp_path, lambda weights: drop(weights, name), name)
    with pytest.raises(ValueError, match=r"ViTModel .*1 missing .*projection\.weight"):
        VLMoEForConditionalGeneration.from_vision_text(tmp_path, text, 4, 2)

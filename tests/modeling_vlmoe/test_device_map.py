"""Loading with `dtype="auto"` and through Accelerate's device maps, disk offload included."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

from vlmoe import VLMoEForConditionalGeneration

Inputs = dict[str, torch.Tensor]
Model = VLMoEForConditionalGeneration

load = AutoModelForImageTextToText.from_pretrained


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., Model]) -> Model:
    """Embedding and head are one tensor; some of the tower's layers are unused and frozen."""
    return tiny_model(
        tie_word_embeddings=True, vision_use_last_hidden_state=False, vision_feature_layer=-2
    )


@pytest.fixture(scope="module")
def folder(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The saved model."""
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("memory", [None, 30_000], ids=["all in memory", "connector on disk"])
def test_experts_of_tower_and_connector_give_the_same_features_wherever_they_are(
    tiny_model: Callable[..., Model], tmp_path: Path, memory: int | None
) -> None:
    model = tiny_model(vision_num_experts=5, projector_num_experts=3)
    model.save_pretrained(tmp_path / "model")
    options: dict[str, Any] = {"device_map": "auto", "offload_folder": tmp_path / "offload"}
    if memory:
        options["max_memory"] = {"cpu": memory}
    loaded = load(tmp_path / "model", **options)
    experts = loaded.model.multi_modal_projector.mlp.experts
    assert experts.up_proj.is_meta == bool(memory)
    pixels = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        features = [each.get_image_features(pixels).pooler_output for each in (loaded, model)]
    assert torch.equal(*features)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_auto_is_the_dtype_of_the_saved_weights(
    tiny_model: Callable[..., Model], tmp_path: Path, dtype: torch.dtype
) -> None:
    tiny_model().to(dtype).save_pretrained(tmp_path)
    parameters = load(tmp_path, dtype="auto").parameters()
    assert {parameter.dtype for parameter in parameters} == {dtype}


@pytest.mark.parametrize(
    ("memory", "offloaded"),
    [(None, ()), (170_000, ("language_model.layers.2",)), (60_000, ("language_model",))],
    ids=["all in memory", "last layer on disk", "decoder on disk"],
)
def test_device_map_auto_gives_the_same_logits_and_tokens_wherever_the_weights_are(
    model: Model,
    folder: Path,
    tiny_batch: Callable[..., Inputs],
    tmp_path: Path,
    memory: int | None,
    offloaded: tuple[str, ...],
) -> None:
    options: dict[str, Any] = {"device_map": "auto"}
    if memory:
        options |= {"max_memory": {"cpu": memory}, "offload_folder": tmp_path}
    loaded = load(folder, **options)
    for name in offloaded:
        assert all(p.is_meta for p in loaded.model.get_submodule(name).parameters())
    assert any(p.is_meta for p in loaded.parameters()) == bool(offloaded)
    inputs = tiny_batch(model.config, ["..ab..", "......."])
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    tokens = [m.generate(**inputs, max_new_tokens=4, do_sample=False) for m in (loaded, model)]
    assert torch.equal(*tokens)

"""Experts of a width that grouped_mm refuses are computed by `auto`, in training too."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

from vlmoe import VLMoEForConditionalGeneration
from vlmoe.modeling_vlmoe import experts_auto

EVERYWHERE = {"vision_num_experts": 4, "projector_num_experts": 4}


def gradients(model: Any, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Of one training step."""
    model.train().zero_grad()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    return {n: p.grad.float() for n, p in model.named_parameters() if p.grad is not None}


def implementations(model: Any) -> tuple[str, ...]:
    """Of the decoder, the tower and the connector."""
    parts = model.config.text_config, model.model.vision_tower.config, model.config
    return tuple(part._experts_implementation for part in parts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("width", "chosen"), [(18, "auto"), (20, "auto"), (24, "grouped_mm")])
def test_every_width_trains_in_fp32_and_bf16(
    width: int,
    chosen: str,
    dtype: torch.dtype,
    tiny_model: Callable[..., Any],
    tiny_batch: Callable[..., Any],
) -> None:
    """18: refused in both, 20: in bf16 alone. A model that is made in fp32 becomes bf16."""
    model = tiny_model(text={"moe_intermediate_size": width}).to(dtype)
    assert model.config.text_config._experts_implementation == chosen
    inputs = tiny_batch(model.config, ["..ab.", ".c....", "......."])
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    found = gradients(model, inputs)
    model.set_experts_implementation("eager")
    expected = gradients(model, inputs)
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    assert found.keys() == expected.keys()
    for name, grad in found.items():
        assert (grad - expected[name]).norm() <= tolerance * (expected[name].norm() + 1), name


def test_each_part_takes_auto_for_its_own_sizes(
    tiny_model: Callable[..., Any], tiny_batch: Callable[..., Any]
) -> None:
    even = tiny_model(vision={"intermediate_size": 40}, **EVERYWHERE)
    assert implementations(even) == ("grouped_mm",) * 3
    tower = tiny_model(vision={"intermediate_size": 38}, **EVERYWHERE)
    assert implementations(tower) == ("grouped_mm", "auto", "auto")
    connector = tiny_model(
        vision={"hidden_size": 20}, pixel_shuffle_factor=1, projector_num_experts=4
    )
    assert implementations(connector)[::2] == ("grouped_mm", "auto")
    dense = tiny_model(text={"moe_intermediate_size": 18, "mlp_only_layers": [0, 1, 2]})
    assert implementations(dense)[0] == "grouped_mm"
    inputs = tiny_batch(tower.config, ["..ab.", ".c...."])
    for model in (tower, connector):
        inputs = tiny_batch(model.config, ["..ab.", ".c...."])
        assert gradients(model, inputs)


def test_an_implementation_that_is_asked_for_is_taken(
    tiny_config: Callable[..., Any], tmp_path: Path
) -> None:
    config = tiny_config(text={"moe_intermediate_size": 18})
    model = VLMoEForConditionalGeneration._from_config(config, experts_implementation="batched_mm")
    assert model.config.text_config._experts_implementation == "batched_mm"
    model.save_pretrained(tmp_path)
    for name in ("eager", "batched_mm", "auto"):
        loaded = AutoModelForImageTextToText.from_pretrained(tmp_path, experts_implementation=name)
        assert loaded.config.text_config._experts_implementation == name
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert loaded.config.text_config._experts_implementation == "auto"


def test_the_sizes_are_named_once_when_the_model_is_made(
    tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    messages: list[str] = []
    monkeypatch.setattr(experts_auto.logger, "warning", messages.append)
    experts_auto.logger.warning_once.cache_clear()
    tiny_model()
    assert not messages
    for _ in range(2):
        tiny_model(text={"moe_intermediate_size": 18})
    assert len(messages) == 1 and "rows of 18 numbers" in messages[0]

"""A setting that is changed in a loaded model is the one that it was built with."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

from vlmoe import VLMoEConfig, VLMoEForConditionalGeneration
from vlmoe.routing.balancing import update_router_bias

Inputs = dict[str, torch.Tensor]
Model = Callable[..., VLMoEForConditionalGeneration]

SPARSE = {"vision_num_experts": 4, "projector_num_experts": 4, "multimodal_projector_bias": True}
# (where, field, value before, value after, what else the model has)
CHANGES: list[tuple[str, str, Any, Any, dict[str, Any]]] = [
    ("text", "num_experts_per_tok", 2, 1, {}),
    ("text", "num_experts_per_tok", 2, 4, {}),
    ("text", "norm_topk_prob", True, False, {}),
    ("text", "scoring_func", "softmax", "sigmoid", {}),
    ("text", "routed_scaling_factor", 1.0, 2.5, {}),
    ("text", "n_group", 1, 2, {"topk_group": 1}),
    ("text", "topk_group", 2, 1, {"n_group": 2}),
    (
        "text",
        "modality_experts",
        {"text": [0, 1], "image": [2, 3]},
        {"text": [1, 2, 3], "image": [0, 3]},
        {},
    ),
    ("text", "modality_experts", {"text": [0, 1], "image": [2, 3]}, None, {}),
    ("text", "modality_experts", None, {"text": [0, 1], "image": [2, 3]}, {}),
    ("text", "embedding_multiplier", 1.0, 3.0, {}),
    ("text", "residual_multiplier", 1.0, 0.3, {}),
    ("text", "attention_multiplier", None, 2.0, {}),
    ("text", "logits_scaling", 1.0, 4.0, {}),
    ("text", "sliding_window", 8, 3, {}),
    (
        "text",
        "layer_types",
        ["sliding_attention"] * 3,
        ["full_attention"] * 3,
        {"sliding_window": 3},
    ),
    ("text", "no_rope_layers", [1, 1, 1], [1, 0, 1], {}),
    ("text", "router_aux_loss_coef", 0.001, 0.1, {}),
    ("text", "router_aux_loss_coef", 0.1, 0.0, {}),
    ("text", "router_aux_loss_scope", "sequence", "batch", {"router_aux_loss_coef": 1.0}),
    ("text", "router_z_loss_coef", 0.0, 0.1, {}),
    ("text", "router_local_entropy_coef", None, {"image": 0.1}, {}),
    ("text", "router_global_entropy_coef", {"image": 0.1}, {"text": 0.2}, {}),
    (
        "text",
        "router_global_entropy_experts",
        None,
        {"text": 2},
        {"router_global_entropy_coef": {"text": 0.1}},
    ),
    ("text", "router_bias_update_rate", 0.1, 0.3, {}),
    ("text", "output_router_logits", False, True, {}),
    ("text", "use_cache", True, False, {}),
    ("text", "attention_dropout", 0.0, 1.0, {}),
    ("top", "vision_num_experts_per_tok", 2, 1, SPARSE),
    ("top", "projector_num_experts_per_tok", 2, 3, SPARSE),
    ("top", "image_token_id", 6, 5, {}),
]


def observed(model: VLMoEForConditionalGeneration, inputs: Inputs) -> dict[str, Any]:
    """All that can be seen of a model: outputs, losses, counts, a step of its biases."""
    with torch.no_grad():
        output = model(**inputs)
        seen = {"logits": output.logits, "cache": output.past_key_values is not None}
        seen |= {"router_logits": output.router_logits, "parameters": model.active_parameters()}
        losses = model(**inputs, labels=inputs["input_ids"])
    seen |= {name: losses[name] for name in losses if "loss" in name}
    model.train()
    torch.manual_seed(0)
    training = model(**inputs, labels=inputs["input_ids"])
    seen["training_loss"] = training.loss.detach()
    if model.config.text_config.router_bias_update_rate:
        update_router_bias(model)
        biases = model.model.language_model.named_buffers()
        seen |= {name: bias for name, bias in biases if name.endswith("correction_bias")}
    return seen


@pytest.mark.parametrize(("where", "field", "before", "after", "others"), CHANGES)
def test_a_change_after_loading_is_a_change_before(
    tiny_model: Model,
    tiny_batch: Callable[..., Inputs],
    tmp_path: Path,
    where: str,
    field: str,
    before: Any,
    after: Any,
    others: dict[str, Any],
) -> None:
    given = {field: before} | others
    built = tiny_model(**given) if where == "top" else tiny_model(text=given)
    built.save_pretrained(tmp_path)
    inputs = tiny_batch(built.config, ["..ab.", "......c."])
    if field == "image_token_id":
        inputs["input_ids"] = inputs["input_ids"].masked_fill(inputs["input_ids"] == 6, 5)
    config = VLMoEConfig.from_pretrained(tmp_path)
    setattr(config if where == "top" else config.text_config, field, after)
    expected = VLMoEForConditionalGeneration.from_pretrained(tmp_path, config=config)

    loaded = VLMoEForConditionalGeneration.from_pretrained(tmp_path)
    if field != "image_token_id":
        loaded(**inputs)  # what was computed before must not stay
    setattr(loaded.config if where == "top" else loaded.config.text_config, field, after)
    seen, wanted = observed(loaded, inputs), observed(expected, inputs)
    torch.testing.assert_close(seen, wanted, rtol=0, atol=0)
    if field != "image_token_id":
        unchanged = observed(VLMoEForConditionalGeneration.from_pretrained(tmp_path), inputs)
        with pytest.raises(AssertionError):
            torch.testing.assert_close(unchanged, wanted, rtol=0, atol=0)


BAD: list[tuple[str, Any, dict[str, Any]]] = [
    ("num_experts_per_tok", 5, {}),
    ("num_experts_per_tok", 0, {}),
    ("num_experts_per_tok", 3, {"n_group": 2, "topk_group": 1}),
    ("num_experts_per_tok", 3, {"modality_experts": {"text": [0, 1], "image": [2, 3]}}),
    ("n_group", 3, {}),
    ("topk_group", 3, {"n_group": 2}),
    ("scoring_func", "tanh", {}),
]


@pytest.mark.parametrize(("field", "value", "others"), BAD)
def test_a_change_that_cannot_work_is_refused_at_the_next_call(
    tiny_model: Model,
    tiny_batch: Callable[..., Inputs],
    field: str,
    value: Any,
    others: dict[str, Any],
) -> None:
    model = tiny_model(text=others)
    setattr(model.config.text_config, field, value)
    with pytest.raises(ValueError, match=r"; allowed: "):
        model(**tiny_batch(model.config, ["....."]))


@pytest.mark.parametrize("field", ["vision_num_experts_per_tok", "projector_num_experts_per_tok"])
def test_a_bad_k_of_the_tower_is_refused_at_the_next_image(
    tiny_model: Model, tiny_batch: Callable[..., Inputs], field: str
) -> None:
    model = tiny_model(**SPARSE)
    setattr(model.config, field, 5)
    with pytest.raises(ValueError, match=f"`{field}` is 5; allowed: 1 to"):
        model(**tiny_batch(model.config, ["..a."]))


@pytest.mark.parametrize("auto", [False, True])
def test_from_pretrained_takes_fields_of_the_text_config(
    tiny_model: Model, tmp_path: Path, auto: bool
) -> None:
    tiny_model().save_pretrained(tmp_path)
    model_class = AutoModelForImageTextToText if auto else VLMoEForConditionalGeneration
    given = {"num_experts_per_tok": 1, "router_z_loss_coef": 0.5}
    model = model_class.from_pretrained(tmp_path, **given, dtype=torch.bfloat16)
    for field, value in given.items():
        assert getattr(model.config.text_config, field) == value
        assert field not in vars(model.config)
    assert model.dtype == torch.bfloat16
    assert model.config.text_config.num_experts == 4
    with pytest.raises(ValueError, match="`num_experts_per_tok` is 9; allowed: 1 to"):
        model_class.from_pretrained(tmp_path, num_experts_per_tok=9)

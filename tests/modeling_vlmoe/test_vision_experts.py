"""Experts in tower and connector: against loops in float64, and against the dense model.

The dense model is the same configuration without experts: transformers' own tower, two linears.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, CLIPVisionModel, SiglipVisionModel

from vlmoe import VLMoEConfig, VLMoEForConditionalGeneration
from vlmoe.modeling_vlmoe.vision_experts import VLMoEVisionSparseMoeBlock

Inputs = dict[str, torch.Tensor]
Batch = Callable[..., Inputs]
Model = Callable[..., VLMoEForConditionalGeneration]

IMPLEMENTATIONS = ["eager", "batched_mm", "grouped_mm", "auto"]
TOWERS: dict[str, dict[str, Any]] = {
    "siglip": {},
    "clip": {
        "vision": {"model_type": "clip_vision_model"},
        "vision_feature_select_strategy": "default",
    },
}
EXPERTS = {"vision_num_experts": 5, "projector_num_experts": 3}
WHERE: dict[str, dict[str, Any]] = {
    "all layers and connector": EXPERTS,
    "one layer": {"vision_num_experts": 4, "vision_sparse_layers": [1]},
    "one layer, k 1": {
        "vision_num_experts": 4,
        "vision_num_experts_per_tok": 1,
        "vision_norm_topk_prob": True,
        "vision_sparse_layers": [0],
    },
    "connector, all its experts": {"projector_num_experts": 3, "projector_num_experts_per_tok": 3},
}
WIDTHS = {  # of the connector's experts: in, inner, out
    "wider than the decoder": {"pixel_shuffle_factor": 2},  # 96, 32, 32
    "narrower than the decoder": {"pixel_shuffle_factor": 1},  # 24, 32, 32
    "as wide as the decoder": {"pixel_shuffle_factor": 1, "vision": {"hidden_size": 32}},
}
CHECKPOINTING = {"none": None, "re-entrant": True, "not re-entrant": False}


def block_of(config: VLMoEConfig, place: str, implementation: str) -> VLMoEVisionSparseMoeBlock:
    """The sparse block of the tower's last layer or of the connector, with random weights."""
    model = VLMoEForConditionalGeneration(config)
    model.set_experts_implementation(implementation)
    model = model.model
    block = (
        model.multi_modal_projector.mlp
        if place == "connector"
        else model.vision_tower.encoder.layers[-1].mlp
    )
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(std=0.3)
    return block


def in_float64(block: Any, tokens: torch.Tensor, activation: Any) -> torch.Tensor:
    """Token by token and expert by expert, from the definition."""
    experts, outputs = block.experts, []
    for token in tokens:
        scores = (block.router.weight @ token).softmax(-1)
        best = scores.argsort(descending=True)[: block.router.top_k].tolist()
        weights = scores[best] / scores[best].sum()
        output = torch.zeros(experts.down_proj.shape[1], dtype=torch.float64)
        for weight, e in zip(weights, best, strict=True):
            inner = activation(experts.up_proj[e] @ token + experts.up_proj_bias[e])
            output = output + weight * (experts.down_proj[e] @ inner + experts.down_proj_bias[e])
        outputs.append(output)
    return torch.stack(outputs)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("place", ["tower", *WIDTHS])
def test_a_block_and_its_gradients_equal_a_loop_in_float64(
    tiny_config: Callable[..., VLMoEConfig], place: str, implementation: str
) -> None:
    fields = EXPERTS | {"projector_hidden_act": "silu"} | WIDTHS.get(place, {})
    config = tiny_config(**fields)
    block = block_of(config, "tower" if place == "tower" else "connector", implementation)
    activation = (
        (lambda x: torch.nn.functional.gelu(x, approximate="tanh"))
        if place == "tower"
        else torch.nn.functional.silu
    )
    reference = copy.deepcopy(block).double()
    size_in, size_out = block.experts.up_proj.shape[2], block.experts.down_proj.shape[1]
    assert place == "tower" or size_out == 32
    tokens = torch.randn(2, 7, size_in)  # (tiles, patches, in)
    pull = torch.randn(2, 7, size_out)
    results = []
    for each, dtype in ((block, torch.float32), (reference, torch.float64)):
        inputs = tokens.detach().to(dtype, copy=True).requires_grad_()
        if each is block:
            output, logits = block(inputs)
            assert logits.shape == (2, 7, block.experts.num_experts)
        else:
            output = in_float64(each, inputs.flatten(0, 1), activation).unflatten(0, (2, 7))
        (output * pull.to(dtype)).sum().backward()
        gradients = {name: p.grad for name, p in each.named_parameters()}
        results.append({"output": output, "inputs": inputs.grad, **gradients})
    ours, expected = results
    assert len(ours) == 7
    for name, value in expected.items():
        assert value.abs().max() > 0, name
        difference = (ours[name] - value).abs().max() / value.abs().max()
        assert difference <= 1e-5, f"{name}: {difference:.1e}"


def copy_into_experts(dense: VLMoEForConditionalGeneration, model: Any) -> None:
    """Give `model` the weights of `dense`: experts are copies, routers stay random."""
    weights = dict(dense.state_dict())
    parts = {"up_proj": ("fc1.", "linear_1."), "down_proj": ("fc2.", "linear_2.")}
    for name, parameter in model.state_dict().items():
        before, _, last = name.partition("mlp.experts.")
        if not last or "language_model" in name:
            continue
        in_tower, in_connector = parts[last.removesuffix("_bias")]
        source = f"{before}mlp.{in_tower}" if "vision_tower" in name else f"{before}{in_connector}"
        source += "bias" if last.endswith("_bias") else "weight"
        weights[name] = weights[source].expand_as(parameter)
    weights = {name: tensor for name, tensor in weights.items() if name in model.state_dict()}
    left = model.load_state_dict(weights, strict=False).missing_keys
    assert left and all(name.endswith("mlp.router.weight") for name in left)


def dense_and_sparse(tiny_model: Model, **fields: Any) -> tuple[Any, Any]:
    """A model without vision experts, and one whose experts are copies of its MLPs."""
    dense = tiny_model(**{name: value for name, value in fields.items() if "experts" not in name})
    with torch.no_grad():
        for name, parameter in dense.named_parameters():
            if "vision_tower" in name or "multi_modal" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))  # biases, too
    model = tiny_model(**fields, seed=3)
    copy_into_experts(dense, model)
    return dense, model


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("tower", TOWERS)
@torch.no_grad()
def test_identical_experts_compute_the_dense_model(
    tiny_model: Model, tiny_batch: Batch, tower: str, where: str, implementation: str
) -> None:
    dense, model = dense_and_sparse(tiny_model, **TOWERS[tower], **WHERE[where])
    library = {"siglip": SiglipVisionModel, "clip": CLIPVisionModel}[tower]
    assert type(dense.model.vision_tower) is library
    model.set_experts_implementation(implementation)
    inputs = tiny_batch(model.config, ["..ab.", ".c....", "...."])
    ours, theirs = model(**inputs).logits, dense(**inputs).logits
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()

    pixels = inputs["pixel_values"].flatten(0, 1)
    asked = {"output_hidden_states": True, "output_attentions": True}
    for each in (model, dense):
        each.set_attn_implementation("eager")
    ours, theirs = (each.get_image_features(pixels, **asked) for each in (model, dense))
    assert len(ours.hidden_states) == len(theirs.hidden_states) == 3
    assert len(ours.attentions) == len(theirs.attentions) == 2
    for name in ("last_hidden_state", "pooler_output", "hidden_states", "attentions"):
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-5)

    prompt = tiny_batch(model.config, ["..ab.", ".c...."])
    options = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(**prompt, **options), dense.generate(**prompt, **options))


@pytest.mark.parametrize("tower", TOWERS)
def test_an_implementation_reaches_a_sparse_tower_also_after_a_dense_one(
    tiny_model: Model, tower: str
) -> None:
    for experts in ({}, EXPERTS):
        model = tiny_model(**TOWERS[tower], **experts)
        for implementation in IMPLEMENTATIONS:
            model.set_experts_implementation(implementation)
            chosen = model.config.vision_config._experts_implementation
            assert chosen == implementation or not experts


@pytest.mark.parametrize("layer", [-2, [0, 1]])
def test_by_default_the_layers_that_the_features_pass_through_are_sparse(
    tiny_model: Model, layer: int | list[int]
) -> None:
    features = {"vision_use_last_hidden_state": False, "vision_feature_layer": layer}
    model = tiny_model(vision_num_experts=4, **features).model
    assert [hasattr(each.mlp, "experts") for each in model.vision_tower.encoder.layers] == [
        True,
        False,
    ]


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "negative": ({"vision_num_experts": -1}, "`vision_num_experts` is -1; allowed: 0 or more"),
    "k": (
        {"vision_num_experts": 4, "vision_num_experts_per_tok": 5},
        "`vision_num_experts_per_tok` is 5; allowed: 1 to vision_num_experts=4",
    ),
    "no such layer": (
        {"vision_num_experts": 4, "vision_sparse_layers": [0, 2]},
        "`vision_sparse_layers` is .0, 2.; allowed: layer indices from 0 to 1",
    ),
    "layer twice": (
        {"vision_num_experts": 4, "vision_sparse_layers": [1, 1]},
        "`vision_sparse_layers` is .1, 1.; allowed: .*none twice",
    ),
    "no layer": ({"vision_num_experts": 4, "vision_sparse_layers": []}, "`vision_sparse_layers`"),
    "unused layer": (
        {
            "vision_num_experts": 4,
            "vision_sparse_layers": [1],
            "vision_use_last_hidden_state": False,
            "vision_feature_layer": -2,
        },
        "`vision_sparse_layers` is .1.; allowed: layer indices from 0 to 0, .*pass through 1",
    ),
    "tower": (
        {"vision_num_experts": 4, "vision": {"model_type": "dinov2"}},
        "`vision_num_experts` is 4 for a tower of type 'dinov2'; allowed: 0, or a "
        "`vision_config` of type clip_vision_model, siglip_vision_model",
    ),
    "connector's k": (
        {"projector_num_experts": 1},
        "`projector_num_experts_per_tok` is 2; allowed: 1 to projector_num_experts=1",
    ),
    "one linear": (
        {"projector_num_experts": 4, "projector_num_layers": 1},
        "`projector_num_layers` is 1; allowed: 2 where `projector_num_experts` is 4",
    ),
    "no bias": (
        {"projector_num_experts": 4, "multimodal_projector_bias": False},
        "`multimodal_projector_bias` is False; allowed: True where `projector_num_experts` is 4",
    ),
    "connector negative": ({"projector_num_experts": -2}, "`projector_num_experts` is -2"),
}


@pytest.mark.parametrize(("fields", "message"), WRONG.values(), ids=WRONG)
def test_wrong_fields_are_refused_by_name(
    tiny_config: Callable[..., VLMoEConfig], fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_config(**fields)


def test_without_vision_experts_no_parameter_is_added(tiny_model: Model) -> None:
    model = tiny_model()
    assert type(model.model.vision_tower) is SiglipVisionModel
    names = [name for name, _ in model.model.multi_modal_projector.named_parameters()]
    assert names == ["linear_1.weight", "linear_1.bias", "linear_2.weight", "linear_2.bias"]
    features = model.get_image_features(torch.zeros(1, 3, 16, 16), output_router_logits=True)
    assert set(features) == {"last_hidden_state", "pooler_output"}


@pytest.mark.parametrize("tower", TOWERS)
def test_a_saved_model_loads_in_bfloat16_with_biases_in_float32(
    tiny_model: Model, tiny_batch: Batch, tmp_path: Path, tower: str
) -> None:
    fields = {**TOWERS[tower], **EXPERTS, "text": {"router_bias_update_rate": 0.1}}
    # Kernels for bfloat16 need multiples of 8.
    fields["vision"] = TOWERS[tower].get("vision", {}) | {"intermediate_size": 40}
    model = tiny_model(**fields)
    biases = {n: b for n, b in model.named_buffers() if n.endswith("e_score_correction_bias")}
    assert len(biases) == 3 + 2 + 1
    for bias in biases.values():
        bias.normal_()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    for name, bias in biases.items():
        assert torch.equal(loaded.get_buffer(name), bias), name
    inputs = tiny_batch(model.config, ["..ab."])
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    assert loaded(**inputs).logits.isfinite().all()
    again = AutoModelForImageTextToText.from_config(model.config)
    assert again.state_dict().keys() == model.state_dict().keys()

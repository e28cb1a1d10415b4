"""Experts in int8 through torchao: what it saves and costs, and what is refused.

The size is that of the preset `tiny`: in rows as short as those of the other tests' models the
scales would weigh more than they ever do.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import stored_bytes
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torchao.quantization import FqnToConfig, Int4WeightOnlyConfig, Int8WeightOnlyConfig
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig, TorchAoConfig

from vlmoe import (
    VLMoEConfig,
    VLMoEForConditionalGeneration,
    VLMoETextModel,
    expert_int8_config,
)

Inputs = dict[str, torch.Tensor]
Model = VLMoEForConditionalGeneration

load = AutoModelForImageTextToText.from_pretrained


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., Model]) -> Path:
    """A saved model in bf16 with shared experts, which stay as they are."""
    config = VLMoEConfig.from_preset("tiny")
    config.text_config.num_shared_experts = 1
    config.text_config.pad_token_id = 0
    folder = tmp_path_factory.mktemp("model")
    tiny_model(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def plain(folder: Path) -> Model:
    """The model before quantisation."""
    return load(folder, dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def quantized(folder: Path) -> Model:
    """The model with int8 experts, loaded in one call."""
    return load(folder, dtype=torch.bfloat16, quantization_config=expert_int8_config())


@pytest.fixture
def inputs(plain: Model, tiny_batch: Callable[..., Inputs]) -> Inputs:
    """Text, one image, and two images."""
    return tiny_batch(plain.config, ["........", "...a.....", ".b..c."])


def logits_of(model: Model, inputs: Inputs) -> torch.Tensor:
    """(real tokens, vocab), fp32."""
    with torch.no_grad():
        return model(**inputs).logits[inputs["attention_mask"].bool()].float()


def expert_bytes(model: Model) -> int:
    """Bytes of all experts."""
    return sum(stored_bytes(p) for name, p in model.named_parameters() if ".experts." in name)


def test_int8_experts_take_at_most_55_percent_of_the_bytes_of_bf16(
    plain: Model, quantized: Model
) -> None:
    numbers = sum(p.numel() for name, p in plain.named_parameters() if ".experts." in name)
    assert expert_bytes(plain) == 2 * numbers
    assert expert_bytes(quantized) <= 0.55 * expert_bytes(plain)


def test_nothing_but_the_experts_is_quantized(plain: Model, quantized: Model) -> None:
    before = dict(plain.named_parameters())
    for name, parameter in quantized.named_parameters():
        assert is_traceable_wrapper_subclass(parameter) == (".experts." in name), name
        if ".experts." not in name:
            assert torch.equal(parameter, before[name]), name


def chosen_experts(model: Model, inputs: Inputs) -> torch.Tensor:
    """(real tokens, sparse layers, k): the experts of each token, in ascending order."""
    with torch.no_grad():
        router_logits = model(**inputs, output_router_logits=True).router_logits
    k = model.config.text_config.num_experts_per_tok
    chosen = [logits.topk(k).indices.sort().values for logits in router_logits]
    return torch.stack(chosen, dim=1)[inputs["attention_mask"].flatten().bool()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_logits_of_tokens_that_keep_their_experts_stay_within_two_percent_of_the_largest(
    folder: Path, tiny_batch: Callable[..., Inputs], dtype: torch.dtype
) -> None:
    """A token between two experts may go to the other one, and then differs by what they differ."""
    models = [
        load(folder, dtype=dtype),
        load(folder, dtype=dtype, quantization_config=expert_int8_config()),
    ]
    rows = ["." * 70, "..a..." + "." * 60, ".b..c." * 10, "." * 30]
    inputs = tiny_batch(models[0].config, rows)
    expected, logits = (logits_of(model, inputs) for model in models)
    before, after = (chosen_experts(model, inputs) for model in models)
    kept = (before == after).all(-1).all(-1)  # (real tokens,)
    assert kept.float().mean() >= 0.95
    difference = (logits - expected).abs()[kept].max()
    assert 0 < difference <= 0.02 * expected.abs().max()


def test_saved_and_loaded_again_the_logits_are_bit_equal(
    quantized: Model, inputs: Inputs, tmp_path: Path
) -> None:
    quantized.save_pretrained(tmp_path)
    saved = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    assert saved < sum(stored_bytes(p) for p in quantized.parameters()) * 1.05
    reloaded = load(tmp_path)
    assert expert_bytes(reloaded) == expert_bytes(quantized)
    assert torch.equal(logits_of(reloaded, inputs), logits_of(quantized, inputs))
    tokens = [m.generate(**inputs, max_new_tokens=4) for m in (quantized, reloaded)]
    assert torch.equal(*tokens)


def test_the_decoder_alone_can_be_quantized(folder: Path, plain: Model, tmp_path: Path) -> None:
    plain.model.language_model.save_pretrained(tmp_path)
    decoder = VLMoETextModel.from_pretrained(tmp_path, quantization_config=expert_int8_config())
    assert expert_bytes(decoder) <= 0.55 * expert_bytes(plain)


def test_experts_of_tower_and_connector_are_quantized_too(
    tiny_model: Callable[..., Model], tiny_batch: Callable[..., Inputs], tmp_path: Path
) -> None:
    experts = {"vision_num_experts": 4, "projector_num_experts": 4, "projector_num_layers": 2}
    model = tiny_model(VLMoEConfig.from_preset("tiny", **experts)).to(torch.bfloat16)
    model.config.text_config.pad_token_id = 0
    model.save_pretrained(tmp_path / "plain")
    quantized = load(tmp_path / "plain", quantization_config=expert_int8_config())
    for name, parameter in quantized.named_parameters():
        is_weight = ".experts." in name and not name.endswith("_bias")
        assert is_traceable_wrapper_subclass(parameter) == is_weight, name
    quantized.save_pretrained(tmp_path / "int8")
    pixels = tiny_batch(model.config, ["..a.."])["pixel_values"].flatten(0, 1)
    both = []
    for implementation in ("auto", "eager"):
        quantized.set_experts_implementation(implementation)
        both.append(quantized.get_image_features(pixels).pooler_output[0].float())
    assert (both[0] - both[1]).norm() <= 0.02 * both[1].norm()
    reloaded, inputs = load(tmp_path / "int8"), tiny_batch(model.config, ["..a..", ".b..c."])
    features, expected = (
        each.get_image_features(inputs["pixel_values"].flatten(0, 1)).pooler_output.float()
        for each in (reloaded, model)
    )
    difference = (features - expected).norm()
    assert 0 < difference <= 0.05 * expected.norm()
    assert torch.equal(logits_of(reloaded, inputs), logits_of(quantized, inputs))
    with pytest.raises(ValueError, match="allowed: 'eager'"):
        quantized.set_experts_implementation({"vision_config": "grouped_mm"})
    only_decoder = FqnToConfig({r"re:.*language_model.*experts\..*": Int8WeightOnlyConfig()})
    with pytest.raises(ValueError, match=r"left .*vision_tower.*experts\.up_proj unquantized"):
        load(tmp_path / "plain", quantization_config=TorchAoConfig(only_decoder))


@pytest.mark.parametrize(
    "config",
    [
        TorchAoConfig(Int8WeightOnlyConfig()),
        BitsAndBytesConfig(load_in_4bit=True),
        BitsAndBytesConfig(load_in_8bit=True),
    ],
    ids=["torchao int8", "bitsandbytes 4 bit", "bitsandbytes 8 bit"],
)
def test_a_config_that_knows_linear_layers_only_is_refused_before_loading(config: Any) -> None:
    with pytest.raises(ValueError, match=r"quantizes no experts.*expert_int8_config"):
        VLMoEForConditionalGeneration.from_pretrained("no such folder", quantization_config=config)


@pytest.mark.parametrize(
    "pattern", [r"re:.*experts\.gate_up_proj", r"re:.*layers\.0\.mlp\.experts\..*", r"re:.*q_proj"]
)
def test_a_config_that_leaves_some_experts_unquantized_is_refused(
    folder: Path, pattern: str
) -> None:
    config = TorchAoConfig(FqnToConfig({pattern: Int8WeightOnlyConfig()}))
    with pytest.raises(ValueError, match=r"left .*experts.*unquantized.*expert_int8_config"):
        load(folder, quantization_config=config)


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
def test_an_implementation_that_cannot_multiply_quantized_experts_is_refused(
    folder: Path, quantized: Model, plain: Model, implementation: str
) -> None:
    refused = rf"{implementation}.*allowed: 'eager'"
    choice = {"experts_implementation": implementation}
    for from_pretrained in (load, VLMoEForConditionalGeneration.from_pretrained):
        with pytest.raises(ValueError, match=refused):
            from_pretrained(folder, quantization_config=expert_int8_config(), **choice)
    with pytest.raises(ValueError, match=refused):
        quantized.set_experts_implementation(implementation)
    with pytest.raises(ValueError, match=refused):
        quantized.set_experts_implementation({"text_config": implementation})
    assert quantized.get_experts_implementation()["text_config"] == "eager"
    plain.set_experts_implementation(implementation)  # only quantised experts are bound to eager


def test_auto_multiplies_quantized_experts_as_eager_does(
    folder: Path, quantized: Model, inputs: Inputs, tiny_batch: Callable[..., Inputs]
) -> None:
    auto = load(folder, quantization_config=expert_int8_config(), experts_implementation="auto")
    assert auto.get_experts_implementation()["text_config"] == "auto"
    one_token = tiny_batch(auto.config, ["."])
    for each in (inputs, one_token):
        expected, logits = logits_of(quantized, each), logits_of(auto, each)
        assert (logits - expected).norm() <= 0.02 * expected.norm()  # bf16 rounds after each sum


def test_int4_experts_have_no_cpu_kernel_and_do_not_load(folder: Path) -> None:
    config = expert_int8_config()
    config.quant_type = FqnToConfig(
        dict.fromkeys(config.quant_type.fqn_to_config, Int4WeightOnlyConfig(group_size=32))
    )
    with pytest.raises((ImportError, NotImplementedError, RuntimeError)):
        load(folder, dtype=torch.bfloat16, quantization_config=config)

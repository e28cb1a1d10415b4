"""Saving, loading, initialising and resizing: no weight is lost, renamed or left uninitialised."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForImageTextToText
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from vlmoe import VLMoEConfig, VLMoEForConditionalGeneration, VLMoEModel, VLMoETextModel

Inputs = dict[str, torch.Tensor]
Batch = Callable[..., Inputs]
Model = Callable[..., VLMoEForConditionalGeneration]

# Every kind of module: dense and sparse layers, shared experts, biases, and all norms.
EVERYTHING: dict[str, Any] = {
    "text": {
        "mlp_only_layers": [1],
        "num_shared_experts": 1,
        "qkv_bias": True,
        "o_bias": True,
        "qk_norm": True,
    },
    "projector_layer_norm": True,
}
TIED_IN_TEXT = {**EVERYTHING, "text": EVERYTHING["text"] | {"tie_word_embeddings": True}}
TYING = {
    "untied": EVERYTHING,
    "tied at the top": {**EVERYTHING, "tie_word_embeddings": True},
    "tied in the text config": TIED_IN_TEXT,
}
NO_CLASS_TOKEN = {"vision_feature_select_strategy": "default"}
TOWERS = {
    "siglip": {},
    "siglip with its head": {"vision": {"vision_use_head": True}},
    "clip": {"vision": {"model_type": "clip_vision_model"}, **NO_CLASS_TOKEN},
    "dinov2": {"vision": {"model_type": "dinov2"}, **NO_CLASS_TOKEN},
    "vit": {"vision": {"model_type": "vit"}, **NO_CLASS_TOKEN},
}
EXPERTS = {"vision_num_experts": 5, "vision_sparse_layers": [1], "projector_num_experts": 3}
TOWERS |= {f"{tower} with experts": TOWERS[tower] | EXPERTS for tower in ("siglip", "clip")}
SHARDS = {"one file": "5GB", "sharded": "40KB"}


def logits_of(model: VLMoEForConditionalGeneration, tiny_batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        return model(**tiny_batch(model.config, ["..ab.", "...."])).logits


def assert_same_weights(model: torch.nn.Module, reference: torch.nn.Module) -> None:
    """Parameters and buffers, saved or not, name by name and bit by bit."""
    for kind in ("named_parameters", "named_buffers"):
        ours, expected = dict(getattr(model, kind)()), dict(getattr(reference, kind)())
        assert ours.keys() == expected.keys()
        for name, tensor in expected.items():
            assert ours[name].dtype == tensor.dtype, name
            assert torch.equal(ours[name], tensor), name


def saved_names(folder: Path) -> set[str]:
    names: set[str] = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            names |= set(file.keys())
    return names


@pytest.mark.parametrize("shards", SHARDS)
@pytest.mark.parametrize("tying", TYING)
def test_a_loaded_model_equals_the_saved_one_bit_by_bit(
    tiny_model: Model, tiny_batch: Batch, tmp_path: Path, tying: str, shards: str
) -> None:
    model = tiny_model(**TYING[tying])
    model.save_pretrained(tmp_path, max_shard_size=SHARDS[shards])
    assert (len(list(tmp_path.glob("*.safetensors"))) > 2) == (shards == "sharded")
    loaded, info = VLMoEForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert not loaded.training
    assert_same_weights(loaded, model)
    assert torch.equal(logits_of(loaded, tiny_batch), logits_of(model, tiny_batch))
    tied = loaded.lm_head.weight is loaded.get_input_embeddings().weight
    assert tied == (tying != "untied")


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("tying", ["untied", "tied at the top"])
def test_parameters_are_saved_under_their_in_memory_names(
    tiny_model: Model, tmp_path: Path, tower: str, tying: str
) -> None:
    """Trainer resumes from raw names: what was saved under another name would silently stay out."""
    model = tiny_model(**TYING[tying] | TOWERS[tower])
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    names = set(model.state_dict()) - ({"lm_head.weight"} if "tied " in tying else set())
    assert saved_names(tmp_path) == names
    assert_same_weights(VLMoEForConditionalGeneration.from_pretrained(tmp_path), model)


@pytest.mark.parametrize("name", ["vlmoe", "vlmoe_text", "VLMoEModel", "VLMoETextModel"])
def test_no_checkpoint_conversion_mapping_is_registered(name: str) -> None:
    assert get_checkpoint_conversion_mapping(name) is None
    assert get_checkpoint_conversion_mapping("qwen2_moe") is not None  # the question is well put


def test_auto_classes_load_the_whole_and_its_parts(
    tiny_model: Model, tiny_batch: Batch, tmp_path: Path
) -> None:
    model = tiny_model(**EVERYTHING)
    model.save_pretrained(tmp_path / "whole")
    model.model.language_model.save_pretrained(tmp_path / "text")
    for auto, kind, part, folder in (
        (AutoModelForImageTextToText, VLMoEForConditionalGeneration, model, "whole"),
        (AutoModel, VLMoEModel, model.model, "whole"),
        (AutoModel, VLMoETextModel, model.model.language_model, "text"),
    ):
        loaded = auto.from_pretrained(tmp_path / folder)
        assert type(loaded) is kind
        assert_same_weights(loaded, part)


@pytest.mark.parametrize("dtype", ["auto", torch.bfloat16])
def test_a_model_loads_in_the_dtype_of_its_checkpoint_or_the_one_asked_for(
    tiny_model: Model, tiny_batch: Batch, tmp_path: Path, dtype: Any
) -> None:
    model = tiny_model(**EVERYTHING)
    in_bfloat16 = tiny_model(**EVERYTHING).to(torch.bfloat16)
    (in_bfloat16 if dtype == "auto" else model).save_pretrained(tmp_path)
    loaded = VLMoEForConditionalGeneration.from_pretrained(tmp_path, dtype=dtype)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert loaded.config.text_config.dtype == torch.bfloat16
    for name, parameter in in_bfloat16.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter), name


def test_a_model_loads_with_device_map_auto(
    tiny_model: Model, tiny_batch: Batch, tmp_path: Path
) -> None:
    pytest.importorskip("accelerate")
    model = tiny_model(**EVERYTHING)
    model.save_pretrained(tmp_path)
    loaded = VLMoEForConditionalGeneration.from_pretrained(tmp_path, device_map="auto")
    assert_same_weights(loaded.cpu(), model)
    assert torch.equal(logits_of(loaded, tiny_batch), logits_of(model, tiny_batch))


@pytest.mark.parametrize("tower", TOWERS)
def test_a_model_built_on_meta_and_initialised_has_no_uninitialised_tensor(
    tiny_config: Callable[..., VLMoEConfig], tiny_model: Model, tower: str
) -> None:
    config = tiny_config(**EVERYTHING | TOWERS[tower])
    reference = tiny_model(config)
    with torch.device("meta"):
        model = VLMoEForConditionalGeneration(config)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(torch.nan if tensor.is_floating_point() else -1)
    for module in model.modules():
        module._is_hf_initialized = False
    for parameter in model.parameters():
        parameter._is_hf_initialized = False
    model.initialize_weights()

    for name, buffer in reference.named_buffers():
        assert torch.equal(model.get_buffer(name), buffer), name
    for name, expected in reference.named_parameters():
        parameter = model.get_parameter(name)
        assert parameter.isfinite().all(), name
        constant = bool((expected == expected.flatten()[0]).all())  # norms and biases
        if constant:
            assert torch.equal(parameter, expected), name
        else:
            spread = expected.std().item()
            assert parameter.std().item() == pytest.approx(spread, rel=0.5), name


def test_missing_experts_and_routers_are_reported_and_initialised_and_nothing_else_is(
    tiny_model: Model, tmp_path: Path
) -> None:
    model = tiny_model(**EVERYTHING)
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    removed = {name for name in weights if ".mlp.experts." in name or ".mlp.router." in name}
    assert len(removed) == 6  # two sparse layers, three tensors each
    kept = {name: tensor for name, tensor in weights.items() if name not in removed}
    save_file(kept, file, {"format": "pt"})

    loaded, info = VLMoEForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == removed
    assert not info["unexpected_keys"]
    std = model.config.text_config.initializer_range
    for name, parameter in loaded.named_parameters():
        if name in removed:
            assert parameter.std().item() == pytest.approx(std, rel=0.2), name
            assert abs(parameter.mean().item()) < 0.2 * std, name
            assert not torch.equal(parameter, model.get_parameter(name)), name
        else:
            assert torch.equal(parameter, model.get_parameter(name)), name


@pytest.mark.parametrize("tying", TYING)
def test_resized_embeddings_keep_the_old_tokens(
    tiny_model: Model, tiny_batch: Batch, tmp_path: Path, tying: str
) -> None:
    model = tiny_model(**TYING[tying])
    vocab = model.config.text_config.vocab_size
    inputs = tiny_batch(model.config, ["..ab.", "...."])
    with torch.no_grad():
        expected = model(**inputs).logits
        model.resize_token_embeddings(vocab + 8)
        logits = model(**inputs).logits
    assert model.config.text_config.vocab_size == logits.shape[-1] == vocab + 8
    torch.testing.assert_close(logits[..., :vocab], expected)
    new_token = torch.full((1, 3), vocab + 7)
    model(input_ids=new_token, labels=new_token).loss.backward()
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == (tying != "untied")

    model.save_pretrained(tmp_path)
    assert_same_weights(VLMoEForConditionalGeneration.from_pretrained(tmp_path), model)

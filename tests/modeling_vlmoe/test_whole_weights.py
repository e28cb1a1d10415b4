"""`from_pretrained` refuses weights that are not those of the model, and nothing else."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tampering import BANK, TAMPERED, Tensors, change_json, drop, rename, reshape, tamper
from transformers import AutoModel, AutoModelForImageTextToText, pipeline

from vlmoe import (
    VLMoEConfig,
    VLMoEForConditionalGeneration,
    VLMoEModel,
    VLMoETextModel,
    expert_int8_config,
)

Load = Callable[..., Any]
load = VLMoEForConditionalGeneration.from_pretrained
INT8_SCALE = BANK.replace("gate_up_proj", "_gate_up_proj_scale")


@pytest.fixture
def folder(saved_model: Path, tmp_path: Path) -> Path:
    """A saved model of one's own to break."""
    return shutil.copytree(saved_model, tmp_path / "model")


@pytest.mark.parametrize("kind", TAMPERED)
@pytest.mark.parametrize(
    "loader", [load, AutoModelForImageTextToText.from_pretrained], ids=["class", "auto class"]
)
def test_weights_of_another_model_are_refused(folder: Path, loader: Load, kind: str) -> None:
    change, said = TAMPERED[kind]
    with pytest.raises(ValueError, match=said) as error:
        loader(tamper(folder, change))
    assert str(folder) in str(error.value)


def test_the_model_without_its_head_is_refused_too(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"VLMoEModel .* 1 missing \(language_model\.layers\.1"):
        AutoModel.from_pretrained(tamper(folder, drop))


def test_a_pipeline_does_not_answer(folder: Path) -> None:
    with pytest.raises(ValueError, match="1 missing"):
        pipeline("image-text-to-text", model=str(tamper(folder, drop)))


def test_shards_are_read_as_one(folder: Path) -> None:
    model = load(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    load(folder)
    with pytest.raises(ValueError, match=r"1 missing .*; 1 unexpected"):
        load(tamper(folder, rename))


def test_nothing_is_allocated_for_what_is_missing(folder: Path) -> None:
    """A config that is much bigger than the weights; its model would need 4 TB."""
    config = VLMoEConfig.from_pretrained(folder)
    text = config.text_config.to_dict() | {"num_experts": 100_000, "moe_intermediate_size": 100_000}
    change_json(folder / "config.json", text_config=text)
    with pytest.raises(ValueError, match="9 of another shape"):
        load(folder)


@pytest.mark.parametrize("lost", ["lm_head.weight", "model.language_model.embed_tokens.weight"])
def test_tied_weights_need_one_of_the_two(
    tiny_model: Callable[..., Any], tmp_path: Path, lost: str
) -> None:
    model = tiny_model(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    embedding = model.get_input_embeddings().weight.detach().clone()

    def swap(weights: Tensors) -> None:
        weights.pop("model.language_model.embed_tokens.weight", None)
        weights.pop("lm_head.weight", None)
        kept = {"lm_head.weight", "model.language_model.embed_tokens.weight"} - {lost}
        weights[kept.pop()] = embedding.clone()

    assert torch.equal(load(tamper(tmp_path, swap)).lm_head.weight, embedding)

    def drop_both(weights: Tensors) -> None:
        weights.pop("lm_head.weight", None)
        weights.pop("model.language_model.embed_tokens.weight", None)

    with pytest.raises(ValueError, match="2 missing"):
        load(tamper(tmp_path, drop_both))


def test_an_untied_head_is_needed(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"1 missing \(lm_head\.weight\)"):
        load(tamper(folder, lambda weights: weights.pop("lm_head.weight")))


def test_who_asks_for_the_loading_info_judges_alone(folder: Path) -> None:
    _, info = load(tamper(folder, rename), output_loading_info=True)
    assert info["missing_keys"] == {BANK}
    with pytest.raises(ValueError, match="1 missing"):
        load(folder)


def test_other_shapes_load_where_the_caller_ignores_them(folder: Path) -> None:
    model = load(tamper(folder, reshape), ignore_mismatched_sizes=True)
    assert model.get_parameter(BANK).shape[0] == 4


def test_a_state_dict_of_the_caller_is_the_callers(tiny_config: Callable[..., Any]) -> None:
    assert load(None, config=tiny_config(), state_dict={})


@pytest.mark.parametrize("kind", [VLMoEModel, VLMoETextModel])
def test_parts_load_from_their_own_folders(folder: Path, tmp_path: Path, kind: type) -> None:
    model = load(folder)
    part = model.model if kind is VLMoEModel else model.model.language_model
    part.save_pretrained(tmp_path / "part")
    assert isinstance(AutoModel.from_pretrained(tmp_path / "part"), kind)
    if kind is VLMoEModel:  # the head cannot be made up
        with pytest.raises(ValueError, match=r"1 missing \(lm_head\.weight\)"):
            load(tmp_path / "part")
    else:
        with pytest.raises(ValueError, match=r"VLMoETextModel .* missing"):
            VLMoETextModel.from_pretrained(folder)


def test_quantised_experts(folder: Path, tmp_path: Path) -> None:
    load(folder, quantization_config=expert_int8_config()).save_pretrained(tmp_path / "int8")
    load(tmp_path / "int8")

    def drop_scale(weights: Tensors) -> None:
        del weights[INT8_SCALE]

    with pytest.raises(ValueError, match=rf"1 missing \({BANK}\)"):
        load(tamper(tmp_path / "int8", drop_scale, INT8_SCALE))
    with pytest.raises(ValueError, match=rf"1 missing \({BANK}\)"):
        load(tamper(folder, drop), quantization_config=expert_int8_config())


@pytest.mark.parametrize("place", ["empty", "folder", "dangling link", "foreign"])
@pytest.mark.parametrize("kind", [VLMoEForConditionalGeneration, VLMoEModel, VLMoETextModel])
def test_no_default_model_is_built_in_place_of_a_config(
    folder: Path, kind: Any, place: str
) -> None:
    file = folder / "config.json"
    fields = json.loads(file.read_text())
    file.unlink()
    if place == "folder":
        file.mkdir()
    elif place == "dangling link":
        file.symlink_to(folder / "nowhere.json")
    else:
        fields = {} if place == "empty" else fields | {"model_type": "siglip"}
        file.write_text(json.dumps(fields))
    said = "'siglip'" if place == "foreign" else "None"
    with pytest.raises((ValueError, OSError), match=rf"config\.json(: `model_type` is {said})?"):
        kind.from_pretrained(folder)


@pytest.mark.parametrize(
    ("field", "value", "name"),
    [
        ("router_bias_update_rate", 0.01, "e_score_correction_bias"),
        ("router_modality_bias", True, "modality_bias"),
    ],
)
def test_router_biases_may_be_asked_for_later_but_not_be_lost(
    folder: Path, tmp_path: Path, field: str, value: Any, name: str
) -> None:
    model = load(folder, **{field: value})
    biases = [tensor for key, tensor in model.state_dict().items() if key.endswith(f".{name}")]
    assert biases and not any(bias.any() for bias in biases)

    model.save_pretrained(tmp_path / "with_biases")

    def lose_one(tensors: Tensors) -> None:
        tensors.pop(next(key for key in tensors if key.endswith(f".{name}")))

    with pytest.raises(ValueError, match=rf"1 missing \(.*{name}"):
        load(tamper(tmp_path / "with_biases", lose_one))

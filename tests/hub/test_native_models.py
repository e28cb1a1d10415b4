"""Models of transformers' own families load whole, with their processors, or are refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import picture
from native_processors import tiny_processor
from safetensors.torch import load_file, save_file
from sparse_families import sparse_family
from transformers import (
    AutoProcessor,
    LlavaForConditionalGeneration,
    MixtralForCausalLM,
    Qwen3VLProcessor,
)
from transformers.utils import is_torchvision_available

from vlmoe.hub.saved_model import load_model, read_processor, require_model_source
from vlmoe.training.build import Runtime, build_model, model_for_answers


@pytest.fixture(params=["llava_qwen3_moe", "mixtral"])
def saved(request: Any, tmp_path: Path) -> Path:
    """Make a saved model with its processor."""
    folder = tmp_path / request.param
    sparse_family(request.param).save_pretrained(folder)
    tiny_processor(request.param).save_pretrained(folder)
    return folder


def test_a_native_model_loads_by_its_own_class(saved: Path) -> None:
    require_model_source(saved)
    model, processor = model_for_answers(str(saved), Runtime("cpu", experts_implementation="eager"))
    own = {"mixtral": MixtralForCausalLM}.get(saved.name, LlavaForConditionalGeneration)
    assert type(model) is own and not model.training
    assert model.config.get_text_config()._experts_implementation == "eager"
    assert type(processor) is type(tiny_processor(saved.name)) or saved.name == "mixtral"
    expected = sparse_family(saved.name).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    built, _ = build_model(str(saved), dtype="bfloat16")
    assert built.dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"the config has no field '(text_confg|num_lay)'"):
        wrong: dict[str, object] = {"text_confg": {}} if "llava" in saved.name else {"num_lay": 2}
        build_model(str(saved), model_overrides=wrong)


def test_a_folder_from_before_transformers_5_is_whole(tmp_path: Path) -> None:
    """The image processor had a file of its own, preprocessor_config.json."""
    sparse_family("llava_qwen3_moe").save_pretrained(tmp_path)
    processor = tiny_processor("llava_qwen3_moe")
    processor.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "processor_config.json").read_text())
    own = fields.pop("image_processor")
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(own))
    (tmp_path / "processor_config.json").write_text(json.dumps(fields))
    require_model_source(tmp_path)
    inputs = read_processor(tmp_path)(text="<image>a", images=picture(0), return_tensors="pt")
    expected = processor(text="<image>a", images=picture(0), return_tensors="pt")
    assert torch.equal(inputs["pixel_values"], expected["pixel_values"])
    (tmp_path / "processor_config.json").unlink()
    require_model_source(tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match=r"processor_config\.json: missing"):
        require_model_source(tmp_path)


def test_images_are_taken_where_the_video_part_needs_torchvision(tmp_path: Path) -> None:
    """As saved where torchvision is installed; a copy saved without it is the same."""
    sparse_family("qwen3_vl_moe").save_pretrained(tmp_path)
    tiny = tiny_processor("qwen3_vl_moe")
    tiny.save_pretrained(tmp_path)
    video = {"video_processor_type": "Qwen3VLVideoProcessor", "patch_size": 4, "merge_size": 2}
    file = tmp_path / "processor_config.json"
    own = {"processor_class": "Qwen3VLProcessor", "video_processor": video}
    file.write_text(json.dumps(json.loads(file.read_text()) | own))
    processor = read_processor(tmp_path)
    call = {"text": "<image>a", "images": picture(0), "return_tensors": "pt"}
    expected = tiny(**call)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in processor(**call).items())
    processor.save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / file.name).read_text())
    assert again["processor_class"] == "Qwen3VLProcessor" and isinstance(
        processor, Qwen3VLProcessor
    )
    if not is_torchvision_available():
        with pytest.raises(ImportError, match="orchvision"):
            AutoProcessor.from_pretrained(tmp_path)
        assert again["video_processor"] == video
        (tmp_path / "config.json").rename(tmp_path / "again" / "config.json")
        assert read_processor(tmp_path / "again").video_fields == video


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("gate.weight", r"1 missing \(.*\.mlp\.gate\.weight\)"),
        ("experts.0", "of another shape"),
    ],
)
def test_weights_that_are_missing_are_named(saved: Path, lost: str, message: str) -> None:
    weights = load_file(saved / "model.safetensors")
    del weights[next(name for name in weights if lost in name)]
    save_file(weights, saved / "model.safetensors", {"format": "pt"})
    for load in (load_model, require_model_source):
        with pytest.raises(ValueError, match=message):
            load(saved)
    read_processor(saved)

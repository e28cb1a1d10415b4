"""The named sizes: their parameter counts, as numbers and as counted from a forward pass."""

import pytest
import torch
from torch import nn

from vlmoe import VLMoEConfig, VLMoEForConditionalGeneration
from vlmoe.configuration.configuration_vlmoe import PRESETS
from vlmoe.modeling_vlmoe.sparse_moe import VLMoEExperts

PARAMETERS = {
    "tiny": {"total": 1_476_896, "image_token": 887_072, "text_token": 363_392},
    "small": {"total": 724_341_760, "image_token": 299_668_480, "text_token": 210_921_472},
    "base": {"total": 3_653_057_392, "image_token": 1_010_645_872, "text_token": 579_372_544},
}


def touched(model: VLMoEForConditionalGeneration, modules: set[nn.Module]) -> int:
    """Parameters of `modules`; of experts the k that a token meets, of the embedding its row."""
    text_config, count = model.config.text_config, 0
    for module in modules:
        own = [p for p in module.parameters(recurse=False) if p.requires_grad]
        if isinstance(module, VLMoEExperts):
            count += sum(p[: text_config.num_experts_per_tok].numel() for p in own)
        elif module is model.get_input_embeddings():
            count += own[0][0].numel()
        else:
            count += sum(p.numel() for p in own)
    return count


def test_every_preset_is_counted_here() -> None:
    assert {path.stem for path in PRESETS.glob("*.json")} == set(PARAMETERS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_preset_has_the_parameters_that_a_forward_pass_touches(name: str) -> None:
    with torch.device("meta"):
        model = VLMoEForConditionalGeneration(VLMoEConfig.from_preset(name))
        model.set_experts_implementation("batched_mm")  # the one that runs on the meta device
        size = model.config.vision_config.image_size
        pixel_values = torch.zeros(1, 3, size, size)
        input_ids = torch.zeros(1, 1, dtype=torch.long)
    modules: set[nn.Module] = set()
    for module in model.modules():
        module.register_forward_hook(lambda module, *_: modules.add(module))

    with torch.no_grad():
        model(input_ids)
        text_token = touched(model, modules)
        modules.clear()
        features = model.get_image_features(pixel_values).pooler_output[0]
        model(inputs_embeds=features[None])
        image_token = touched(model, modules)

    total = sum(p.numel() for p in model.parameters())
    counted = {"total": total, "image_token": image_token, "text_token": text_token}
    assert model.active_parameters() == counted
    assert counted == PARAMETERS[name]


def test_a_nested_dict_replaces_single_fields_of_a_preset() -> None:
    plain = VLMoEConfig.from_preset("tiny")
    config = VLMoEConfig.from_preset("tiny", text_config={"num_experts": 4})
    assert config.text_config.to_dict() == plain.text_config.to_dict() | {"num_experts": 4}
    other = VLMoEConfig.from_preset("tiny", vision_config={"model_type": "clip_vision_model"})
    assert other.vision_config.hidden_size != plain.vision_config.hidden_size

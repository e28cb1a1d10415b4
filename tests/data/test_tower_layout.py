"""Image tokens per tile: as many as the vision tower gives features."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModel

from vlmoe.data.tower_layout import image_processor_for, image_seq_length
from vlmoe.processing.processing_vlmoe import VLMoEProcessor

TOWERS = [
    ("siglip_vision_model", {}),
    ("clip_vision_model", {}),
    ("dinov2", {}),
    ("dinov2_with_registers", {"num_register_tokens": 3}),
    ("dinov3_vit", {"num_register_tokens": 2, "num_attention_heads": 3}),
    ("vit", {}),
    ("deit", {}),
    ("beit", {}),
    ("data2vec-vision", {}),
    ("internvl_vision", {}),
    ("ijepa", {}),
    ("vit_msn", {}),
]


@pytest.mark.parametrize(("model_type", "fields"), TOWERS)
def test_image_seq_length_is_the_number_of_features_of_the_tower(tiny_config, model_type, fields):
    vision = {"model_type": model_type, **fields}
    config = tiny_config(vision=vision, pixel_shuffle_factor=1)
    size = config.vision_config.image_size
    side = size if isinstance(size, int) else size[0]
    with torch.device("meta"):
        tower = AutoModel.from_config(config.vision_config)
        features = tower(torch.zeros(1, 3, side, side)).last_hidden_state.shape[1]
    assert image_seq_length(config) == features
    dropped = tiny_config(
        vision=vision, pixel_shuffle_factor=1, vision_feature_select_strategy="default"
    )
    assert image_seq_length(dropped) == features - 1


def test_pixel_shuffle_divides_by_its_square(tiny_config):
    whole, shuffled = tiny_config(pixel_shuffle_factor=1), tiny_config(pixel_shuffle_factor=2)
    assert image_seq_length(whole) == 4 * image_seq_length(shuffled)
    clip = tiny_config(
        vision={"model_type": "clip_vision_model"}, vision_feature_select_strategy="default"
    )
    assert image_seq_length(clip) == image_seq_length(shuffled)


@pytest.mark.parametrize(
    ("vision", "top"),
    [
        ({"model_type": "clip_vision_model"}, {}),
        ({}, {"vision_feature_select_strategy": "default"}),
        ({}, {"pixel_shuffle_factor": 3}),
    ],
)
def test_a_pixel_shuffle_that_does_not_fit_is_refused(tiny_config, vision, top):
    with pytest.raises(ValueError, match=r"`pixel_shuffle_factor` is \d, but a .* tile gives"):
        image_seq_length(tiny_config(vision=vision, **top))


def test_an_image_that_is_no_multiple_of_the_patch_is_refused(tiny_config):
    config = tiny_config(vision={"image_size": 17})
    with pytest.raises(ValueError, match=r"`vision_config.image_size` is 17x17"):
        image_seq_length(config)


def test_a_tower_without_a_size_is_refused(tokenizer):
    tower = SimpleNamespace(model_type="siglip2_vision_model", patch_size=4)
    with pytest.raises(ValueError, match="A siglip2_vision_model tower has no `image_size`; build"):
        VLMoEProcessor.for_config(SimpleNamespace(vision_config=tower), tokenizer)


def test_the_default_image_processor_needs_a_square_and_a_tile(tiny_config):
    vision = tiny_config(vision={"model_type": "internvl_vision", "image_size": [8, 16]})
    with pytest.raises(ValueError, match="is 8x16; the default image processor makes squares"):
        image_processor_for(vision.vision_config, False, 4)
    with pytest.raises(ValueError, match="`max_tiles_per_side` is 0"):
        image_processor_for(tiny_config().vision_config, True, 0)


@pytest.mark.parametrize("model_type", ["clip_vision_model", "dinov2", "siglip_vision_model"])
def test_pixel_statistics_are_those_of_the_tower(tiny_config, model_type):
    from transformers import (
        BitImageProcessorPil,
        CLIPImageProcessorPil,
        SiglipImageProcessorPil,
    )

    reference = {
        "clip_vision_model": CLIPImageProcessorPil,
        "dinov2": BitImageProcessorPil,
        "siglip_vision_model": SiglipImageProcessorPil,
    }[model_type]
    if model_type == "dinov2":
        reference = reference(image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225])
    else:
        reference = reference()
    vision = tiny_config(vision={"model_type": model_type}, pixel_shuffle_factor=1).vision_config
    ours = image_processor_for(vision, False, 4)
    assert tuple(ours.image_mean) == tuple(reference.image_mean)
    assert tuple(ours.image_std) == tuple(reference.image_std)

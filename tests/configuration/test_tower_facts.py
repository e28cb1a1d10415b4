"""The one table of towers beside the towers of transformers."""

import pytest
import torch
from transformers import AutoConfig, AutoModel

from vlmoe.configuration.tower_facts import TOWERS, TOWERS_WITH_EXPERTS, tower_facts
from vlmoe.modeling_vlmoe.vision_experts import SPARSE_TOWERS

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}


def test_towers_with_experts_are_those_that_have_a_sparse_version() -> None:
    assert set(TOWERS_WITH_EXPERTS) == SPARSE_TOWERS.keys()


@pytest.mark.parametrize(
    "model_type", ["clip_vision_model", "deit", "dinov2", "siglip_vision_model"]
)
def test_prefix_tokens_and_fixed_sizes_are_those_of_the_library(model_type: str) -> None:
    config = AutoConfig.for_model(model_type, **SMALL)
    tower = AutoModel.from_config(config).eval()
    facts = tower_facts(config)
    with torch.no_grad():
        features = tower(torch.zeros(1, 3, 16, 16)).last_hidden_state
        assert features.shape[1] == 4 + facts.prefix_tokens
        if facts.has_fixed_size:
            with pytest.raises((ValueError, RuntimeError), match="size"):
                tower(torch.zeros(1, 3, 24, 24))


def test_a_tower_that_is_not_in_the_table_has_the_default_facts() -> None:
    facts = tower_facts(AutoConfig.for_model("pixtral"))
    assert "pixtral" not in TOWERS and facts.prefix_tokens == 0 and not facts.may_have_experts

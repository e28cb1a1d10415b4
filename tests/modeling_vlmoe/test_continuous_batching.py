"""`generate_batch`, transformers' continuous batching, against `generate` of each prompt alone."""

from collections.abc import Callable

import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from vlmoe import VLMoEForConditionalGeneration

Inputs = dict[str, torch.Tensor]
Model = VLMoEForConditionalGeneration

ROWS = ["....", "...........", "......", ".", "........"]
SMALL_CACHE = ContinuousBatchingConfig(num_blocks=24, page_size=4, max_batch_tokens=16)


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., Model]) -> Model:
    """A model with both kinds of attention layers."""
    return tiny_model(
        text={"sliding_window": 5, "layer_types": ["full_attention", "sliding_attention"] * 2}
        | {"num_hidden_layers": 4}
    )


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("experts", ["grouped_mm", "eager"])
def test_text_prompts_get_the_tokens_that_generate_gives_each_alone(
    model: Model, tiny_batch: Callable[..., Inputs], attention: str, experts: str
) -> None:
    model.set_attn_implementation(attention)
    model.set_experts_implementation(experts)
    prompts = [tiny_batch(model.config, [row])["input_ids"] for row in ROWS]
    config = GenerationConfig(max_new_tokens=9, do_sample=False, pad_token_id=0, eos_token_id=7)
    expected = [
        model.generate(ids, generation_config=config)[0, ids.shape[1] :].tolist() for ids in prompts
    ]
    outputs = model.generate_batch(
        [ids[0].tolist() for ids in prompts],
        generation_config=config,
        continuous_batching_config=SMALL_CACHE,
    )
    assert [output.error for output in outputs.values()] == [None] * len(ROWS)
    assert [output.generated_tokens for output in outputs.values()] == expected


def test_prompts_with_images_are_refused(model: Model, tiny_batch: Callable[..., Inputs]) -> None:
    inputs = tiny_batch(model.config, ["....", "..a."])
    with pytest.raises(ValueError, match=r"token ids only.*\[1\].*Use generate\(\)"):
        model.generate_batch(inputs["input_ids"].tolist())
    with pytest.raises(ValueError, match="token ids only"):
        model.generate_batch([[7, 8]], pixel_values=inputs["pixel_values"])

"""torch.export with dynamic sizes: the exported program against the model, at other sizes."""

from collections.abc import Callable

import pytest
import torch
from torch.export import Dim

from vlmoe import VLMoEForConditionalGeneration

Inputs = dict[str, torch.Tensor]
BATCH, LENGTH, TILES = (Dim(name, min=2, max=100) for name in ("batch", "length", "tiles"))
DYNAMIC = {
    "input_ids": {0: BATCH, 1: LENGTH},
    "attention_mask": {0: BATCH, 1: LENGTH},
    "pixel_values": {0: BATCH, 1: TILES},
    "pixel_attention_mask": {0: BATCH, 1: TILES},
}
ROWS = {
    "text": (["....", "......."], ["......", "...", ".........."]),
    "images": (["..ab...", "....c"], ["..a.", "......", "bcd", "..e...f.."]),
}


@pytest.mark.parametrize(
    ("implementation", "prompt"),
    [
        ("grouped_mm", "text"),
        ("grouped_mm", "images"),
        ("batched_mm", "images"),
        ("auto", "images"),
    ],
)
def test_an_exported_program_equals_the_model_at_another_batch_length_and_number_of_tiles(
    tiny_model: Callable[..., VLMoEForConditionalGeneration],
    tiny_batch: Callable[..., Inputs],
    implementation: str,
    prompt: str,
) -> None:
    model = tiny_model(text={"sliding_window": 5, "use_cache": False})
    model.set_experts_implementation(implementation)
    example, others = (
        {name: tensor for name, tensor in tiny_batch(model.config, rows).items() if name in DYNAMIC}
        for rows in ROWS[prompt]
    )
    for name in example:  # every dynamic size is another one
        assert example[name].shape[0] != others[name].shape[0]
        assert example[name].shape[1] != others[name].shape[1]
    with torch.no_grad():
        program = torch.export.export(
            model,
            (),
            kwargs=example,
            dynamic_shapes={name: DYNAMIC[name] for name in example},
        )
        for inputs in (example, others):
            logits = program.module()(**inputs).logits
            torch.testing.assert_close(logits, model(**inputs).logits)

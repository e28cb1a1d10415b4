"""Model and processor converted together: pictures and texts in, the dense model's logits out."""

import copy
from typing import Any

import pytest
import torch
from transformers import (
    CLIPImageProcessorPil,
    GotOcr2ImageProcessorPil,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from vlmoe import VLMoEForConditionalGeneration, VLMoEProcessor

INTERNVL_TOKENS = {
    "context_image_token": "<image>",
    "start_image_token": "<img>",
    "end_image_token": "</img>",
}
TAKEN = ("input_ids", "attention_mask", "pixel_values", "pixel_attention_mask")


def dense_processor(family: str, tokenizer: PreTrainedTokenizerFast) -> Any:
    """The processor of a tiny dense model; a pair where its class cannot be built."""
    if family == "llava":
        image_processor = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=16)
        extra = {"num_additional_image_tokens": 1}
        return LlavaProcessor(image_processor, tokenizer, 4, "default", **extra)
    if family == "internvl":
        tokenizer.add_tokens(list(INTERNVL_TOKENS.values()), special_tokens=True)
        for name, token in INTERNVL_TOKENS.items():
            setattr(tokenizer, name, token)
        return GotOcr2ImageProcessorPil(size={"height": 16, "width": 16}), tokenizer
    tokenizer.add_tokens(["<fake_token_around_image>"], special_tokens=True)
    sizes = {"size": {"longest_edge": 48}, "max_image_size": {"longest_edge": 16}}
    return Idefics3Processor(Idefics3ImageProcessorPil(**sizes), tokenizer, 4)


@pytest.mark.parametrize("family", ["llava", "internvl", "idefics3"])
def test_the_sparse_model_answers_as_the_dense_one_with_its_own_processor(
    family, dense_model, tokenizer, make_image
):
    dense = dense_model(family, vocab_size=400, max_position_embeddings=256)
    theirs = dense_processor(family, copy.deepcopy(tokenizer))
    sparse = VLMoEForConditionalGeneration.from_dense(dense).eval()
    ours = VLMoEProcessor.from_dense(theirs, sparse.config)
    images = [[make_image(0, (40, 20)), make_image(1, (16, 50))], [make_image(2)]]
    text = ["a<image>b<image>c", "<image>what"]
    call = {"images": images, "text": text, "padding": True, "return_tensors": "pt"}
    batch = ours(**call)
    if family == "internvl":  # takes the real tiles of all images
        real = batch["pixel_attention_mask"].flatten(2).any(-1)
        inputs = dict(batch) | {"pixel_values": batch["pixel_values"][real]}
        del inputs["pixel_attention_mask"]
    else:
        flat = {"images": [*images[0], *images[1]]} if family == "llava" else {}
        inputs = dict(theirs(**call | flat))
    with torch.no_grad():
        wanted = dense(**{name: inputs[name] for name in TAKEN if name in inputs}).logits
        logits = sparse(**batch).logits
    real = batch["attention_mask"].bool()
    error = (logits - wanted)[real].abs().max() / wanted[real].abs().max()
    assert error < 1e-5

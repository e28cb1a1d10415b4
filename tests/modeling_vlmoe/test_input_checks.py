"""Inputs whose shapes do not fit each other, or whose images are not those of the image tokens."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from vlmoe import VLMoEForConditionalGeneration

Inputs = dict[str, torch.Tensor]
Batch = Callable[..., Inputs]
Model = Callable[..., VLMoEForConditionalGeneration]

HIDDEN = 32
SEPARATE = {"modality_experts": {"text": [0, 1], "image": [2, 3]}}


@pytest.fixture(scope="module")
def model(tiny_model: Model) -> VLMoEForConditionalGeneration:
    return tiny_model(text=SEPARATE)


def zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.long)


# Of a batch of 2 rows and 9 tokens with 1 tile of (3, 16, 16) each: what is replaced, and what the
# message must say, both shapes among it.
WRONG_SHAPES: dict[str, tuple[Inputs, str]] = {
    "ids of one row without a batch": ({"input_ids": zeros(9)}, "`input_ids` is (9,)"),
    "mask too short": ({"attention_mask": zeros(2, 8)}, "is (2, 8); `input_ids` is (2, 9)"),
    "mask too long": ({"attention_mask": zeros(2, 10)}, "is (2, 10); `input_ids` is (2, 9)"),
    "mask of other rows": ({"attention_mask": zeros(3, 9)}, "is (3, 9); `input_ids` is (2, 9)"),
    "mask of three dimensions": ({"attention_mask": zeros(2, 9, 9)}, "is (2, 9, 9); `input_ids`"),
    "4-D mask of other keys": (
        {"attention_mask": torch.zeros(2, 1, 9, 8)},
        "is (2, 1, 9, 8); `input_ids` is (2, 9)",
    ),
    "4-D mask of other queries": (
        {"attention_mask": torch.zeros(2, 1, 8, 9)},
        "is (2, 1, 8, 9); `input_ids` is (2, 9)",
    ),
    "positions too short": ({"position_ids": zeros(1, 8)}, "is (1, 8); `input_ids` is (2, 9)"),
    "positions of other rows": ({"position_ids": zeros(3, 9)}, "is (3, 9); `input_ids` is (2, 9)"),
    "types too short": ({"mm_token_type_ids": zeros(2, 3)}, "is (2, 3); `input_ids` is (2, 9)"),
    "types of other rows": ({"mm_token_type_ids": zeros(1, 9)}, "is (1, 9); `input_ids` is (2, 9)"),
    "labels too short": ({"labels": zeros(2, 8)}, "`labels` is (2, 8); expected: (2, 9)"),
    "labels of other rows": ({"labels": zeros(1, 9)}, "`labels` is (1, 9); expected: (2, 9)"),
    "pixels of one tile": ({"pixel_values": torch.zeros(3, 16, 16)}, "is (3, 16, 16); expected"),
    "gray pixels": ({"pixel_values": torch.zeros(2, 1, 1, 16, 16)}, "(2, 1, 1, 16, 16); expected"),
    "channels last": (
        {"pixel_values": torch.zeros(2, 1, 16, 16, 3)},
        "(2, 1, 16, 16, 3); expected",
    ),
    "pixels of other rows": (
        {"pixel_values": torch.zeros(1, 1, 3, 16, 16), "pixel_attention_mask": zeros(1, 1, 16, 16)},
        "`pixel_values` is (1, 1, 3, 16, 16), with 1 rows; the tokens have 2",
    ),
    "pixel mask of other tiles": (
        {"pixel_attention_mask": zeros(2, 2, 16, 16)},
        "is (2, 2, 16, 16); `pixel_values` is (2, 1, 3, 16, 16)",
    ),
    "pixel mask of another size": (
        {"pixel_attention_mask": zeros(2, 1, 4, 4)},
        "is (2, 1, 4, 4); `pixel_values` is (2, 1, 3, 16, 16)",
    ),
    "pixel mask of flat tiles": (
        {"pixel_values": torch.zeros(2, 3, 16, 16)},
        "is (2, 1, 16, 16); `pixel_values` is (2, 3, 16, 16)",
    ),
    "index of other rows": (
        {"pixel_values": torch.zeros(2, 3, 16, 16), "image_index": zeros(1, 1)},
        "`image_index` is (1, 1), with 1 rows; the tokens have 2",
    ),
    "index out of range": (
        {"pixel_values": torch.zeros(2, 3, 16, 16), "image_index": torch.tensor([[0], [2]])},
        "holds 2; `pixel_values` is (2, 3, 16, 16): allowed: -1 (none) to 1",
    ),
    "index of padded tiles": ({"image_index": zeros(2, 1)}, "`image_index` is (2, 1); `pixel_val"),
    "pixels of another size": (
        {"pixel_values": torch.zeros(2, 1, 3, 8, 8)},
        "is (2, 1, 3, 8, 8); expected",
    ),
}


@pytest.mark.parametrize("case", WRONG_SHAPES)
def test_shapes_that_do_not_fit_are_refused_with_both(
    model: VLMoEForConditionalGeneration, tiny_batch: Batch, case: str
) -> None:
    replaced, message = WRONG_SHAPES[case]
    inputs = tiny_batch(model.config, ["..a...", "a...."])
    assert inputs["input_ids"].shape == (2, 9)
    if "image_index" in replaced and "pixel_values" in replaced:
        del inputs["pixel_attention_mask"]
    with pytest.raises(ValueError, match=re.escape(message)):
        model(**inputs | replaced)


@pytest.mark.parametrize(
    ("shape", "types", "message"),
    [
        ((1, 5, HIDDEN), (1, 3), "`mm_token_type_ids` is (1, 3); `inputs_embeds` is (1, 5, 32)"),
        ((1, 5, HIDDEN), (1, 7), "`mm_token_type_ids` is (1, 7); `inputs_embeds` is (1, 5, 32)"),
        (
            (1, 5, HIDDEN + 1),
            (1, 5),
            "`inputs_embeds` is (1, 5, 33); expected: (batch, length, 32)",
        ),
        ((5, HIDDEN), (1, 5), "`inputs_embeds` is (5, 32); expected: (batch, length, 32)"),
    ],
)
def test_embeddings_that_do_not_fit_are_refused_with_both_shapes(
    model: VLMoEForConditionalGeneration, shape: tuple[int, ...], types: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        model(inputs_embeds=torch.zeros(shape), mm_token_type_ids=zeros(*types))


def test_the_decoder_alone_refuses_shapes_too(model: VLMoEForConditionalGeneration) -> None:
    decoder = model.model.language_model
    with pytest.raises(ValueError, match=r"`mm_token_type_ids` is \(1, 3\); .* \(1, 5, 32\)"):
        decoder(inputs_embeds=torch.zeros(1, 5, HIDDEN), mm_token_type_ids=zeros(1, 3))
    with pytest.raises(ValueError, match=r"`attention_mask` is \(1, 4\); `input_ids` is \(1, 5\)"):
        decoder(input_ids=zeros(1, 5), attention_mask=zeros(1, 4))


def test_a_mask_must_reach_over_the_cache(
    model: VLMoEForConditionalGeneration, tiny_batch: Batch
) -> None:
    cache = DynamicCache(config=model.config.text_config)
    model(**tiny_batch(model.config, ["....."]), past_key_values=cache, use_cache=True)
    with pytest.raises(ValueError, match=r"\(1, 2\); .* holds 5 tokens; expected: \(1, 7\)"):
        model(zeros(1, 2), attention_mask=zeros(1, 2), past_key_values=cache)
    assert model(zeros(1, 2), attention_mask=zeros(1, 7) + 1, past_key_values=cache).logits.any()


def test_kept_logits_take_kept_labels(tiny_model: Model, tiny_batch: Batch) -> None:
    model = tiny_model(text={"router_aux_loss_coef": 0.0})
    inputs = tiny_batch(model.config, ["......"])
    labels = inputs["input_ids"]
    assert model(**inputs, labels=labels[:, -3:], logits_to_keep=3).loss.isfinite()
    with pytest.raises(ValueError, match=r"`labels` is \(1, 6\).*With `logits_to_keep` shorten"):
        model(**inputs, labels=labels, logits_to_keep=3)


def without_images(inputs: Inputs) -> Inputs:
    return {name: inputs[name] for name in inputs if not name.startswith(("pixel", "image"))}


@pytest.mark.parametrize("embeds", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("way", ["forward", "loss", "generate"])
def test_forgotten_images_are_refused_with_both_counts(
    tiny_model: Model, tiny_batch: Batch, way: str, training: bool, embeds: bool
) -> None:
    model = tiny_model().train(training)
    inputs = without_images(tiny_batch(model.config, ["..a.", "bc..."]))
    labels = inputs["input_ids"]
    if embeds:
        inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids"))
    with pytest.raises(
        ValueError, match=r"12 image tokens \(\[4, 8\] by row\).* 0 features.*pixel_"
    ):
        if way == "generate":
            model.generate(**inputs, max_new_tokens=2)
        else:
            model(**inputs, **{"labels": labels} if way == "loss" else {})


def test_embeddings_that_hold_the_images_already_need_none(
    model: VLMoEForConditionalGeneration, tiny_batch: Batch
) -> None:
    inputs = tiny_batch(model.config, ["..a.", "bc..."])
    merged: list[torch.Tensor] = []
    handle = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: merged.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    expected = model(**inputs).logits
    handle.remove()
    del inputs["input_ids"]
    merged_inputs = without_images(inputs) | {"inputs_embeds": merged[0]}
    torch.testing.assert_close(model(**merged_inputs).logits, expected)


def test_noise_on_embeddings_needs_token_types(
    model: VLMoEForConditionalGeneration, tiny_batch: Batch
) -> None:
    """As NEFTune's hook makes them, which a lookup of one token by the module would break."""
    inputs = tiny_batch(model.config, ["..a.", "bc..."])
    embedding = model.get_input_embeddings()

    def noisy(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output + 1e-3 * output.shape[1]  # an error for less than two dimensions

    handle = embedding.register_forward_hook(noisy)
    try:
        expected = model(**inputs).logits
        inputs["inputs_embeds"] = embedding(inputs.pop("input_ids"))
        torch.testing.assert_close(model(**inputs).logits, expected)
        del inputs["mm_token_type_ids"]
        with pytest.raises(ValueError, match=r"0 image tokens .* noise \(NEFTune\) hides"):
            model(**inputs)
    finally:
        handle.remove()


@pytest.mark.parametrize("fields", [{}, SEPARATE, {"router_modality_bias": True}])
@pytest.mark.parametrize("rows", [["..a.", "bc..."], ["..", "...."]])
def test_prompt_tuning_puts_text_before_the_tokens(
    tiny_model: Model, tiny_batch: Batch, rows: list[str], fields: dict[str, Any]
) -> None:
    from peft import PromptTuningConfig, get_peft_model

    model = tiny_model(text=fields)
    inputs = tiny_batch(model.config, rows, padding="right")
    inputs["labels"] = inputs["input_ids"]
    virtual = 3
    tuned = get_peft_model(
        model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=virtual)
    )
    output = tuned(**inputs)

    prompts = tuned.get_prompt(2)
    embeds = torch.cat([prompts, model.get_input_embeddings()(inputs["input_ids"])], 1)
    padding = {"attention_mask": 1, "mm_token_type_ids": 0, "labels": -100}
    for name, value in padding.items():
        first = torch.full((2, virtual), value)
        inputs[name] = torch.cat([first, inputs[name]], 1)
    del inputs["input_ids"]
    expected = model(inputs_embeds=embeds, **inputs)
    torch.testing.assert_close(output.logits, expected.logits)
    torch.testing.assert_close(output.loss, expected.loss)

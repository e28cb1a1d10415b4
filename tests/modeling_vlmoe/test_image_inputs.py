"""How images reach the decoder: the three forms of pixel inputs, placeholders, and what is refused.

Rows are spelled as in conftest.py: "." is a text token, a letter an image.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector
from transformers.models.internvl.modeling_internvl import InternVLModel

from vlmoe import VLMoEForConditionalGeneration
from vlmoe.modeling_vlmoe.connector import pixel_shuffle

Inputs = dict[str, torch.Tensor]
Batch = Callable[..., Inputs]
Model = Callable[..., VLMoEForConditionalGeneration]

MIXED = ["..a.", "ab.c....", "....", "......a.b", "."]


@pytest.fixture(scope="module")
def model(tiny_model: Model) -> VLMoEForConditionalGeneration:
    return tiny_model(text={"router_z_loss_coef": 0.01})


def logits_of(model: VLMoEForConditionalGeneration, inputs: Inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def gradients_of(model: VLMoEForConditionalGeneration, inputs: Inputs) -> dict[str, torch.Tensor]:
    """Gradients of the loss on all real text tokens."""
    text = (inputs["attention_mask"] == 1) & (inputs["mm_token_type_ids"] == 0)
    model.zero_grad()
    model(**inputs, labels=inputs["input_ids"].masked_fill(~text, -100)).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("images", ["flat", "indexed"])
def test_every_form_of_pixel_inputs_gives_the_same_logits(
    model: VLMoEForConditionalGeneration, tiny_batch: Batch, images: str, padding: str
) -> None:
    padded = tiny_batch(model.config, MIXED, images="padded", padding=padding)
    other = tiny_batch(model.config, MIXED, images=images, padding=padding)
    assert other["pixel_values"].dim() == 4
    torch.testing.assert_close(logits_of(model, other), logits_of(model, padded), rtol=0, atol=1e-5)


def test_shared_images_give_the_gradients_of_repeated_encoding(
    tiny_model: Model, tiny_batch: Batch
) -> None:
    """In float64 except for the router, so that rounding does not blur 1e-6."""
    model = tiny_model(text={"router_z_loss_coef": 0.01}).double().train()
    model.set_experts_implementation("eager")
    repeated = tiny_batch(model.config, MIXED, images="flat")
    shared = tiny_batch(model.config, MIXED, images="indexed")
    assert len(repeated["pixel_values"]) == 6
    assert len(shared["pixel_values"]) == 3
    expected = gradients_of(model, repeated)
    for name, gradient in gradients_of(model, shared).items():
        difference = (gradient - expected[name]).norm()
        assert difference <= 1e-6 * expected[name].norm() + 1e-12, name


def test_image_features_take_the_places_of_placeholders_in_order(
    model: VLMoEForConditionalGeneration, tiny_batch: Batch
) -> None:
    inputs = tiny_batch(model.config, MIXED)
    flat = tiny_batch(model.config, MIXED, images="flat")
    with torch.no_grad():
        tower = model.model.vision_tower(flat["pixel_values"]).last_hidden_state
        features = iter(model.model.multi_modal_projector(tower)[0].flatten(0, 1))
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        for row, tokens in enumerate(inputs["input_ids"].tolist()):
            for position, token in enumerate(tokens):
                if token == model.config.image_token_id:
                    embeds[row, position] = next(features)
        decoded = model.model.language_model(
            inputs_embeds=embeds, attention_mask=inputs["attention_mask"]
        )
        expected = model.lm_head(decoded.last_hidden_state)
    assert next(features, None) is None
    torch.testing.assert_close(logits_of(model, inputs), expected, rtol=0, atol=1e-5)


def test_an_image_elsewhere_or_another_image_changes_the_logits(
    model: VLMoEForConditionalGeneration, tiny_batch: Batch
) -> None:
    inputs = tiny_batch(model.config, ["..ab."], images="flat")
    logits = logits_of(model, inputs)
    swapped = logits_of(model, inputs | {"pixel_values": inputs["pixel_values"].flip(0)})
    assert (swapped - logits)[0, 2:].abs().max() > 0.01
    torch.testing.assert_close(swapped[0, :2], logits[0, :2], rtol=0, atol=1e-5)


@pytest.mark.parametrize("rows", [slice(0, 2), slice(2, 3), slice(1, 4), slice(4, 5)])
@pytest.mark.parametrize("images", ["padded", "indexed"])
def test_rows_sliced_out_of_a_mixed_batch_keep_their_logits(
    model: VLMoEForConditionalGeneration, tiny_batch: Batch, images: str, rows: slice
) -> None:
    inputs = tiny_batch(model.config, MIXED, images=images)
    whole = logits_of(model, inputs)[rows]
    shared = ("pixel_values",) if images == "indexed" else ()
    sliced = {name: value if name in shared else value[rows] for name, value in inputs.items()}
    real = sliced["attention_mask"].bool()
    torch.testing.assert_close(logits_of(model, sliced)[real], whole[real], rtol=0, atol=1e-5)


def test_the_mask_decides_what_is_a_tile_and_not_the_pixels(
    model: VLMoEForConditionalGeneration, tiny_batch: Batch
) -> None:
    black = tiny_batch(model.config, ["..a.", ".b.c"])
    black["pixel_values"][0, 0] = 0.0  # a real tile that is black
    black["pixel_attention_mask"][1, 1, :, 3:] = 0  # a real tile that is smaller than its frame
    flat = {name: value for name, value in black.items() if name != "pixel_attention_mask"}
    flat["pixel_values"] = black["pixel_values"][[0, 1, 1], [0, 0, 1]]
    torch.testing.assert_close(logits_of(model, black), logits_of(model, flat), rtol=0, atol=1e-5)


def test_logits_do_not_depend_on_mm_token_type_ids(
    model: VLMoEForConditionalGeneration, tiny_batch: Batch
) -> None:
    inputs = tiny_batch(model.config, MIXED)
    without = {name: value for name, value in inputs.items() if name != "mm_token_type_ids"}
    assert torch.equal(logits_of(model, inputs), logits_of(model, without))


def test_embeddings_with_placeholders_give_the_logits_of_tokens(
    tiny_model: Model, tiny_batch: Batch
) -> None:
    model = tiny_model()
    with torch.no_grad():  # all tokens share some channels with the placeholder
        model.get_input_embeddings().weight[:, :5] = 0.5
    inputs = tiny_batch(model.config, MIXED)
    expected = logits_of(model, inputs)
    inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids"))
    assert torch.equal(logits_of(model, inputs), expected)


@pytest.mark.parametrize("images", ["padded", "flat", "indexed"])
def test_features_computed_before_give_the_logits_of_pixels(
    model: VLMoEForConditionalGeneration, tiny_batch: Batch, images: str
) -> None:
    inputs = tiny_batch(model.config, MIXED, images=images)
    expected = logits_of(model, inputs)
    names = [n for n in inputs if n.startswith(("pixel", "image"))]
    with torch.no_grad():
        features = model.get_image_features(**{name: inputs.pop(name) for name in names})
    assert features.pooler_output.shape == (6, 4, model.config.text_config.hidden_size)
    torch.testing.assert_close(
        logits_of(model, inputs | {"mm_encoder_outputs": {"image": features}}), expected
    )


@pytest.mark.parametrize(
    "fields", [{}, {"vision_use_last_hidden_state": False, "vision_feature_layer": [-2, 1]}]
)
def test_image_features_come_with_the_outputs_of_the_tower(
    tiny_model: Model, tiny_batch: Batch, fields: dict[str, Any]
) -> None:
    model = tiny_model(**fields)
    model.set_attn_implementation("eager")
    pixels = tiny_batch(model.config, ["a", "b.c"], images="flat")["pixel_values"]
    asked = {"output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        expected = model.model.vision_tower(pixels, **asked)
        outputs = model.get_image_features(pixels, **asked)
        features = model.get_image_features(pixels).pooler_output
    torch.testing.assert_close(outputs.pooler_output, features)
    torch.testing.assert_close(outputs.last_hidden_state, expected.last_hidden_state)
    assert len(outputs.hidden_states) == 3 and len(outputs.attentions) == 2
    torch.testing.assert_close(outputs.hidden_states, expected.hidden_states)
    torch.testing.assert_close(outputs.attentions, expected.attentions)


@pytest.mark.parametrize("keep", [1, 3, [0, 2, 5]])
def test_logits_to_keep_selects_positions(
    model: VLMoEForConditionalGeneration, tiny_batch: Batch, keep: int | list[int]
) -> None:
    inputs = tiny_batch(model.config, MIXED)
    everything = logits_of(model, inputs)
    expected = everything[:, keep] if isinstance(keep, list) else everything[:, -keep:]
    kept = torch.tensor(keep) if isinstance(keep, list) else keep
    torch.testing.assert_close(logits_of(model, inputs | {"logits_to_keep": kept}), expected)


@pytest.mark.parametrize("images", ["padded", "flat", "indexed"])
@pytest.mark.parametrize("embeds", [False, True])
def test_a_wrong_number_of_image_tokens_is_refused_with_both_counts(
    model: VLMoEForConditionalGeneration, tiny_batch: Batch, images: str, embeds: bool
) -> None:
    inputs = tiny_batch(model.config, ["..a.", "bc..."], images=images)
    inputs["input_ids"][1, -1] = model.config.image_token_id
    if embeds:
        inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids"))
    with pytest.raises(ValueError, match=r"13 image tokens \(\[4, 9\] by row\).* 12 features"):
        model(**inputs)


def test_image_tokens_without_any_real_tile_are_refused(
    model: VLMoEForConditionalGeneration, tiny_batch: Batch
) -> None:
    inputs = tiny_batch(model.config, ["..a."])
    inputs["pixel_attention_mask"].zero_()
    with pytest.raises(ValueError, match=r"4 image tokens .* 0 features"):
        model(**inputs)


def test_contradictory_inputs_are_refused(
    model: VLMoEForConditionalGeneration, tiny_batch: Batch
) -> None:
    inputs = tiny_batch(model.config, ["..a."], images="flat")
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        model(**inputs, inputs_embeds=embeds)
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        model(pixel_values=inputs["pixel_values"])
    features = model.get_image_features(inputs["pixel_values"])
    with pytest.raises(ValueError, match="both pixel_values and mm_encoder_outputs"):
        model(**inputs, mm_encoder_outputs={"image": features})


@pytest.mark.parametrize("factor", [1, 2, 3, 4])
def test_pixel_shuffle_equals_a_loop_and_the_permutations_of_idefics3_and_internvl(
    factor: int,
) -> None:
    tiles, side, channels = 2, 6 if factor == 3 else 8, 5
    features = torch.randn(tiles, side * side, channels)
    shuffled = pixel_shuffle(features, factor)

    grid = features.view(tiles, side, side, channels)
    loop = [
        torch.cat([grid[:, r + i, c + j] for i in range(factor) for j in range(factor)], dim=-1)
        for r in range(0, side, factor)
        for c in range(0, side, factor)
    ]
    assert torch.equal(shuffled, torch.stack(loop, dim=1))

    assert torch.equal(shuffled, Idefics3Connector.pixel_shuffle(None, features, factor))
    if factor != 3:  # InternVL divides by 1 / factor, and 1 / 3 is not exact
        internvl = InternVLModel.pixel_shuffle(None, grid, 1 / factor)
        assert torch.equal(shuffled, internvl.reshape(shuffled.shape))


@pytest.mark.parametrize(("patches", "factor"), [(15, 2), (9, 2), (17, 1), (16, 3)])
def test_pixel_shuffle_refuses_a_grid_that_does_not_fit(patches: int, factor: int) -> None:
    with pytest.raises(ValueError, match=f"pixel_shuffle_factor={factor}.* got {patches} patches"):
        pixel_shuffle(torch.zeros(1, patches, 4), factor)

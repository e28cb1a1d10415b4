"""`generate` against loops over the full forward without a cache.

Rows are spelled as in conftest.py: "." is a text token, a letter an image. The window of the
sliding layers is shorter than most prompts and than all outputs.
"""

from collections.abc import Callable

import pytest
import torch
from transformers import Cache, DynamicCache, StaticCache
from transformers.generation import BaseStreamer

from vlmoe import VLMoEForConditionalGeneration
from vlmoe.modeling_vlmoe import modeling_vlmoe

Inputs = dict[str, torch.Tensor]
Batch = Callable[..., Inputs]
Model = Callable[..., VLMoEForConditionalGeneration]

STEPS = 9
WINDOW = 5
ATTENTION = {
    "full": {},
    "sliding": {"sliding_window": WINDOW},
    "mixed": {
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
}
CACHES = {
    "dynamic": {},
    "static": {"cache_implementation": "static"},
    "none": {"use_cache": False},
}
ROWS = {
    "text": ["....", "..........."],
    "one image": ["..a..."],
    "two images": [".ab..", "..cd........"],
    "mixed": ["..", "..a...", "ab.c....", "......a.", "..........."],
}


def generate(
    model: VLMoEForConditionalGeneration, inputs: Inputs, **options: object
) -> tuple[torch.Tensor, torch.Tensor]:
    """New tokens (rows, steps), never a placeholder, and raw logits (rows, steps, vocab)."""
    settings = {
        "max_new_tokens": STEPS,
        "do_sample": False,
        "suppress_tokens": [model.config.image_token_id],
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    output = model.generate(**inputs, **settings | options)
    prompt = inputs["input_ids"].shape[1] if "input_ids" in inputs else 0
    return output.sequences[:, prompt:], torch.stack(output.logits, dim=1)


@torch.no_grad()
def argmax_loop(
    model: VLMoEForConditionalGeneration, inputs: Inputs
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `generate` must equal, for a row without padding: a full forward for every new token."""
    input_ids, all_logits = inputs["input_ids"], []
    for _ in range(STEPS):
        pixel_values = inputs.get("pixel_values")
        logits = model(input_ids=input_ids, pixel_values=pixel_values, use_cache=False).logits[
            :, -1
        ]
        all_logits.append(logits.clone())
        logits[:, model.config.image_token_id] = -torch.inf
        input_ids = torch.cat([input_ids, logits.argmax(-1, keepdim=True)], dim=1)
    return input_ids[:, -STEPS:], torch.stack(all_logits, dim=1)


def argmax_loops(
    model: VLMoEForConditionalGeneration, tiny_batch: Batch, rows: list[str]
) -> tuple[torch.Tensor, torch.Tensor]:
    """`argmax_loop` of each row by itself."""
    alone = [argmax_loop(model, tiny_batch(model.config, [row], images="flat")) for row in rows]
    return torch.cat([tokens for tokens, _ in alone]), torch.cat([logits for _, logits in alone])


@pytest.fixture(scope="module")
def models(tiny_model: Model) -> dict[str, VLMoEForConditionalGeneration]:
    """One model for each kind of attention."""
    return {name: tiny_model(text=fields) for name, fields in ATTENTION.items()}


@pytest.fixture
def model(models: dict[str, VLMoEForConditionalGeneration]) -> VLMoEForConditionalGeneration:
    """The model with both kinds of layers, where one kind does not matter."""
    return models["mixed"].eval()


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("attention", ATTENTION)
def test_greedy_equals_argmax_loops_over_single_rows(
    models: dict[str, VLMoEForConditionalGeneration],
    tiny_batch: Batch,
    attention: str,
    cache: str,
    rows: str,
) -> None:
    model = models[attention]
    expected_tokens, expected_logits = argmax_loops(model, tiny_batch, ROWS[rows])
    tokens, logits = generate(model, tiny_batch(model.config, ROWS[rows]), **CACHES[cache])
    assert torch.equal(tokens, expected_tokens)
    torch.testing.assert_close(logits, expected_logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("attention", ATTENTION)
def test_sampling_with_cache_equals_sampling_without(
    models: dict[str, VLMoEForConditionalGeneration],
    tiny_batch: Batch,
    attention: str,
    cache: str,
) -> None:
    model = models[attention]
    sampled = []
    for options in (CACHES["none"], CACHES[cache]):
        torch.manual_seed(3)
        inputs = tiny_batch(model.config, ROWS["mixed"])
        sampled.append(generate(model, inputs, do_sample=True, top_k=0, **options)[0])
    assert torch.equal(*sampled)


@pytest.mark.parametrize("images", ["padded", "flat", "indexed"])
@pytest.mark.parametrize("rows", [["..", "......."], ["..ab.", ".a....", "..."]])
def test_beams_of_a_batch_equal_beams_of_each_row_without_cache(
    model: VLMoEForConditionalGeneration, tiny_batch: Batch, rows: list[str], images: str
) -> None:
    beams = {
        "num_beams": 3,
        "num_return_sequences": 2,
        "output_scores": True,
        "length_penalty": 0.0,
    }

    def search(
        rows: list[str], images: str, **options: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        inputs = tiny_batch(model.config, rows, images=images)
        output = model.generate(
            **inputs,
            max_new_tokens=STEPS,
            suppress_tokens=[model.config.image_token_id],
            return_dict_in_generate=True,
            **beams,
            **options,
        )
        return output.sequences[:, inputs["input_ids"].shape[1] :], output.sequences_scores

    sequences, scores = search(rows, images)
    alone = [search([row], "flat", use_cache=False) for row in rows]
    assert torch.equal(sequences, torch.cat([tokens for tokens, _ in alone]))
    torch.testing.assert_close(scores, torch.cat([s for _, s in alone]), rtol=0, atol=1e-4)
    assert not torch.equal(sequences[0], sequences[1])  # the beams of a row differ


@pytest.mark.parametrize("images", ["padded", "flat", "indexed"])
def test_each_of_num_return_sequences_equals_a_single_run(
    model: VLMoEForConditionalGeneration, tiny_batch: Batch, images: str
) -> None:
    rows = ["..ab.", "...", ".a...."]
    expected, _ = argmax_loops(model, tiny_batch, rows)
    inputs = tiny_batch(model.config, rows, images=images)
    tokens, _ = generate(model, inputs, do_sample=True, top_k=1, num_return_sequences=3)
    assert torch.equal(tokens, expected.repeat_interleave(3, dim=0))


@pytest.mark.parametrize("row", ["......", ".ab..."])
@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("draft", ["assistant model", "prompt lookup"])
def test_assisted_generation_equals_greedy(
    models: dict[str, VLMoEForConditionalGeneration],
    tiny_model: Model,
    tiny_batch: Batch,
    attention: str,
    row: str,
    draft: str,
) -> None:
    model = models[attention]
    options: dict[str, object] = {"prompt_lookup_num_tokens": 2}
    if draft == "assistant model":
        options = {"assistant_model": tiny_model(text={"num_hidden_layers": 1, "hidden_size": 16})}
    expected, expected_logits = argmax_loops(model, tiny_batch, [row])
    tokens, logits = generate(model, tiny_batch(model.config, [row]), **options)
    assert torch.equal(tokens, expected)
    torch.testing.assert_close(logits, expected_logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("cache_class", [DynamicCache, StaticCache])
@pytest.mark.parametrize("attention", ATTENTION)
def test_a_forward_in_pieces_with_a_cache_equals_the_forward_at_once(
    models: dict[str, VLMoEForConditionalGeneration],
    tiny_batch: Batch,
    attention: str,
    cache_class: type[Cache],
) -> None:
    model = models[attention]
    inputs = tiny_batch(model.config, ["..a........."], images="flat")
    cache_options = {"max_cache_len": 32} if cache_class is StaticCache else {}
    cache = cache_class(config=model.config.text_config, **cache_options)
    with torch.no_grad():
        expected = model(**inputs).logits
        first, *others = inputs["input_ids"].split([7, 1, 1, 4, 2], dim=1)
        pieces = [model(first, inputs["pixel_values"], past_key_values=cache, use_cache=True)]
        pieces += [model(piece, past_key_values=cache, use_cache=True) for piece in others]
    logits = torch.cat([piece.logits for piece in pieces], dim=1)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("attention", ATTENTION)
def test_a_second_turn_continues_from_the_cache_of_the_first(
    models: dict[str, VLMoEForConditionalGeneration], tiny_batch: Batch, attention: str
) -> None:
    model = models[attention]
    inputs = tiny_batch(model.config, ["..ab..."], images="flat")
    no_image = {"suppress_tokens": [model.config.image_token_id], "return_dict_in_generate": True}
    first = model.generate(**inputs, max_new_tokens=STEPS, **no_image)
    question = tiny_batch(model.config, ["...."])["input_ids"]
    whole = {"input_ids": torch.cat([first.sequences, question], dim=1)}
    mask = {"attention_mask": torch.ones_like(whole["input_ids"])}
    tokens, logits = generate(model, whole | mask, past_key_values=first.past_key_values)
    pixels = {"pixel_values": inputs["pixel_values"]}
    expected, expected_logits = argmax_loop(model, whole | pixels)
    assert torch.equal(tokens, expected)
    torch.testing.assert_close(logits, expected_logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("chunk", [2, 3, 7])
@pytest.mark.parametrize("rows", [[".a.."], ["..ab....", "...", "...a."]])
def test_prefill_in_chunks_that_cut_images_equals_prefill_at_once(
    model: VLMoEForConditionalGeneration, tiny_batch: Batch, rows: list[str], chunk: int, cache: str
) -> None:
    expected, expected_logits = argmax_loops(model, tiny_batch, rows)
    inputs = tiny_batch(model.config, rows)
    tokens, logits = generate(model, inputs, prefill_chunk_size=chunk, **CACHES[cache])
    assert torch.equal(tokens, expected)
    torch.testing.assert_close(logits, expected_logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rows", ROWS)
def test_generation_from_embeddings_equals_generation_from_tokens(
    model: VLMoEForConditionalGeneration, tiny_batch: Batch, rows: str
) -> None:
    expected, expected_logits = argmax_loops(model, tiny_batch, ROWS[rows])
    inputs = tiny_batch(model.config, ROWS[rows])
    inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids"))
    tokens, logits = generate(model, inputs)
    assert torch.equal(tokens, expected)
    torch.testing.assert_close(logits, expected_logits, rtol=0, atol=1e-5)


def test_a_streamer_gets_the_prompt_and_then_token_by_token(
    model: VLMoEForConditionalGeneration, tiny_batch: Batch
) -> None:
    class Collect(BaseStreamer):
        def __init__(self) -> None:
            self.pieces: list[torch.Tensor] = []
            self.ended = False

        def put(self, value: torch.Tensor) -> None:
            self.pieces.append(value.flatten())

        def end(self) -> None:
            self.ended = True

    streamer, inputs = Collect(), tiny_batch(model.config, ["..a."])
    tokens, _ = generate(model, inputs, streamer=streamer)
    assert torch.equal(streamer.pieces[0], inputs["input_ids"][0])
    assert [len(piece) for piece in streamer.pieces[1:]] == [1] * STEPS
    assert torch.equal(torch.cat(streamer.pieces[1:]), tokens[0])
    assert streamer.ended


@pytest.mark.parametrize("cache", CACHES)
def test_generation_in_bfloat16_equals_teacher_forcing_in_bfloat16(
    tiny_model: Model, tiny_batch: Batch, cache: str
) -> None:
    model = tiny_model(text=ATTENTION["mixed"]).to(torch.bfloat16)
    inputs = tiny_batch(model.config, ["..ab...."])
    tokens, logits = generate(model, inputs, **CACHES[cache])
    whole = torch.cat([inputs["input_ids"], tokens], dim=1)
    with torch.no_grad():
        forced = model(input_ids=whole, pixel_values=inputs["pixel_values"]).logits[
            :, -STEPS - 1 : -1
        ]
    assert forced.dtype == torch.bfloat16
    assert (forced.float() - logits.float()).norm() < 0.05 * forced.float().norm()


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("attention", ATTENTION)
def test_logits_of_a_batch_equal_those_of_each_row(
    models: dict[str, VLMoEForConditionalGeneration],
    tiny_batch: Batch,
    attention: str,
    padding: str,
) -> None:
    model = models[attention]
    inputs = tiny_batch(model.config, ROWS["mixed"], padding=padding)
    with torch.no_grad():
        batch = model(**inputs).logits
        for i, row in enumerate(ROWS["mixed"]):
            alone = model(**tiny_batch(model.config, [row], images="flat")).logits[0]
            real = batch[i][inputs["attention_mask"][i].bool()]
            torch.testing.assert_close(real, alone, rtol=0, atol=1e-5)


def test_generation_computes_no_router_loss_whatever_output_router_logits_says(
    model: VLMoEForConditionalGeneration, tiny_batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a router loss was computed")

    monkeypatch.setattr(modeling_vlmoe, "decoder_router_losses", refuse)
    monkeypatch.setattr(model.config.text_config, "router_z_loss_coef", 0.1)
    rows = ["..a...", "...."]
    expected, _ = argmax_loops(model, tiny_batch, rows)
    inputs = tiny_batch(model.config, rows)
    assert torch.equal(generate(model, inputs)[0], expected)
    assert torch.equal(generate(model, inputs, output_router_logits=True)[0], expected)
    monkeypatch.setattr(model.config.text_config, "output_router_logits", True)
    assert torch.equal(generate(model, inputs)[0], expected)
    with pytest.raises(AssertionError, match="router loss"):
        model(**inputs, labels=inputs["input_ids"])


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("rows", "options", "calls"),
    [
        (["..ab.", "a..."], {}, 1),
        (["..ab.", "a..."], {"use_cache": False}, 1),
        (["..ab.", "a..."], {"num_beams": 2}, 1),
        (["..ab.", "a..."], {"prefill_chunk_size": 3}, 1),
        (["....", "..."], {}, 0),
        (["....", "..."], {"prefill_chunk_size": 2}, 0),
    ],
)
def test_generation_runs_the_vision_tower_once_and_not_at_all_for_text(
    model: VLMoEForConditionalGeneration,
    tiny_batch: Batch,
    rows: list[str],
    options: dict[str, object],
    calls: int,
    training: bool,
) -> None:
    counted = []
    hook = model.model.vision_tower.register_forward_hook(lambda *_: counted.append(1))
    try:
        generate(model.train(training), tiny_batch(model.config, rows), **options)
        assert len(counted) == calls
        with torch.no_grad():
            model(**tiny_batch(model.config, rows))
        assert len(counted) == 2 * calls
    finally:
        hook.remove()
        model.eval()

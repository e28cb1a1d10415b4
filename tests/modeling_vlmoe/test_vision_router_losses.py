"""Routing in tower and connector in training: losses, notes, checkpointing, compiling.

The references go tile by tile: each tile is encoded alone, and its losses are written out in plain
Python.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from router_bias_runs import loads_by_layer
from torch._dynamo.utils import counters

from vlmoe import VLMoEForConditionalGeneration
from vlmoe.modeling_vlmoe.vision_router_losses import shown_tiles
from vlmoe.routing.balancing import update_router_bias
from vlmoe.routing.finite_checks import check_routing

Inputs = dict[str, torch.Tensor]
Batch = Callable[..., Inputs]
Model = Callable[..., VLMoEForConditionalGeneration]

RATE = 0.05
TEXT = {
    "num_hidden_layers": 2,
    "router_aux_loss_coef": 0.5,
    "router_z_loss_coef": 0.25,
    "router_bias_update_rate": RATE,
}
EXPERTS = {"vision_num_experts": 5, "projector_num_experts": 3, "projector_num_experts_per_tok": 1}
CLIP = {
    "vision": {"model_type": "clip_vision_model"},
    "vision_feature_select_strategy": "default",
}
MODELS: dict[str, dict[str, Any]] = {
    "siglip": EXPERTS,
    "clip": EXPERTS | CLIP,
    "one layer": {"vision_num_experts": 4, "vision_sparse_layers": [1]},
    "connector": {"projector_num_experts": 3},
}
ROWS = ["..ab...", ".a.", ".....", "c....a.."]
IMAGES = ["padded", "flat", "indexed"]
CHECKPOINTING = {"none": None, "re-entrant": True, "not re-entrant": False}


def labelled(inputs: Inputs) -> Inputs:
    text = (inputs["attention_mask"] == 1) & (inputs["mm_token_type_ids"] == 0)
    return inputs | {"labels": inputs["input_ids"].masked_fill(~text, -100)}


def row_weights(inputs: Inputs) -> list[float]:
    """The rows' shares of the label tokens."""
    labels = (inputs["labels"][:, 1:] != -100).sum(-1)
    return (labels / labels.sum()).tolist()


def gradients(model: torch.nn.Module) -> Inputs:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def logits_of_tile(model: Any, letter: str, tiny_batch: Batch) -> list[list[torch.Tensor]]:
    """(patches, experts) of one image alone: for each sparse layer of the tower, of the connector.

    The class token, which the decoder does not see, is among the patches.
    """
    pixels = tiny_batch(model.config, [letter], "flat")["pixel_values"]
    logits = model.get_image_features(pixels, output_router_logits=True).router_logits
    logits = [each[0] for each in logits]
    has_connector = bool(model.config.projector_num_experts)
    return [logits[: len(logits) - has_connector], logits[len(logits) - has_connector :]]


def switch_loss(logits: torch.Tensor, k: int) -> torch.Tensor:
    """Switch Transformer's loss of one tile, from its definition."""
    tokens, experts = logits.shape
    probabilities, total = logits.softmax(-1), torch.zeros(())
    for expert in range(experts):
        sent = sum(expert in row.topk(k).indices.tolist() for row in logits)
        total = total + sent / tokens * probabilities[:, expert].mean()
    return experts * total


def expected_vision_losses(
    model: Any, weights: list[float], tiny_batch: Batch
) -> tuple[torch.Tensor, torch.Tensor]:
    """Load balancing loss and z-loss of tower plus connector, tile by tile."""
    k = model.config.vision_num_experts_per_tok, model.config.projector_num_experts_per_tok
    aux, z = torch.zeros(()), torch.zeros(())
    for row, weight in zip(ROWS, weights, strict=True):
        letters = row.replace(".", "")
        for letter in letters:
            for layers, top_k in zip(logits_of_tile(model, letter, tiny_batch), k, strict=True):
                for logits in layers:
                    share = weight / len(letters) / len(layers)
                    aux = aux + share * switch_loss(logits, top_k)
                    z = z + share * logits.logsumexp(-1).square().mean()
    return aux, z


@pytest.mark.parametrize("images", IMAGES)
@pytest.mark.parametrize("name", MODELS)
def test_the_losses_are_those_of_decoder_tower_and_connector_added(
    tiny_model: Model, tiny_batch: Batch, name: str, images: str
) -> None:
    model = tiny_model(text=TEXT, **MODELS[name]).train()
    inputs = labelled(tiny_batch(model.config, ROWS, images))
    output = model(**inputs, output_router_logits=True)
    tiles, places = len(inputs["pixel_values"].flatten(0, -4)), output.vision_router_logits
    if images == "padded":
        tiles = int(inputs["pixel_attention_mask"].flatten(2).any(-1).sum())
    assert {len(logits) for logits in places} == {tiles}
    config = model.config
    has_connector = bool(config.projector_num_experts)
    assert len(places) == has_connector + sum(map(config.is_sparse_vision_layer, range(2)))

    weights = row_weights(inputs)
    of_decoder = model.router_losses(
        output.router_logits, inputs["attention_mask"].bool(), torch.tensor(weights)
    )
    aux, z = expected_vision_losses(model, weights, tiny_batch)
    assert aux > 0 and z > 0
    torch.testing.assert_close(output.aux_loss, of_decoder.aux_loss + aux)
    torch.testing.assert_close(output.z_loss, of_decoder.z_loss + z)
    cross_entropy = model.loss_function(
        output.logits,
        inputs["labels"],
        vocab_size=config.text_config.vocab_size,
        num_items_in_batch=(inputs["labels"][:, 1:] != -100).sum(),
    )
    expected = cross_entropy + of_decoder.total + 0.5 * aux + 0.25 * z
    torch.testing.assert_close(output.loss, expected)

    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    ours = torch.autograd.grad(output.loss, parameters.values(), retain_graph=True)
    theirs = torch.autograd.grad(expected, parameters.values())
    for parameter, gradient, reference in zip(parameters, ours, theirs, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-6, msg=parameter)


def test_text_only_rows_add_nothing_to_the_losses(tiny_model: Model, tiny_batch: Batch) -> None:
    model = tiny_model(text=TEXT, **EXPERTS).train()
    inputs = labelled(tiny_batch(model.config, ["....", "..."]))
    output = model(**inputs, output_router_logits=True)
    of_decoder = model.router_losses(
        output.router_logits, inputs["attention_mask"].bool(), torch.tensor(row_weights(inputs))
    )
    assert torch.equal(output.aux_loss, of_decoder.aux_loss)
    output.loss.backward()
    in_vision = {
        n: p for n, p in model.named_parameters() if "language" not in n and "lm_" not in n
    }
    assert any("router" in name for name in in_vision)
    assert all(p.grad is not None and not p.grad.any() for p in in_vision.values())
    tile_loads = [load for name, load in loads_by_layer(model).items() if "language" not in name]
    assert len(tile_loads) == 3
    assert not any(load.any() for load in tile_loads)


@pytest.mark.parametrize("images", ["padded", "indexed"])
def test_in_scope_batch_all_tiles_are_one_row(
    tiny_model: Model, tiny_batch: Batch, images: str
) -> None:
    text = TEXT | {"router_aux_loss_scope": "batch", "router_bias_update_rate": 0.0}
    model = tiny_model(text=text, **EXPERTS).train()
    inputs = labelled(tiny_batch(model.config, ROWS, images))
    output = model(**inputs, output_router_logits=True)
    weights = row_weights(inputs)
    of_decoder = model.router_losses(
        output.router_logits, inputs["attention_mask"].bool(), torch.tensor(weights)
    )
    letters = "".join(ROWS).replace(".", "")
    of_tiles = [logits_of_tile(model, letter, tiny_batch) for letter in letters]
    share = sum(w for w, row in zip(weights, ROWS, strict=True) if row.strip("."))
    expected = of_decoder.aux_loss
    for place, k in enumerate((2, 1)):
        for i in range(len(of_tiles[0][place])):
            together = torch.cat([tile[place][i] for tile in of_tiles])
            expected = expected + share * switch_loss(together, k) / len(of_tiles[0][place])
    torch.testing.assert_close(output.aux_loss, expected)


@pytest.mark.parametrize("images", IMAGES)
def test_the_bias_follows_a_plain_count_of_the_tiles_that_rows_show(
    tiny_model: Model, tiny_batch: Batch, images: str
) -> None:
    model = tiny_model(text=TEXT, **EXPERTS).train()
    inputs = labelled(tiny_batch(model.config, ROWS, images))
    expected = [[0] * experts for experts in (5, 5, 3)]
    for letter in "".join(ROWS).replace(".", ""):
        layers = [*logits_of_tile(model, letter, tiny_batch)]
        for counts, logits, k in zip(expected, [*layers[0], *layers[1]], (2, 2, 1), strict=True):
            for token in logits:
                for expert in token.topk(k).indices.tolist():
                    counts[expert] += 1
    model(**inputs).loss.backward()
    with torch.no_grad():
        model(**inputs)
    model.eval()(**inputs)
    vision = {name: each for name, each in loads_by_layer(model).items() if "language" not in name}
    assert [load.tolist() for load in vision.values()] == expected
    update_router_bias(model)
    for name, counts in zip(vision, expected, strict=True):
        layer = model.get_submodule(f"model.{name}")
        mean = sum(counts) / len(counts)
        signs = [(mean > load) - (mean < load) for load in counts]
        assert layer.router.e_score_correction_bias.tolist() == pytest.approx(
            [RATE * sign for sign in signs]
        )
        assert not loads_by_layer(model)[name].any()


@pytest.mark.parametrize("where", ["vision_tower.encoder.layers.1", "multi_modal_projector"])
def test_a_router_that_is_not_finite_is_named(
    tiny_model: Model, tiny_batch: Batch, where: str
) -> None:
    model = tiny_model(text=TEXT, **EXPERTS).train()
    check_routing(model)
    with torch.no_grad():
        model.get_parameter(f"model.{where}.mlp.router.weight").fill_(torch.nan)
    model(**labelled(tiny_batch(model.config, ROWS)))
    with pytest.raises(
        ValueError, match=f"Router logits of model.{where}.mlp are NaN .* in step 3"
    ):
        check_routing(model, 3)


@pytest.mark.parametrize("pull", ["loss", "vision router logits"])
@pytest.mark.parametrize("name", MODELS)
def test_checkpointing_of_either_kind_changes_no_loss_no_gradient_and_no_count(
    tiny_model: Model, tiny_batch: Batch, name: str, pull: str
) -> None:
    results = {}
    for kind, use_reentrant in CHECKPOINTING.items():
        model = tiny_model(text=TEXT, **MODELS[name]).train()
        if use_reentrant is not None:
            model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
        calls: list[int] = []
        layer = model.model.vision_tower.encoder.layers[1]
        layer.layer_norm2.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        output = model(**labelled(tiny_batch(model.config, ROWS)), output_router_logits=True)
        if pull == "loss":
            output.loss.backward()
        else:  # the only way for a gradient
            sum(logits.square().mean() for logits in output.vision_router_logits).backward()
        assert len(calls) == 1 + (use_reentrant is not None)
        reached = {name: gradient for name, gradient in gradients(model).items() if gradient.any()}
        results[kind] = {"loss": output.loss.detach()} | reached
        for block, load in loads_by_layer(model).items():
            results[kind][block] = load
            if pull == "loss" or "language" not in block:
                assert results[kind][f"model.{block}.router.weight"].any(), block
    for kind in CHECKPOINTING:
        assert results[kind].keys() == results["none"].keys()
        for key, value in results["none"].items():
            assert torch.equal(results[kind][key], value), f"{kind}: {key}"


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("images", ["padded", "indexed"])
@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
def test_the_loss_and_its_gradients_compile_into_one_graph(
    tiny_model: Model, tiny_batch: Batch, implementation: str, images: str
) -> None:
    """Compiled, tiles that are padding are encoded, too; they must count nowhere."""
    model = tiny_model(text=TEXT | {"num_hidden_layers": 1}, **EXPERTS).train()
    model.set_experts_implementation(implementation)
    inputs = labelled(tiny_batch(model.config, ROWS, images))
    results = []
    for forward in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        loss = forward(**inputs).loss
        loss.backward()
        loads = {name: load.clone() for name, load in loads_by_layer(model).items()}
        results.append(gradients(model) | {"loss": loss.detach()} | loads)
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 1
    once, twice = results
    for name in loads:
        assert once[name].sum() > 0 and torch.equal(twice.pop(name), 2 * once.pop(name)), name
    torch.testing.assert_close(twice, once, rtol=1e-4, atol=1e-6)


def test_shown_tiles_names_the_row_of_each_tile() -> None:
    image_tokens = torch.tensor([[0, 1, 1, 0, 1, 1], [0] * 6, [1, 1, 0, 0, 0, 0]]).bool()
    assert shown_tiles(3, 2, image_tokens).tolist() == [[0, 1, 2], [0, 0, 2]]
    padded = shown_tiles(4, 2, image_tokens)
    assert padded.tolist() == [[0, 1, 2, 3], [0, 0, 2, -1]]
    index = torch.tensor([[1, 0], [-1, -1], [1, -1]])
    shared = shown_tiles(2, 2, image_tokens, index)
    assert shared.tolist() == [[1, 0, 0, 0, 1, 0], [0, 0, -1, -1, 2, -1]]
    assert shown_tiles(1, 2, torch.zeros(2, 1, dtype=torch.bool)).tolist() == [[0], [-1]]

"""Recorded load of the experts in tower and connector, against the router logits of each image."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from vlmoe import VLMoEForConditionalGeneration
from vlmoe.routing.load import ExpertLoad, record_expert_load
from vlmoe.training.telemetry import scalars

Inputs = dict[str, torch.Tensor]
Model = Callable[..., VLMoEForConditionalGeneration]

IMAGE = 5
EXPERTS = {
    "vision_num_experts": 7,
    "vision_sparse_layers": [1],
    "projector_num_experts": 3,
    "projector_num_experts_per_tok": 1,
}
CHECKPOINTING = {"none": None, "re-entrant": True, "not re-entrant": False}


def batch(form: str) -> Inputs:
    """Two rows of one and two images of 4 tokens; the first image of both is the same."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(6, 90, (2, 11), generator=generator)
    ids[0, 1:5] = ids[1, 0:4] = ids[1, 6:10] = IMAGE
    first, second = torch.randn(2, 3, 16, 16, generator=generator)
    if form == "shared":
        index = torch.tensor([[0, -1], [0, 1]])
        return {
            "input_ids": ids,
            "pixel_values": torch.stack([first, second]),
            "image_index": index,
        }
    return {"input_ids": ids, "pixel_values": torch.stack([first, first, second])}


def expected(model: Any, images: torch.Tensor) -> dict[str, list[int]]:
    """How often each expert is among the best, image by image and patch by patch."""
    counts = {"tower": [0] * 7, "connector": [0] * 3}
    for image in images:
        with torch.no_grad():
            features = model.get_image_features(image[None], output_router_logits=True)
        for of_place, logits, k in zip(
            counts.values(), features.router_logits, (2, 1), strict=True
        ):
            for token in logits[0]:
                for expert in token.topk(k).indices.tolist():
                    of_place[expert] += 1
    return counts


def counted(load: ExpertLoad) -> dict[str, list[int]]:
    assert all(not of.text_counts.any() for of in load.vision.values())
    return {place: of.image_counts[0].tolist() for place, of in load.vision.items()}


@pytest.mark.parametrize("form", ["repeated", "shared"])
@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_training_counts_each_encoded_tile_once(
    tiny_model: Model, checkpointing: str, form: str
) -> None:
    model, inputs = tiny_model(**EXPERTS), batch(form)
    right = expected(model, inputs["pixel_values"])
    model.train()
    if CHECKPOINTING[checkpointing] is not None:
        model.activation_checkpointing_enable({"use_reentrant": CHECKPOINTING[checkpointing]})
    with record_expert_load(model) as load:
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert counted(load) == right
    with record_expert_load(model, training_only=True) as load:
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        text = torch.full((1, 6), 9)
        model(input_ids=text, labels=text).loss.backward()  # a blank image that no row shows
        model.eval()(**inputs)
        model.generate(**batch("repeated"), max_new_tokens=2, do_sample=False)
    assert counted(load) == right
    assert load.image_counts.sum(1).tolist() == [2 * 12] * 3  # the decoder's are as ever


@torch.no_grad()
def test_forwards_and_generate_count_alike(tiny_model: Model) -> None:
    model, inputs = tiny_model(**EXPERTS), batch("repeated")
    right = expected(model, inputs["pixel_values"])
    with record_expert_load(model) as load:
        model(**inputs)
        assert counted(load) == right
        model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert counted(load) == {place: [2 * n for n in of] for place, of in right.items()}
    load.reset()
    assert not any(map(sum, counted(load).values()))


@torch.no_grad()
def test_figures_and_scalars_stand_beside_those_of_the_decoder(tiny_model: Model) -> None:
    model, dense = tiny_model(**EXPERTS), tiny_model()
    figures = {}
    for each in (dense, model):
        with record_expert_load(each) as load:
            each(**batch("repeated"))
        figures[each] = load.as_dict()
    assert "vision" not in figures[dense]
    assert list(figures[model]) == [*figures[dense], "vision"]
    of_tower, of_connector = (figures[model]["vision"][p] for p in ("tower", "connector"))
    assert list(of_tower) == list(of_connector) == list(figures[dense])
    assert of_tower["layers"] == [1] and of_connector["layers"] == [0]
    assert of_tower["fair_share"] == 1 / 7 and of_connector["fair_share"] == 1 / 3
    assert of_tower["tokens"] == {"image": [48], "text": [0], "all": [48]}
    assert of_connector["tokens"]["all"] == [12]
    right = torch.tensor(expected(model, batch("repeated")["pixel_values"])["connector"])
    assert of_connector["all_share"] == [(right.double() / right.sum()).tolist()]
    of_loggers = scalars(figures[model])
    for name in ("vision_layer_1", "connector"):
        for figure in ("max_violation", "dead_experts", "router_entropy"):
            assert of_loggers.pop(f"router/{name}/{figure}") >= 0
    assert of_loggers.keys() == scalars(figures[dense]).keys()


def test_the_counters_of_all_ranks_are_added(
    tiny_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(**EXPERTS)
    with record_expert_load(model) as load, torch.no_grad():
        model(**batch("repeated"))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: tensor.mul_(2))
    before, whole = counted(load), load.summed_over_ranks()
    assert counted(whole) == {place: [2 * n for n in of] for place, of in before.items()}
    assert counted(load) == before


def test_experts_in_the_tower_are_recorded_beside_a_dense_decoder(
    tiny_model: Model,
) -> None:
    model, inputs = tiny_model(text={"mlp_only_layers": [0, 1, 2]}, **EXPERTS), batch("repeated")
    with record_expert_load(model) as load, torch.no_grad():
        model(**inputs)
    assert counted(load) == expected(model, inputs["pixel_values"])
    figures = load.as_dict()
    assert figures["layers"] == figures["max_over_mean"] == []
    assert {name.split("/")[1] for name in scalars(figures)} == {"vision_layer_1", "connector"}

"""The benchmark of retrieval: captions that are all different, and a dense twin of equal size."""

import retrieval
import torch
from retrieval import ARMS, RECIPE, make_pairs, table

from vlmoe.training.build import build_model


def test_captions_of_test_and_training_are_all_different() -> None:
    taken: set[str] = set()
    test, train = make_pairs("test", 30, taken), make_pairs("train", 60, taken)
    captions = [pair["text"] for pair in test + train]
    assert len(set(captions)) == 90 == len(taken)
    assert all(", then " in caption for caption in captions)


def test_the_dense_twin_has_the_active_size_of_the_experts() -> None:
    active = {}
    for arm in ("experts", "dense twin"):
        overrides = {"text_config": ARMS[arm]}
        torch.manual_seed(0)
        model, _ = build_model("tiny", ["a red circle"], model_overrides=overrides)
        active[arm] = model.active_parameters()["text_token"]
    assert abs(active["dense twin"] / active["experts"] - 1) < 0.005


def test_the_table_has_means_and_ranges_of_seeds() -> None:
    ways = ("text_to_image", "image_to_text")
    runs = {
        str(seed): {f"{way}_recall@{k}": 0.1 * seed + 0.01 * k for way in ways for k in (1, 5, 10)}
        for seed in range(3)
    }
    assert "11.0% / 15.0% / 20.0% (1.0% to 21.0%)" in table({"experts": runs})
    assert not retrieval.reached(runs["2"]) and RECIPE["test_pairs"] == 500

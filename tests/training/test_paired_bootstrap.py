"""The paired bootstrap against closed forms and known cases."""

import numpy as np
import pytest

from vlmoe.training.paired_bootstrap import paired_bootstrap


def half_width(found: dict[str, float]) -> float:
    return (found["high"] - found["low"]) / 2


def test_interval_is_that_of_the_normal_law_for_one_seed() -> None:
    rng = np.random.default_rng(0)
    ours, peer = rng.random((2, 1, 900)) < np.array([0.8, 0.6])[:, None, None]
    found = paired_bootstrap(ours, peer)
    difference = ours.astype(float) - peer
    assert found["mean"] == pytest.approx(difference.mean())
    assert half_width(found) == pytest.approx(1.96 * difference.std() / 30, rel=0.04)


def test_questions_that_both_models_get_right_together_do_not_widen_it() -> None:
    rng = np.random.default_rng(1)
    peer = rng.random((1, 1000)) < 0.5
    ours = peer.copy()
    ours[0, :10] = ~peer[0, :10]
    paired = paired_bootstrap(ours, peer)
    assert half_width(paired) == pytest.approx(1.96 * np.sqrt(10) / 1000, rel=0.1)
    unpaired = paired_bootstrap(ours, rng.permutation(peer, axis=1))
    assert half_width(unpaired) > 5 * half_width(paired)


def test_a_difference_that_every_seed_and_question_shows_has_no_spread() -> None:
    found = paired_bootstrap(np.ones((3, 50)), np.zeros((3, 50)))
    assert found == {"mean": 1.0, "low": 1.0, "high": 1.0}


def test_seeds_are_drawn_too() -> None:
    ours, peer = np.zeros((3, 400)), np.zeros((3, 400))
    ours[0] = 1  # one seed wins every question, the others none: all lies between the seeds
    found = paired_bootstrap(ours, peer)
    # the mean of three draws of (1, 0, 0) is 0 with (2/3)^3 and 1 with (1/3)^3 = 0.037
    assert (found["low"], found["high"]) == (0.0, 1.0)
    assert found["mean"] == pytest.approx(1 / 3)


def test_questions_about_one_picture_are_drawn_together() -> None:
    rng = np.random.default_rng(2)
    pictures = rng.integers(-1, 2, 200)
    difference = np.repeat(pictures, 8)[None]
    ours, peer = (difference > 0).astype(int), (difference < 0).astype(int)
    alone = paired_bootstrap(ours, peer)
    grouped = paired_bootstrap(ours, peer, np.repeat(np.arange(200), 8))
    assert grouped["mean"] == alone["mean"]
    assert half_width(grouped) == pytest.approx(np.sqrt(8) * half_width(alone), rel=0.06)
    assert half_width(grouped) == pytest.approx(1.96 * pictures.std() / np.sqrt(200), rel=0.06)


def test_groups_may_have_any_names_and_lie_apart() -> None:
    ours, peer = np.array([[1, 0, 1, 1]]), np.array([[0, 0, 1, 0]])
    named = paired_bootstrap(ours, peer, np.array(["b", "a", "a", "b"]))
    assert named["mean"] == 0.5
    assert named["low"] == 0.0 and named["high"] == 1.0


def test_it_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(3)
    covered = 0
    for _ in range(60):
        ours, peer = rng.random((2, 1, 300)) < np.array([0.7, 0.65])[:, None, None]
        found = paired_bootstrap(ours, peer, seed=int(rng.integers(1e6)), resamples=1000)
        covered += found["low"] <= 0.05 <= found["high"]
    assert covered >= 52  # of 60; 57 are expected


@pytest.mark.parametrize("shape", [(2, 3), (3,), (0, 4)])
def test_answers_of_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="allowed: the same"):
        paired_bootstrap(np.zeros(shape), np.zeros((2, 4)) if shape[0] else np.zeros(shape))
    with pytest.raises(ValueError, match="`groups` has 3 entries for 4 questions"):
        paired_bootstrap(np.zeros((2, 4)), np.zeros((2, 4)), np.arange(3))

"""Losses that fall, have settled or only wobble; and what is told of a short run."""

import math

import numpy as np
import pytest

from vlmoe.training.run_length import DEMO_STEPS, advice, still_falling


def history(loss: object, steps: int = 300, noise: float = 0.0, seed: int = 0) -> list[dict]:
    """A log every ten steps."""
    rng = np.random.default_rng(seed)
    return [
        {"step": step, "loss": loss(step) * math.exp(noise * rng.standard_normal())}  # type: ignore[operator]
        for step in range(10, steps + 1, 10)
    ]


def exponential(step: int) -> float:
    return 4 * math.exp(-step / 200)


def settled(step: int) -> float:
    return 0.5 + 4 * math.exp(-step / 20)


@pytest.mark.parametrize("noise", [0.0, 0.02, 0.05])
@pytest.mark.parametrize("seed", range(10))
def test_a_falling_loss_is_told_from_one_that_has_settled(noise: float, seed: int) -> None:
    before, after = still_falling(history(exponential, noise=noise, seed=seed)) or (0, 0)
    assert before == pytest.approx(exponential(210), rel=0.2)
    assert after == pytest.approx(exponential(300), rel=0.2)
    assert still_falling(history(settled, noise=noise, seed=seed)) is None


def test_one_outlier_does_not_hide_the_trend_nor_make_one() -> None:
    falling, flat = history(exponential), history(settled)
    falling[-1]["loss"], flat[-10]["loss"] = 40.0, 40.0
    assert still_falling(falling) and not still_falling(flat)


def test_a_rising_loss_and_too_few_losses_are_not_falling() -> None:
    assert still_falling(history(lambda step: step)) is None
    assert still_falling(history(exponential, steps=120)) is None
    assert still_falling([]) is None
    assert still_falling([{"step": 10, "eval_loss": 1.0}]) is None


def test_a_short_run_is_told_with_the_numbers_and_the_way_on() -> None:
    told = advice(history(exponential), 300, from_scratch=True) or ""
    assert "still falling" in told and f"300 optimizer steps, the demo takes {DEMO_STEPS:,}" in told
    assert "`max_steps`" in told
    assert "demo" not in (advice(history(exponential), 300, from_scratch=False) or "demo")
    assert advice(history(settled), 1000, from_scratch=True) is None
    assert "39 optimizer steps" in (advice([{"step": 39, "loss": 4.4}], 39, True) or "")

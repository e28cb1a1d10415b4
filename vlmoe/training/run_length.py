# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Whether a training run was long enough, judged by its losses."""

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from statistics import median

JUDGED_SHARE = 1 / 3  # of the run, its end
FEWEST_LOSSES = 5  # to judge by
SIGNIFICANT = 1.96  # standard deviations
STILL_FALLING = 0.1  # the share of the loss that the trend takes off within that third
DEMO_STEPS = 5975
"""Optimizer steps of the demo, captions and questions, from the preset `tiny` to 99%."""


def still_falling(log_history: Sequence[Mapping[str, float]]) -> tuple[float, float] | None:
    """Return the loss before and at the end of the last third of a run, if it was still falling.

    The trend is the Theil-Sen slope (Sen, 1968, https://doi.org/10.2307/2285891): the median of the
    slopes between all pairs of losses, which single outliers do not move. The loss counts as
    falling if the trend takes off more than a tenth of it within that third, and if the losses fall
    by more than chance (Mann-Kendall test, Mann, 1945, https://doi.org/10.2307/1907187).

    Args:
        log_history: `trainer.state.log_history`, entries with `step` and `loss`.

    Returns:
        The trend's two ends, or None: not falling, or fewer than five losses in the last third.
    """
    losses = {entry["step"]: entry["loss"] for entry in log_history if "loss" in entry}
    last = max(losses, default=0)
    judged = [(step, loss) for step, loss in losses.items() if step > last * (1 - JUDGED_SHARE)]
    if len(judged) < FEWEST_LOSSES:
        return None
    pairs = list(combinations(judged, 2))
    slope = median((b[1] - a[1]) / (b[0] - a[0]) for a, b in pairs)
    middle_step, middle = median(s for s, _ in judged), median(loss for _, loss in judged)
    start = middle + slope * (judged[0][0] - middle_step)
    end = middle + slope * (judged[-1][0] - middle_step)
    kendall = sum((b[1] < a[1]) - (b[1] > a[1]) for a, b in pairs)
    count = len(judged)
    deviation = math.sqrt(count * (count - 1) * (2 * count + 5) / 18)
    is_trend = kendall > SIGNIFICANT * deviation
    return (start, end) if is_trend and start - end > STILL_FALLING * abs(start) else None


def advice(
    log_history: Sequence[Mapping[str, float]], steps: int, from_scratch: bool
) -> str | None:
    """Return what to tell about a run that was too short, or None if there is nothing to tell.

    Args:
        log_history: as in `still_falling`.
        steps: optimizer steps of the run.
        from_scratch: whether the model started from a preset.
    """
    falling = still_falling(log_history)
    too_few = from_scratch and steps < DEMO_STEPS / 10
    if falling is None and not too_few:
        return None
    facts = []
    if falling is not None:
        facts.append(
            f"the loss was still falling at the end (from {falling[0]:.3g} to {falling[1]:.3g} in "
            "the last third)"
        )
    if from_scratch:
        facts.append(
            f"a model from scratch had {steps:,} optimizer steps, the demo takes {DEMO_STEPS:,}"
        )
    return (
        f"This run was short: {'; '.join(facts)}. Train longer with `max_steps` or "
        "`num_train_epochs`."
    )

"""Training arguments: our defaults, those of a preset, and what is refused."""

from typing import Any

import pytest

from vlmoe.training.arguments import check_arguments, training_arguments


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"label_smoothing_factor": 0.1}, "`label_smoothing_factor`"),
        ({"remove_unused_columns": True}, "`remove_unused_columns`"),
        ({"train_sampling_strategy": "group_by_length"}, "`train_sampling_strategy` group_by_"),
        ({"train_sampling_strategy": "batch_rebalance"}, "`train_sampling_strategy` batch_"),
    ],
)
def test_arguments_that_would_spoil_training_are_refused(
    fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_arguments(training_arguments(use_cpu=True, **fields))


def test_every_default_is_allowed() -> None:
    check_arguments(training_arguments(use_cpu=True), has_evaluation=False)

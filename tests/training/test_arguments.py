"""Training arguments: our defaults, those of a preset, and what is refused."""

from typing import Any

import pytest

from vlmoe.training.argument_ranges import RANGES, Range, require_in_range
from vlmoe.training.arguments import check_arguments, prepared_arguments, training_arguments


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


@pytest.mark.parametrize("as_object", [False, True])
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"learning_rate": float("nan")}, "`learning_rate` must be above 0, got nan"),
        ({"per_device_train_batch_size": -2}, "`per_device_train_batch_size` must be 1 or more"),
        ({"weight_decay": -0.1}, "`weight_decay` must be 0 or more, got -0.1"),
    ],
)
def test_a_number_out_of_range_is_refused(
    fields: dict[str, Any], message: str, as_object: bool
) -> None:
    given = training_arguments(use_cpu=True, **fields) if as_object else fields
    with pytest.raises(ValueError, match=message):
        prepared_arguments(given, None, has_evaluation=False)


def test_every_range_is_of_an_argument_and_holds_its_default() -> None:
    defaults = vars(training_arguments(use_cpu=True))
    assert RANGES.keys() <= defaults.keys()
    for name in RANGES:
        require_in_range(name, defaults[name])


@pytest.mark.parametrize("value", ["3", [1], True])
def test_what_is_no_number_is_named(value: Any) -> None:
    with pytest.raises(ValueError, match="`seed` must be a number"):
        require_in_range("seed", value)


def test_a_range_says_its_bounds() -> None:
    assert str(Range(0, below=1)) == "0 or more and below 1"
    assert all(str(each) for each in RANGES.values())


@pytest.mark.parametrize(
    ("given", "saves"),
    [
        ({"max_steps": 100}, ("steps", 0.2)),
        ({"max_steps": 100, "save_strategy": "epoch"}, ("epoch", 500)),
        ({"max_steps": -1}, ("epoch", 500)),
        ({"num_train_epochs": 2}, ("epoch", 500)),
    ],
)
def test_saves_follow_max_steps_unless_they_are_given(
    given: dict[str, Any], saves: tuple[str, float]
) -> None:
    arguments = prepared_arguments(given | {"use_cpu": True}, None, has_evaluation=True)
    assert (arguments.save_strategy, arguments.save_steps) == saves
    assert (arguments.eval_strategy, arguments.eval_steps or 500) == saves
    prepared_arguments(given | {"use_cpu": True}, None, has_evaluation=False)

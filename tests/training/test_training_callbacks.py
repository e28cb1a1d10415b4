"""The bar shows the loss and one number of the routing; evaluations stand above it."""

from types import SimpleNamespace
from typing import Any

import pytest

from vlmoe.training.callbacks import TrainingPrinter, TrainingProgress


class Bar:
    def __init__(self) -> None:
        self.postfix: dict[str, str] = {}
        self.lines: list[str] = []

    def set_postfix(self, shown: dict[str, str]) -> None:
        self.postfix = dict(shown)

    def write(self, line: str) -> None:
        self.lines.append(line)


@pytest.fixture
def shown() -> Any:
    progress, bar = TrainingProgress(), Bar()
    progress.training_bar = bar  # type: ignore[assignment]
    state = SimpleNamespace(is_world_process_zero=True, global_step=7)

    def log(**logs: float) -> Bar:
        progress.on_log(None, state, None, {name.replace("__", "/"): v for name, v in logs.items()})
        return bar

    return log


def test_training_logs_end_the_bar_and_the_layers_of_the_routing_are_left_to_the_loggers(
    shown: Any,
) -> None:
    shown(loss=1.23456, learning_rate=1e-3, grad_norm=2.0, epoch=1.0)
    bar = shown(
        router__layer_0__max_violation=0.5, router__layer_1__max_violation=1.25,
        router__layer_0__overlap=0.1, epoch=1.0,
    )  # fmt: skip
    assert bar.postfix == {"loss": "1.235", "learning_rate": "0.001", "busiest expert": "2.25x"}
    assert bar.lines == []


def test_evaluations_stand_above_the_bar(shown: Any) -> None:
    shown(train_runtime=3.1, train_loss=0.5)
    bar = shown(eval_loss=0.25, eval_runtime=3.0, eval_steps_per_second=2.0, epoch=1.0)
    assert bar.lines == ["step 7: train_loss 0.5", "step 7: eval_loss 0.25"]


def test_without_a_bar_losses_are_printed_and_layers_are_not(
    capsys: pytest.CaptureFixture[str],
) -> None:
    state = SimpleNamespace(is_local_process_zero=True)
    TrainingPrinter().on_log(None, state, None, {"router/layer_0/max_violation": 0.5})
    TrainingPrinter().on_log(None, state, None, {"loss": 1.5})
    assert capsys.readouterr().out == "{'loss': '1.5'}\n"

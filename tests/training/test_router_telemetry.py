"""The routing that a training run logs, against counts over the router logits of its rows.

With a learning rate of 0 every step routes the same; each step sees all rows.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import on_ranks
from transformers import Trainer, TrainerCallback, TrainingArguments

from vlmoe import VLMoEForConditionalGeneration
from vlmoe.routing.load import record_expert_load
from vlmoe.training.arguments import training_arguments
from vlmoe.training.data import TrainingData
from vlmoe.training.run import train
from vlmoe.training.telemetry import (
    TELEMETRY_FILE,
    RouterTelemetry,
    read_telemetry,
    scalars,
)

IMAGE, K, LAYERS, EXPERTS, LENGTH = 5, 2, 3, 4, 11
Entries = list[dict[str, Any]]


def rows(number: int = 4) -> list[dict[str, torch.Tensor]]:
    """Rows with 4 image tokens and 0, 1, 2, ... tokens of padding."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for padding in range(number):
        ids = torch.randint(6, 90, (LENGTH,), generator=generator)
        ids[1:5], ids[LENGTH - padding :] = IMAGE, 0
        labels = ids.where(torch.arange(LENGTH) >= 5, -100)
        pixels = torch.randn(3, 16, 16, generator=generator)
        made.append({"input_ids": ids, "labels": labels, "pixel_values": pixels})
        made[-1]["attention_mask"] = (torch.arange(LENGTH) < LENGTH - padding).long()
    return made


def collate(of_batch: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Rows of one length, stacked."""
    return {name: torch.stack([row[name] for row in of_batch]) for name in of_batch[0]}


class Logger(TrainerCallback):
    """Stands for TensorBoard and the like, which come before a user's callbacks."""

    def __init__(self) -> None:
        self.logs: list[dict[str, Any]] = []

    def on_log(self, *args: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        """Keep what every logger gets."""
        self.logs.append(dict(logs))


def run(
    output: Path,
    model: Path | str,
    batch: int = 4,
    accumulation: int = 1,
    resume: str | None = None,
    **more: Any,
) -> tuple[Entries, list[dict[str, Any]]]:
    """The file of a run with plain `Trainer`, and what its loggers got."""
    settings = {"learning_rate": 0.0, "max_steps": 2, "logging_steps": 1} | more
    arguments = TrainingArguments(
        output_dir=str(output),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        per_device_eval_batch_size=3,
        report_to="none",
        save_strategy=settings.pop("save_strategy", "no"),
        remove_unused_columns=False,
        use_cpu=True,
        disable_tqdm=True,
        **settings,
    )
    logger = Logger()
    trainer = Trainer(
        model=VLMoEForConditionalGeneration.from_pretrained(model),
        args=arguments,
        data_collator=collate,
        train_dataset=rows(),
        eval_dataset=rows(3),
        callbacks=[logger],
    )
    trainer.add_callback(RouterTelemetry(trainer))
    trainer.train(resume_from_checkpoint=resume)
    return read_telemetry(output / TELEMETRY_FILE), logger.logs


@pytest.fixture(scope="module")
def model_folder(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model: Callable[..., VLMoEForConditionalGeneration],
) -> Path:
    """A saved model without dropout."""
    folder = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def plain(
    tmp_path_factory: pytest.TempPathFactory, model_folder: Path
) -> tuple[Entries, list[dict[str, Any]]]:
    """Two steps, each with all rows in one batch."""
    return run(tmp_path_factory.mktemp("plain"), model_folder)


def plain_counts(model: Path) -> dict[str, list[list[int]]]:
    """Assignments by layer and expert, by loops over the router logits of each row."""
    loaded = VLMoEForConditionalGeneration.from_pretrained(model).eval()
    counts = {kind: [[0] * EXPERTS for _ in range(LAYERS)] for kind in ("image", "text")}
    for row in rows():
        with torch.no_grad():
            output = loaded(**collate([row]), output_router_logits=True)
        for layer, of_layer in enumerate(output.router_logits):
            for token, of_token in enumerate(of_layer.tolist()):
                kind = "image" if row["input_ids"][token] == IMAGE else "text"
                for expert in sorted(range(EXPERTS), key=of_token.__getitem__)[-K:]:
                    counts[kind][layer][expert] += int(row["attention_mask"][token])
    return counts


def test_each_entry_holds_its_steps_counts(
    plain: tuple[Entries, list[dict[str, Any]]], model_folder: Path
) -> None:
    entries, counts = plain[0], plain_counts(model_folder)
    assert [entry["step"] for entry in entries] == [1, 2]
    assert [entry["epoch"] for entry in entries] == [1.0, 2.0]
    for entry in entries:
        assert entry["layers"] == [0, 1, 2] and entry["fair_share"] == 1 / EXPERTS
        for kind, of_kind in counts.items():
            for layer, of_layer in enumerate(of_kind):
                tokens = sum(of_layer) // K
                shares = [count / (K * tokens) for count in of_layer]
                assert entry["tokens"][kind][layer] == tokens
                assert entry[f"{kind}_share"][layer] == pytest.approx(shares, abs=1e-5)
                violation = max(shares) * EXPERTS - 1
                assert entry["max_violation"][kind][layer] == pytest.approx(violation, abs=1e-5)


def test_every_logger_gets_four_numbers_per_layer(
    plain: tuple[Entries, list[dict[str, Any]]],
) -> None:
    entries, logs = plain
    routing = [of_log for of_log in logs if any(key.startswith("router/") for key in of_log)]
    for entry, of_log in zip(entries, routing, strict=True):
        numbers = {key: value for key, value in of_log.items() if key.startswith("router/")}
        assert numbers == pytest.approx(scalars(entry), abs=1e-5) and len(numbers) == 4 * LAYERS
        assert all(type(value) is float for value in numbers.values()), "loggers take floats"
        assert of_log["router/layer_1/overlap"] == pytest.approx(entry["overlap"][1], abs=1e-5)
        violation = entry["max_violation"]["all"][2]
        assert of_log["router/layer_2/max_violation"] == pytest.approx(violation, abs=1e-5)
    assert sum("loss" in of_log for of_log in logs) == 2, "no loss is logged twice"


@pytest.mark.parametrize(
    ("batch", "accumulation", "checkpointing"),
    [(1, 4, None), (4, 1, False), (4, 1, True), (2, 2, True)],
)
def test_a_step_counts_once_however_it_is_computed(
    plain: tuple[Entries, list[dict[str, Any]]],
    model_folder: Path,
    tmp_path: Path,
    batch: int,
    accumulation: int,
    checkpointing: bool | None,
) -> None:
    """Micro-batches, and checkpointing, re-entrant (True) or not."""
    more: dict[str, Any] = {}
    if checkpointing is not None:
        kwargs = {"use_reentrant": checkpointing}
        more = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": kwargs}
    entries, _ = run(tmp_path, model_folder, batch, accumulation, **more)
    assert_alike(entries, plain[0])


def assert_alike(ours: Any, other: Any) -> None:
    """Equal but for the last decimal that is written."""
    if isinstance(other, dict):
        assert ours.keys() == other.keys()
        ours, other = list(ours.values()), list(other.values())
    if isinstance(other, list):
        for one, its in zip(ours, other, strict=True):
            assert_alike(one, its)
    else:
        assert ours == pytest.approx(other, abs=1.01e-5)


def test_an_entry_spans_the_steps_since_the_last(
    plain: tuple[Entries, list[dict[str, Any]]], model_folder: Path, tmp_path: Path
) -> None:
    entries, _ = run(tmp_path, model_folder, max_steps=5, logging_steps=2)
    assert [entry["step"] for entry in entries] == [2, 4]
    for entry in entries:
        tokens = {kind: [2 * n for n in of] for kind, of in plain[0][0]["tokens"].items()}
        assert entry["tokens"] == tokens
        assert entry["all_share"] == plain[0][0]["all_share"]


def test_evaluation_is_not_mixed_in(
    plain: tuple[Entries, list[dict[str, Any]]], model_folder: Path, tmp_path: Path
) -> None:
    more = {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True}
    entries, logs = run(tmp_path, model_folder, **more)
    assert entries == plain[0]
    assert sum("eval_loss" in of_log for of_log in logs) == 3


def test_a_resumed_run_goes_on_with_the_file(model_folder: Path, tmp_path: Path) -> None:
    more = {"learning_rate": 0.1, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    run(tmp_path, model_folder, batch=2, **more)
    whole = (tmp_path / TELEMETRY_FILE).read_text()
    entries = json.loads(whole)
    assert [entry["step"] for entry in entries] == [1, 2, 3, 4]
    assert entries[0]["all_share"] != entries[3]["all_share"], "training changes the routing"
    checkpoint = str(tmp_path / "checkpoint-2")
    run(tmp_path, model_folder, batch=2, resume=checkpoint, **more)
    assert (tmp_path / TELEMETRY_FILE).read_text() == whole
    assert not list(tmp_path.glob(".*")), "a temporary file was left"

    (tmp_path / TELEMETRY_FILE).write_text(whole[:-10])
    with pytest.raises(ValueError, match=f"{TELEMETRY_FILE} is damaged .*delete it"):
        run(tmp_path, model_folder, batch=2, resume=checkpoint, **more)
    run(tmp_path, model_folder, batch=2, **more)
    assert (tmp_path / TELEMETRY_FILE).read_text() == whole, "a new run starts anew"


def test_recording_does_not_change_training(model_folder: Path, tmp_path: Path) -> None:
    """The loss of the last of three steps, with and without, bit for bit."""
    with_it = run(tmp_path, model_folder, learning_rate=0.1, max_steps=3)[1]
    losses = [of_log["loss"] for of_log in with_it if "loss" in of_log]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        learning_rate=0.1,
        max_steps=3,
        logging_steps=1,
        per_device_train_batch_size=4,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        remove_unused_columns=False,
    )
    model = VLMoEForConditionalGeneration.from_pretrained(model_folder)
    trainer = Trainer(model, arguments, collate, train_dataset=rows())
    trainer.train()
    history = trainer.state.log_history
    assert [entry["loss"] for entry in history if "loss" in entry] == losses


def test_the_train_command_records_what_has_experts(
    saved_model: Path, data_folder: Path, tmp_path: Path
) -> None:
    def trained(output: Path, **model: Any) -> list[dict[str, Any]]:
        arguments = training_arguments(
            output_dir=str(output), max_steps=2, logging_steps=1, report_to="none", use_cpu=True
        )
        return train(args=arguments, data=TrainingData(str(data_folder)), **model).log_history

    log = trained(tmp_path / "sparse", model=str(saved_model))
    entries = read_telemetry(tmp_path / "sparse" / TELEMETRY_FILE)
    assert [entry["step"] for entry in entries] == [1, 2]
    assert sum("router/layer_0/max_violation" in entry for entry in log) == 2
    dense = {"text_config": {"mlp_only_layers": [0, 1]}}
    log = trained(tmp_path / "dense", model="tiny", model_overrides=dense)
    assert not any(key.startswith("router/") for entry in log for key in entry)
    assert not (tmp_path / "dense" / TELEMETRY_FILE).exists()


def on_a_rank(folder: str, output: str) -> dict[str, Any]:
    """One step of two ranks with two rows each, and a plain loop over one row per rank."""
    logs = run(Path(output), folder, batch=2, max_steps=1, ddp_backend="gloo")[1]
    model = VLMoEForConditionalGeneration.from_pretrained(folder).train()
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    rank = torch.distributed.get_rank()
    with record_expert_load(parallel, training_only=True) as load:
        parallel(**collate([rows()[rank]])).logits.sum().backward()
    whole = load.summed_over_ranks()
    return {"logs": logs, "own": load.counts, "whole": whole.counts, "again": load.counts}


@pytest.mark.slow
def test_two_ranks_are_summed(
    plain: tuple[Entries, list[dict[str, Any]]], model_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "ranks").mkdir()
    arguments = str(model_folder), str(tmp_path / "output")
    ranks = on_ranks(on_a_rank, *arguments, folder=tmp_path / "ranks")
    assert_alike(read_telemetry(tmp_path / "output" / TELEMETRY_FILE), plain[0][:1])
    logs = [[key for of_log in rank["logs"] for key in of_log.items()] for rank in ranks]
    routing = [[item for item in log if item[0].startswith("router/")] for log in logs]
    assert routing[0] == routing[1] and routing[0], "each rank logs the sum"
    own = [rank["own"] for rank in ranks]
    assert not torch.equal(*own)
    for rank in ranks:
        assert torch.equal(rank["whole"], own[0] + own[1]) and torch.equal(
            rank["again"], rank["own"]
        )

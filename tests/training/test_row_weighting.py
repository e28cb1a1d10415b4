"""Several tasks with weights: one update however a step is split, balanced weights, the log."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import assistant, picture, row, user
from native_processors import tiny_processor
from ranks import WORLD_SIZE, on_ranks
from sparse_families import sparse_family
from transformers import TrainerCallback

from vlmoe import VLMoECollator, VLMoEForConditionalGeneration, VLMoEProcessor, VLMoETrainer
from vlmoe.data.row_weights import RowWeights

Rows = list[dict[str, Any]]
Gradients = dict[str, torch.Tensor]
TOLERANCE = 1e-5


class Recorder(TrainerCallback):
    """Keeps the gradients of the step; nothing was clipped."""

    def on_pre_optimizer_step(self, *args: Any, model: torch.nn.Module, **kwargs: Any) -> None:
        """Before the step."""
        self.gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


def make_rows() -> Rows:
    """Two tasks, with long answers and short ones, and rows without a task, in turn."""
    rows = []
    for number in range(8):
        kind = ("caption", "count", "")[number % 3]
        words = {"caption": "a red circle and a blue square " * (number + 1), "count": "two"}
        shown = [picture(number)] * (number % 2)
        weight = {"caption": "balanced", "count": 3.0}.get(kind)
        given = {"task": kind, "loss_weight": weight} if kind else {}
        answer = assistant(words.get(kind, "yes it is"))
        rows.append(row(user("what is it?", len(shown)), answer, images=shown, **given))
    return rows


def trainer_of(
    model: Any, processor: Any, rows: Rows, output: Path, accumulate: int = 1, **values: Any
) -> tuple[VLMoETrainer, Recorder]:
    recorder = Recorder()
    splits = accumulate * values.pop("ranks", 1)
    arguments = {
        "output_dir": str(output),
        "gradient_accumulation_steps": accumulate,
        "per_device_train_batch_size": len(rows) // splits,
        "max_steps": 1,
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    trainer = VLMoETrainer(
        model,
        arguments | values,
        train_dataset=rows,
        processing_class=processor,
        callbacks=[recorder],
    )
    return trainer, recorder


def gradients(
    folder: Path, accumulate: int, ranks: int = 1, rows: Rows | None = None
) -> tuple[Gradients, dict[str, float]]:
    """The gradients of one step, and its log."""
    model = VLMoEForConditionalGeneration.from_pretrained(folder)
    processor = VLMoEProcessor.from_pretrained(folder)
    rows = make_rows() if rows is None else rows
    trainer, recorder = trainer_of(model, processor, rows, folder / "out", accumulate, ranks=ranks)
    trainer.train()
    [log] = [entry for entry in trainer.state.log_history if "loss" in entry]
    return recorder.gradients, log


def distance(ours: Gradients, whole: Gradients) -> float:
    assert ours.keys() == whole.keys()
    one, other = (torch.cat([g[n].flatten() for n in whole]) for g in (ours, whole))
    routers = max(
        ((ours[name] - g).norm() / g.norm()).item() for name, g in whole.items() if "router" in name
    )
    return max(((one - other).norm() / other.norm()).item(), routers)


@pytest.fixture(scope="module")
def whole(model_folder: Path) -> tuple[Gradients, dict[str, float]]:
    """One backward pass over all rows, with weights counted by hand, and the losses by task."""
    model = VLMoEForConditionalGeneration.from_pretrained(model_folder).train()
    assert model.config.text_config.router_aux_loss_coef == 1
    collator = VLMoECollator(VLMoEProcessor.from_pretrained(model_folder))
    rows = make_rows()
    plain = [{k: v for k, v in each.items() if k != "loss_weight"} for each in rows]
    batch = collator(plain)
    assert "loss_weights" not in batch
    counts = (batch["labels"][:, 1:] != -100).sum(-1).tolist()
    captions = [
        count for count, each in zip(counts, rows, strict=True) if each.get("task") == "caption"
    ]
    mean = sum(captions) / len(captions)
    by_task = {"caption": 1 / mean, "count": 3.0, None: 1.0}
    weights = torch.tensor([by_task[each.get("task")] for each in rows])
    output = model(**batch, loss_weights=weights)
    output.loss.backward()
    log = {"loss": output.loss.item()}
    for task, name in (("caption", "caption"), ("count", "count"), (None, "other")):
        its = [i for i, each in enumerate(rows) if each.get("task") == task]
        log[f"loss/{name}"] = output.row_losses[its].sum().item() / sum(counts[i] for i in its)
    return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}, log


@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_weighted_update_does_not_depend_on_accumulation(
    accumulate: int, model_folder: Path, whole: Any
) -> None:
    ours, log = gradients(model_folder, accumulate)
    assert distance(ours, whole[0]) <= TOLERANCE
    for name, value in whole[1].items():
        assert log[name] == pytest.approx(value, rel=1e-5), name
    assert {name for name in log if name.startswith("loss/")} == whole[1].keys() - {"loss"}


def of_rank(folder: Path) -> tuple[Gradients, dict[str, float]]:
    return gradients(folder, 2, WORLD_SIZE)


@pytest.mark.slow
def test_a_weighted_update_does_not_depend_on_ranks(
    model_folder: Path, whole: Any, tmp_path: Path
) -> None:
    ranks = on_ranks(of_rank, model_folder, folder=tmp_path)
    assert len(ranks) == WORLD_SIZE
    for ours, log in ranks:
        assert distance(ours, whole[0]) <= TOLERANCE
        for name, value in whole[1].items():
            assert log[name] == pytest.approx(value, rel=1e-4), name


def test_native_models_take_the_same_weights(tmp_path: Path) -> None:
    rows = [
        row(
            user(f"say {n}"),
            assistant("one " * (n + 1)),
            loss_weight=("balanced", 2)[n % 2],
            task="ab"[n % 2],
        )
        for n in range(4)
    ]
    found, logs = [], []
    for accumulate in (1, 4):
        model = sparse_family("mixtral", router_aux_loss_coef=1.0)
        trainer, recorder = trainer_of(
            model, tiny_processor("mixtral"), rows, tmp_path, accumulate, eval_strategy="no"
        )
        trainer.train()
        trainer.evaluate(trainer.train_dataset)
        found.append(recorder.gradients)
        logs.append(trainer.state.log_history[0])
    flat = [torch.cat([g[n].flatten() for n in found[0]]) for g in found]
    assert (flat[1] - flat[0]).norm() <= TOLERANCE * flat[0].norm()
    assert logs[0]["loss/a"] == pytest.approx(logs[1]["loss/a"], rel=1e-5)
    for each in rows:
        each["loss_weight"] = 1
    model = sparse_family("mixtral", router_aux_loss_coef=1.0)
    trainer, recorder = trainer_of(model, tiny_processor("mixtral"), rows, tmp_path)
    trainer.train()
    ones = torch.cat([recorder.gradients[n].flatten() for n in found[0]])
    assert (ones - flat[0]).norm() > 0.01 * flat[0].norm()


def test_without_weights_nothing_is_added_and_nothing_logged(model_folder: Path) -> None:
    rows = [{k: v for k, v in each.items() if k != "loss_weight"} for each in make_rows()]
    model = VLMoEForConditionalGeneration.from_pretrained(model_folder)
    processor = VLMoEProcessor.from_pretrained(model_folder)
    trainer, _ = trainer_of(model, processor, rows, model_folder / "out")
    assert trainer.row_weights == RowWeights()
    batch = trainer.data_collator(trainer.train_dataset)
    assert not {"loss_weights", "task_ids"} & batch.keys()
    assert trainer._get_num_items_in_batch([batch], torch.device("cpu")).dtype != torch.float64
    _, log = gradients(model_folder, 1, rows=rows)
    assert not [name for name in log if name.startswith("loss/")]


@pytest.mark.parametrize(
    ("weight", "facts"),
    [
        (-1, r"'wrong'.*-1.*0 or more"),
        (math.nan, r"'wrong'.*nan.*finite"),
        (math.inf, r"'wrong'.*inf.*finite"),
        ("balance", r"'wrong'.*'balance'.*'balanced'"),
        (True, r"'wrong'.*True"),
    ],
)
def test_a_weight_that_cannot_be_used_is_an_error_that_names_the_row(
    weight: object, facts: str, model_folder: Path
) -> None:
    processor = VLMoEProcessor.from_pretrained(model_folder)
    model = VLMoEForConditionalGeneration.from_pretrained(model_folder)
    wrong = row(user("what?"), assistant("it"), id="wrong", loss_weight=weight)
    with pytest.raises(ValueError, match=facts):
        trainer_of(model, processor, [*make_rows(), wrong], model_folder / "out")
    with pytest.raises(ValueError, match=facts):
        VLMoECollator(processor)([wrong])


def test_weights_that_no_loss_would_read_and_tasks_that_are_not_there_are_refused(
    model_folder: Path,
) -> None:
    processor = VLMoEProcessor.from_pretrained(model_folder)
    model = VLMoEForConditionalGeneration.from_pretrained(model_folder)
    output = model_folder / "out"
    with pytest.raises(ValueError, match=r"loss_weight.*compute_loss_func.*len"):
        VLMoETrainer(
            model,
            {"output_dir": str(output), "report_to": "none", "use_cpu": True},
            train_dataset=make_rows(),
            processing_class=processor,
            compute_loss_func=len,
        )
    trainer, _ = trainer_of(model, processor, make_rows(), output)
    other = row(user("what?"), assistant("it"), id="new", task="drawing", loss_weight="balanced")
    with pytest.raises(ValueError, match=r"'new'.*'drawing'.*'caption'"):
        trainer.data_collator([other])
    unweighted = {k: v for k, v in other.items() if k != "loss_weight"}
    assert trainer.data_collator([unweighted])["loss_weights"].tolist() == [1]

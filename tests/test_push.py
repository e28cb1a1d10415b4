"""Pushing from Python and from Trainer, and loading what was pushed, with and without vlmoe."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hub_process import command, logits
from hub_server import HubServer

MODEL, RUN = "tester/model", "tester/run"
WEIGHTS = {"model.safetensors", "config.json", "generation_config.json"}
CODE = {"modeling_vlmoe.py", "configuration_vlmoe.py", "sparse_moe.py", "processing_vlmoe.py"}
PROCESSOR = {"processor_config.json", "tokenizer.json", "tokenizer_config.json"}
Process = Callable[..., Any]


def push_model(folder: Path, change: float | None = None) -> None:
    """`push_to_hub` of a saved model, by default as it is."""
    import torch

    from vlmoe import VLMoEForConditionalGeneration

    model = VLMoEForConditionalGeneration.from_pretrained(folder)
    if change is not None:
        with torch.no_grad():
            model.lm_head.weight.mul_(change)
    model.push_to_hub(MODEL)


def push_processor(folder: Path) -> None:
    """`push_to_hub` of a saved processor."""
    from vlmoe import VLMoEProcessor

    VLMoEProcessor.from_pretrained(folder).push_to_hub(MODEL)


def failure_of(function: Callable[..., None], *arguments: Any) -> str | None:
    """The error of a call, as text."""
    try:
        function(*arguments)
    except Exception as error:
        return str(error)
    return None


def downloaded(repo_id: str, revision: str = "main") -> str:
    """The folder of a snapshot."""
    from huggingface_hub import snapshot_download

    return snapshot_download(repo_id, revision=revision)


def logits_of_remote_code(source: str, revision: str = "main") -> np.ndarray:
    """`logits`, with the code of the repo."""
    return logits(source, revision, trust_remote_code=True)


def test_model_and_processor_are_one_commit_each_and_load_bit_equal_everywhere(
    hub: HubServer,
    hub_process: Process,
    hub_process_without_vlmoe: Process,
    saved_model: Path,
) -> None:
    hub_process(push_model, saved_model)
    assert len(hub.commits(MODEL)) == 2
    assert hub.files(MODEL) >= WEIGHTS | CODE - {"processing_vlmoe.py"}
    hub_process(push_processor, saved_model)
    assert len(hub.commits(MODEL)) == 3
    assert hub.files(MODEL) >= WEIGHTS | CODE | PROCESSOR

    expected = logits(saved_model)
    assert np.array_equal(hub_process(logits, MODEL), expected)
    assert np.array_equal(hub_process(logits, hub_process(downloaded, MODEL)), expected)
    trusted = hub_process_without_vlmoe(logits_of_remote_code, MODEL)
    assert np.array_equal(trusted, expected)

    hub.log.clear()
    hub_process(push_model, saved_model)
    assert not hub.requests("^PUT")


@pytest.mark.slow
def test_a_model_push_that_fails_anywhere_leaves_the_old_revision_and_can_be_repeated(
    hub: HubServer, hub_process: Process, saved_model: Path
) -> None:
    hub_process(push_model, saved_model)
    hub_process(push_processor, saved_model)
    state, old, expected = hub.state(), hub.commits(MODEL), logits(saved_model)
    hub.log.clear()
    hub_process(push_model, saved_model, 1.25)
    requests, changed = hub.requests(), hub_process(logits, MODEL)
    assert not np.array_equal(changed, expected)
    failed = []
    for number, request in enumerate(requests):
        hub.reset(state)
        hub.fail(number, 507)
        if hub_process(failure_of, push_model, saved_model, 1.25) is not None:
            failed.append(request)
            hub.fault = None
            assert [commit.sha for commit in hub.commits(MODEL)] == [commit.sha for commit in old]
            assert np.array_equal(hub_process(logits, MODEL), expected), request
            hub_process(push_model, saved_model, 1.25)
        assert len(hub.commits(MODEL)) == len(old) + 1, request
        assert np.array_equal(hub_process(logits, MODEL), changed), request
    parts = ("create", "validate-yaml", "preupload", "objects/batch", "PUT", "verify", "/commit/")
    assert all(any(part in request for request in failed) for part in parts)


def settings(output: Path, **more: Any) -> Any:
    """Training arguments for four steps, of which every second is saved."""
    from vlmoe.training.arguments import training_arguments

    return training_arguments(
        output_dir=str(output),
        max_steps=4,
        save_strategy="steps",
        save_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        eval_strategy="no",
        report_to="none",
        use_cpu=True,
        **more,
    )


def train(output: Path, model: Path, data: Path, more: dict[str, Any]) -> None:
    """`vlmoe train`."""
    from vlmoe.training.data import TrainingData
    from vlmoe.training.run import train as run

    run(str(model), TrainingData(str(data)), settings(output, **more))


def train_with_trainer(output: Path, model: Path, data: Path, more: dict[str, Any]) -> None:
    """`transformers.Trainer`, and a push when it has trained.

    Each push is waited for: Trainer pushes a folder in the background, and writes the next save
    into it meanwhile.
    """
    from transformers import Trainer, TrainerCallback

    from vlmoe import VLMoEForConditionalGeneration, VLMoEProcessor
    from vlmoe.data.collator import VLMoECollator
    from vlmoe.data.loading import load_rows

    processor = VLMoEProcessor.from_pretrained(model)
    trainer = Trainer(
        model=VLMoEForConditionalGeneration.from_pretrained(model),
        args=settings(output, **more),
        data_collator=VLMoECollator(processor),
        train_dataset=load_rows(str(data), "train"),
        processing_class=processor,
    )

    class WaitForPush(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if trainer.push_in_progress is not None:
                trainer.push_in_progress.wait_until_done()

    trainer.add_callback(WaitForPush())
    trainer.train()
    trainer.push_to_hub()


PUSH = {"push_to_hub": True, "hub_model_id": RUN, "hub_always_push": True}


def test_every_commit_of_trainer_is_a_whole_model(
    hub: HubServer,
    hub_process: Process,
    hub_process_without_vlmoe: Process,
    saved_model: Path,
    data_folder: Path,
    tmp_path: Path,
) -> None:
    output = tmp_path / "out"
    hub_process(train_with_trainer, output, saved_model, data_folder, PUSH)
    commits = hub.commits(RUN)[1:]
    steps = ["Training in progress, step 2", "Training in progress, step 4"]
    assert [commit.message for commit in commits] == [*steps, "End of training"]
    for commit in commits:
        assert commit.files.keys() >= CODE | PROCESSOR | WEIGHTS
        assert not any(name.startswith("checkpoint-") for name in commit.files)
    for revision, folder in ((commits[0].sha, output / "checkpoint-2"), ("main", output)):
        expected = logits(folder)
        assert np.array_equal(hub_process(logits, RUN, revision), expected)
        remote = hub_process_without_vlmoe(logits_of_remote_code, RUN, revision)
        assert np.array_equal(remote, expected)


def test_training_that_could_not_push_does_not_begin(
    hub: HubServer, hub_process: Process, saved_model: Path, data_folder: Path, tmp_path: Path
) -> None:
    options = ["--model", str(saved_model), "--dataset", str(data_folder), "--use_cpu"]
    options += ["--push_to_hub", "--hub_model_id", RUN, "--hub_token", "hf_wrong"]
    code, _, error = hub_process(command, "train", *options, "--output_dir", str(tmp_path / "out"))
    last = error.splitlines()[-1]
    assert code == 2 and last.startswith(f"vlmoe train: error: {RUN}: the Hub answered 401: ")
    assert "hf auth login" in last and not hub.repos and not list(tmp_path.rglob("*.*"))


def test_training_resumes_from_a_downloaded_checkpoint(
    hub: HubServer, hub_process: Process, saved_model: Path, data_folder: Path, tmp_path: Path
) -> None:
    output, resumed = tmp_path / "out", tmp_path / "resumed"
    push = PUSH | {"hub_strategy": "checkpoint"}
    hub_process(train, output, saved_model, data_folder, push)
    first = next(commit for commit in hub.commits(RUN) if commit.message.endswith("2, checkpoint"))
    snapshot = hub_process(downloaded, RUN, first.sha)
    resume = {"resume_from_checkpoint": str(Path(snapshot) / "last-checkpoint")}
    hub_process(train, resumed, saved_model, data_folder, resume)
    assert json.loads((resumed / "train_results.json").read_text())["resumed_at_step"] == 2
    weights = "model.safetensors"
    assert (resumed / weights).read_bytes() == (output / weights).read_bytes()

    last = hub.commits(RUN)[-1]
    assert last.message == "End of training"
    assert last.files[weights].data == (output / weights).read_bytes()
    assert last.files.keys() >= CODE | PROCESSOR | {"train_results.json", "README.md"}
    assert RUN in last.files["README.md"].data.decode()
    assert not any(name.startswith((".incoming", "_", "checkpoint-")) for name in last.files)

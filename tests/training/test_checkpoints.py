"""Whole checkpoints are told from broken ones, file by file."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tampering import rename, tamper

from vlmoe.hub.whole_model import model_problems
from vlmoe.training.arguments import training_arguments
from vlmoe.training.checkpoints import (
    checkpoint_folders,
    checkpoint_problems,
    find_checkpoint,
    has_whole_weights,
    last_complete_checkpoint,
    set_aside_newer,
)
from vlmoe.training.data import TrainingData
from vlmoe.training.run import train

NEEDED = (
    "config.json",
    "model.safetensors",
    "optimizer.pt",
    "processor_config.json",
    "rng_state.pth",
    "scheduler.pt",
    "tokenizer.json",
    "tokenizer_config.json",
    "trainer_state.json",
)
CHECKED = (*NEEDED, "generation_config.json", "training_args.bin")


@pytest.fixture(scope="module")
def run_folder(
    tmp_path_factory: pytest.TempPathFactory, saved_model: Path, data_folder: Path
) -> Path:
    """The output folder of a real training: checkpoint-1, checkpoint-2, the final model."""
    folder = tmp_path_factory.mktemp("run")
    arguments = training_arguments(
        output_dir=str(folder),
        max_steps=2,
        save_strategy="steps",
        save_steps=1,
        report_to="none",
        use_cpu=True,
    )
    data = TrainingData(str(data_folder), max_train_rows=2)
    train(str(saved_model), data, arguments)
    return folder


@pytest.fixture
def run_copy(run_folder: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(run_folder, tmp_path / "run"))


def truncate(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: len(content) * 2 // 3])


def truncate_a_little(file: Path) -> None:
    content = file.read_bytes().rstrip()
    file.write_bytes(content[:-1])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def overwrite_start(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(b"\x00\xff" * 32 + content[64:])


def test_a_checkpoint_that_trainer_finished_is_whole(run_folder: Path) -> None:
    assert [folder.name for folder in checkpoint_folders(run_folder)] == [
        "checkpoint-1",
        "checkpoint-2",
    ]
    assert checkpoint_problems(run_folder / "checkpoint-2") == []
    assert last_complete_checkpoint(run_folder) == run_folder / "checkpoint-2"
    assert model_problems(run_folder) == []


@pytest.mark.parametrize("name", NEEDED)
def test_a_missing_file_is_named_and_the_folder_skipped(
    run_copy: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    (run_copy / "checkpoint-2" / name).unlink()
    [problem] = checkpoint_problems(run_copy / "checkpoint-2")
    assert problem.startswith(f"{name}: missing")
    with caplog.at_level(logging.WARNING):
        assert last_complete_checkpoint(run_copy) == run_copy / "checkpoint-1"
    assert "checkpoint-2" in caplog.text and name in caplog.text


@pytest.mark.parametrize("damage", [truncate, truncate_a_little, empty, overwrite_start])
@pytest.mark.parametrize("name", CHECKED)
def test_a_damaged_file_is_named(run_copy: Path, name: str, damage: Callable[[Path], None]) -> None:
    checkpoint = run_copy / "checkpoint-2"
    damage(checkpoint / name)
    [problem] = checkpoint_problems(checkpoint)
    assert problem.startswith(f"{name}: ")
    with pytest.raises(ValueError, match=f"checkpoint-2 cannot be resumed from: {name}: "):
        find_checkpoint(str(checkpoint), run_copy)


def test_a_flipped_byte_in_an_archive_is_seen(run_copy: Path) -> None:
    file = run_copy / "checkpoint-2" / "optimizer.pt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0xFF
    file.write_bytes(content)
    assert "optimizer.pt" in checkpoint_problems(run_copy / "checkpoint-2")[0]


def test_a_checkpoint_is_of_the_step_that_its_name_says(run_copy: Path) -> None:
    (run_copy / "checkpoint-2").rename(run_copy / "checkpoint-7")
    assert checkpoint_problems(run_copy / "checkpoint-7") == [
        "trainer_state.json: is of step 2, not of step 7"
    ]
    (run_copy / "checkpoint-7").rename(run_copy / "kept")
    assert checkpoint_problems(run_copy / "kept") == []


def test_a_checkpoint_that_a_signal_handler_did_not_finish_is_incomplete(run_copy: Path) -> None:
    (run_copy / "checkpoint-2" / "checkpoint-is-incomplete.txt").write_text("step 2")
    assert "checkpoint-is-incomplete.txt" in checkpoint_problems(run_copy / "checkpoint-2")[0]


def test_shards_are_held_against_their_index(
    tmp_path: Path, tiny_model: Callable[..., torch.nn.Module]
) -> None:
    tiny_model().save_pretrained(tmp_path, max_shard_size="40KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert model_problems(tmp_path) == []
    lost = min(load_file(shards[1]))
    index_file = tmp_path / "model.safetensors.index.json"
    index = json.loads(index_file.read_text())
    index["weight_map"][f"{lost}.other"] = shards[1].name
    index_file.write_text(json.dumps(index))
    assert model_problems(tmp_path) == [
        f"model.safetensors.index.json: the tensor {lost}.other is in no shard"
    ]
    shards[1].unlink()
    assert model_problems(tmp_path) == [
        f"model.safetensors.index.json: the shard {shards[1].name} is missing"
    ]


@pytest.mark.parametrize("word", ["last", "true", "True", True])
def test_last_means_the_newest_whole_checkpoint(run_copy: Path, word: str | bool) -> None:
    (run_copy / "checkpoint-2" / "trainer_state.json").unlink()
    assert find_checkpoint(word, run_copy) == run_copy / "checkpoint-1"


def test_last_starts_from_the_beginning_where_kills_left_nothing_else(
    run_copy: Path, tmp_path: Path
) -> None:
    for name in ("trainer_state.json", "optimizer.pt"):  # written after the weights
        (run_copy / "checkpoint-1" / name).unlink()
    truncate(run_copy / "checkpoint-2" / "model.safetensors")
    assert find_checkpoint("last", run_copy) is None
    assert find_checkpoint("last", tmp_path / "new") is None


@pytest.mark.parametrize("word", [None, "", "false", False])
def test_a_new_run_does_not_mix_with_an_older_one(
    run_copy: Path, tmp_path: Path, word: str | bool | None
) -> None:
    assert find_checkpoint(word, tmp_path / "new") is None
    with pytest.raises(ValueError, match=r"checkpoint-2 .*`resume_from_checkpoint` last"):
        find_checkpoint(word, run_copy)


def test_a_missing_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="checkpoint-99"):
        find_checkpoint(str(tmp_path / "checkpoint-99"), tmp_path)


def test_later_checkpoints_make_way_for_the_run_that_starts_earlier(run_copy: Path) -> None:
    shutil.copytree(run_copy / "checkpoint-1", run_copy / "checkpoint-3")  # incomplete: wrong step
    set_aside_newer(run_copy, run_copy / "checkpoint-1")
    assert [folder.name for folder in checkpoint_folders(run_copy)] == ["checkpoint-1"]
    assert checkpoint_problems(run_copy / "_replaced-checkpoint-2") == []
    assert (run_copy / "_incomplete-checkpoint-3" / "model.safetensors").is_file()


def without_optimizer(checkpoint: Path) -> None:
    """As --save_only_model leaves it."""
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (checkpoint / name).unlink()


def without_scheduler(checkpoint: Path) -> None:
    (checkpoint / "scheduler.pt").unlink()


def without_processor(checkpoint: Path) -> None:
    (checkpoint / "processor_config.json").unlink()


def pickled(checkpoint: Path) -> None:
    torch.save(load_file(checkpoint / "model.safetensors"), checkpoint / "pytorch_model.bin")
    (checkpoint / "model.safetensors").unlink()


def sharded_by_fsdp(checkpoint: Path) -> None:
    shards = checkpoint / "pytorch_model_fsdp_0"
    shards.mkdir()
    (checkpoint / "model.safetensors").rename(shards / "__0_0.distcp")
    (checkpoint / "scheduler.pt").unlink()


def of_other_weights(checkpoint: Path) -> None:
    """Trainer would leave the bank as it was before."""
    tamper(checkpoint, rename)


NOT_RESUMABLE = {
    of_other_weights: r"model.safetensors: 1 missing \(.*gate_up_proj\); 1 unexpected",
    without_optimizer: "optimizer.pt: missing",
    without_scheduler: "scheduler.pt: missing",
    without_processor: "processor_config.json: missing",
    pickled: "pytorch_model.bin: pickled weights",
    sharded_by_fsdp: "scheduler.pt: missing",
}


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file()
    }


@pytest.mark.parametrize("change", NOT_RESUMABLE, ids=lambda change: change.__name__)
def test_last_stops_where_only_the_weights_could_be_gone_on_from(
    run_copy: Path, change: Callable[[Path], None]
) -> None:
    for step in (1, 2):
        change(run_copy / f"checkpoint-{step}")
    before = files_of(run_copy)
    with pytest.raises(ValueError, match=f"checkpoint-2 cannot be .*{NOT_RESUMABLE[change]}") as e:
        find_checkpoint("last", run_copy)
    usable = change in (without_optimizer, without_scheduler)
    assert ("accelerate merge-weights" in str(e.value)) == (change is sharded_by_fsdp)
    assert (f"`model` {run_copy / 'checkpoint-2'}" in str(e.value)) == usable
    assert files_of(run_copy) == before


@pytest.mark.parametrize("change", NOT_RESUMABLE, ids=lambda change: change.__name__)
def test_good_weights_are_renamed_and_never_deleted(
    run_copy: Path, change: Callable[[Path], None]
) -> None:
    change(run_copy / "checkpoint-2")
    before = files_of(run_copy / "checkpoint-2")
    found = find_checkpoint("last", run_copy)
    assert found == run_copy / "checkpoint-1"
    set_aside_newer(run_copy, found)
    assert files_of(run_copy / "_incomplete-checkpoint-2") == before
    shutil.copytree(run_copy / "_incomplete-checkpoint-2", run_copy / "checkpoint-2")
    set_aside_newer(run_copy, found)
    assert files_of(run_copy / "_incomplete-checkpoint-2.1") == before


@pytest.mark.parametrize("damage", [truncate, truncate_a_little, empty, overwrite_start])
def test_half_written_weights_are_deleted(run_copy: Path, damage: Callable[[Path], None]) -> None:
    damage(run_copy / "checkpoint-2" / "model.safetensors")
    set_aside_newer(run_copy, run_copy / "checkpoint-1")
    assert not list(run_copy.glob("*checkpoint-2*"))


def test_shards_count_as_whole_only_together(
    tmp_path: Path, tiny_model: Callable[..., torch.nn.Module]
) -> None:
    tiny_model().save_pretrained(tmp_path, max_shard_size="40KB")
    assert has_whole_weights(tmp_path)
    shard = max(tmp_path.glob("model-*.safetensors"))
    truncate(shard)
    assert not has_whole_weights(tmp_path)
    shard.unlink()
    assert not has_whole_weights(tmp_path)


def test_a_link_to_nothing_is_no_file(run_copy: Path) -> None:
    weights = run_copy / "model.safetensors"
    weights.unlink()
    weights.symlink_to(run_copy / "nowhere")
    assert model_problems(run_copy) == ["model.safetensors: missing"]


def test_a_folder_in_the_place_of_a_file_is_a_missing_file(
    saved_model: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(saved_model, tmp_path / "model")
    (folder / "tokenizer_config.json").unlink()
    (folder / "tokenizer_config.json").mkdir()
    assert "tokenizer_config.json: missing" in model_problems(folder)

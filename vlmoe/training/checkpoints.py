# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Which checkpoint of a run is whole, and which one to resume from.

`transformers.Trainer` writes a checkpoint in place: first the weights, then config, processor and
`training_args.bin`, then `optimizer.pt`, `scheduler.pt`, `scaler.pt`, `rng_state*.pth`, and
`trainer_state.json` last. Its own `get_last_checkpoint` takes the highest number, whatever is in
that folder. A run that is killed while it writes leaves a folder that has to be told from a whole
one, so each file is judged (file_checks.py), and `trainer_state.json` must count as many steps as
the folder's name says.

A folder that cannot be resumed from may hold good weights all the same: they are never deleted, at
most their folder is renamed.
"""

import logging
import re
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

from ..hub.atomic_files import free_name, remove_folder
from ..hub.file_checks import content_problems
from ..hub.input_errors import InputError
from ..hub.json_files import JsonObject, read_json
from ..hub.whole_model import (
    PICKLED_WEIGHTS,
    SHARDED_WEIGHTS,
    WEIGHT_FILES,
    absent_files,
    weights_problems,
)

logger = logging.getLogger(__name__)

STATE_FILE = "trainer_state.json"
LAST_WORDS = ("last", "true")
NO_WORDS = ("", "false", "no", "none")

_SINGLE_WEIGHTS = (*WEIGHT_FILES, *PICKLED_WEIGHTS)
_FULL_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
# What stands for the optimizer: plain Trainer, FSDP (one file, or a folder of shards), DeepSpeed.
_OPTIMIZER_PATTERNS = ("optimizer.pt", "optimizer.bin", "optimizer_*", "global_step*")


def checkpoint_problems(path: str | Path) -> list[str]:
    """Return what keeps a folder from being resumed from, one `file: problem` each.

    The list is empty for a whole checkpoint.
    """
    folder = Path(path)
    if not folder.is_dir():
        return [f"{folder}: {'is not a folder' if folder.exists() else 'there is no such folder'}"]
    problems = [*_presence_problems(folder), *content_problems(folder, (STATE_FILE,))]
    return [*_state_problems(folder), *(problems or weights_problems(folder))]


def last_complete_checkpoint(output_dir: str | Path) -> Path | None:
    """Return the newest whole `checkpoint-<step>` in `output_dir`, or None.

    A warning names incomplete ones.
    """
    for folder in reversed(checkpoint_folders(output_dir)):
        problems = checkpoint_problems(folder)
        if not problems:
            return folder
        logger.warning("Skipping the incomplete checkpoint %s: %s", folder, "; ".join(problems))
    return None


def checkpoint_folders(output_dir: str | Path) -> list[Path]:
    """All `checkpoint-<step>` folders in `output_dir`, whole or not, by step."""
    output_dir = Path(output_dir)
    if not output_dir.is_dir():
        return []
    found = [
        path
        for path in output_dir.iterdir()
        if path.is_dir() and _FULL_CHECKPOINT.fullmatch(path.name)
    ]
    return sorted(found, key=checkpoint_step)


def checkpoint_step(folder: Path) -> int:
    """Return the step in the name of a `checkpoint-<step>` folder; -1 for another name."""
    match = _FULL_CHECKPOINT.fullmatch(folder.name)
    return int(match.group(1)) if match else -1


def find_checkpoint(resume: str | bool | None, output_dir: str | Path) -> Path | None:
    """Find the checkpoint that `resume_from_checkpoint` means; None starts from the beginning.

    - `last` or `true`: the newest whole checkpoint in `output_dir`; where there is none but what a
      kill left of a save, training starts from the beginning, so that one command both starts a
      run and continues it after a kill;
    - a path: that checkpoint, which must be whole;
    - nothing, or `false`: a new run, for which `output_dir` must not hold checkpoints of another
      one.

    Raises:
        FileNotFoundError: the path does not exist.
        ValueError: the checkpoint is not whole, `last` finds only finished checkpoints that cannot
            be resumed from, or a new run would mix with the checkpoints of an older one.
    """
    word = "" if resume is None else str(resume)
    if word.lower() in NO_WORDS:
        found = checkpoint_folders(output_dir)
        if found:
            raise ValueError(
                f"{output_dir} already holds {found[-1].name} of an earlier run. Go on with it by "
                "`resume_from_checkpoint` last, choose another `output_dir`, or delete it."
            )
        return None
    if word.lower() in LAST_WORDS:
        checkpoint = last_complete_checkpoint(output_dir)
        if checkpoint is None:
            _require_only_unfinished(output_dir)
            logger.warning(
                "%s holds no complete checkpoint: training starts from the beginning.", output_dir
            )
        return checkpoint
    return require_complete(Path(word).expanduser())


def _require_only_unfinished(output_dir: str | Path) -> None:
    """Refuse to start over where the weights of a finished checkpoint could be gone on from.

    Trainer writes `trainer_state.json` last: without it a kill ended the save.

    Raises:
        ValueError: names the newest such checkpoint, what it lacks, and the way on.
    """
    for folder in reversed(checkpoint_folders(output_dir)):
        if has_whole_weights(folder) and not list(_state_problems(folder)):
            raise _not_resumable(folder, checkpoint_problems(folder))


def set_aside_newer(output_dir: str | Path, checkpoint: Path | None) -> None:
    """Set checkpoints later than `checkpoint` (None: all) aside for the run that starts there.

    Trainer would write into such folders, file by file, and a kill would leave old and new files
    mixed. Complete ones, of a course that is given up, are renamed to
    `_replaced-checkpoint-<step>`, incomplete ones to `_incomplete-checkpoint-<step>`; only what
    holds no whole weights is deleted. Trainer does not push names that start so.
    """
    start = -1 if checkpoint is None else read_state(checkpoint)["global_step"]
    for folder in checkpoint_folders(output_dir):
        if checkpoint_step(folder) <= start or (checkpoint and folder.samefile(checkpoint)):
            continue
        problems = checkpoint_problems(folder)
        if problems and not has_whole_weights(folder):
            logger.warning("Deleting the incomplete checkpoint %s: no whole weights.", folder)
            remove_folder(folder)
            continue
        kind = "incomplete" if problems else "replaced"
        target = free_name(folder.with_name(f"_{kind}-{folder.name}"))
        logger.warning(
            "%s is later than where this run starts: renamed to %s.", folder, target.name
        )
        folder.rename(target)


def require_complete(path: str | Path) -> Path:
    """`path` itself, if it is a whole checkpoint.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: the checkpoint is not whole; the message names each file and its problem.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"There is no checkpoint folder {folder}. Give a checkpoint-<step> folder, or `last`."
        )
    problems = checkpoint_problems(folder)
    if problems:
        raise _not_resumable(folder, problems)
    return folder


def has_whole_weights(folder: Path) -> bool:
    """Whether a folder holds weights that may be good.

    Files of safetensors and pickles must read whole, all shards of an index be there. What cannot
    be judged without loading, such as shards of FSDP or DeepSpeed, counts as whole.
    """
    names = {path.name for path in folder.iterdir() if not _is_empty(path)}
    if any(fnmatch(name, pattern) for name in names for pattern in SHARDED_WEIGHTS):
        return True
    damaged = {problem.partition(":")[0] for problem in content_problems(folder)}
    return any(
        name in _SINGLE_WEIGHTS and not damaged & _shards(folder / name) for name in names - damaged
    )


def _shards(file: Path) -> set[str]:
    """Return the files that a whole index names; of another file, none."""
    is_index = file.name.endswith(".index.json")
    return set(read_json(file)["weight_map"].values()) if is_index else set()


def _is_empty(path: Path) -> bool:
    if path.is_dir():
        return not any(path.iterdir())
    return not path.is_file() or path.stat().st_size == 0


def _not_resumable(folder: Path, problems: list[str]) -> ValueError:
    """Return the error for an incomplete checkpoint, with the remedy if its weights are whole."""
    way_on = ""
    lost = [*absent_files(folder), *weights_problems(folder)]
    if shards := sorted(folder.glob("pytorch_model_fsdp_*")):
        way_on = (
            f" `accelerate merge-weights {shards[0]} FOLDER` makes a weights file of its shards."
        )
    elif not lost and has_whole_weights(folder):
        way_on = (
            f" To go on from its weights, with a new optimizer: `model` {folder}, another "
            "`output_dir`, and no `resume_from_checkpoint`."
        )
    return ValueError(
        f"The checkpoint {folder} cannot be resumed from: {'; '.join(problems)}.{way_on}"
    )


def read_state(checkpoint: Path) -> JsonObject:
    """Read the trainer state of a whole checkpoint, as a dict: `global_step`, `log_history`, ..."""
    return read_json(checkpoint / STATE_FILE, finite=False)


def _state_problems(folder: Path) -> Iterator[str]:
    file = folder / STATE_FILE
    if not file.is_file():
        yield f"{STATE_FILE}: missing (Trainer writes it last: the checkpoint was not finished)"
        return
    try:
        state = read_state(folder)
    except InputError as error:
        yield str(error).removeprefix(f"{folder}/").rstrip(".")
        return
    step = state.get("global_step")
    if type(step) is not int or not isinstance(state.get("log_history"), list):
        yield f"{STATE_FILE}: no global_step or no log_history"
    elif checkpoint_step(folder) not in (-1, step):
        yield f"{STATE_FILE}: is of step {step}, not of step {checkpoint_step(folder)}"


def _presence_problems(folder: Path) -> Iterator[str]:
    """Yield the absent files that Trainer would replace silently by a fresh state."""
    yield from absent_files(folder)
    names = [path.name for path in folder.iterdir()]
    if "checkpoint-is-incomplete.txt" in names:
        yield "checkpoint-is-incomplete.txt: Trainer was writing on a signal and did not finish"
    if not any(True for pattern in _OPTIMIZER_PATTERNS for _ in folder.glob(pattern)):
        yield "optimizer.pt: missing (a checkpoint of `save_only_model` cannot be resumed from)"
    if "scheduler.pt" not in names and not any(name.startswith("global_step") for name in names):
        yield "scheduler.pt: missing"
    if not any(folder.glob("rng_state*.pth")):
        yield "rng_state.pth: missing"

# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Push the folder of a trained model to the Hugging Face Hub, in one commit.

    vlmoe push outputs/tiny --repo_id user/tiny-vlmoe

- Pushed are the files that others need, from the folder itself: weights, config, processor, the
  model's code, results, pictures and the card, which is written anew unless it is its author's.
  Checkpoints, optimizer state, TensorBoard logs and pickled arguments stay at home.
- The commit is whole or absent: until it is made, the repo loads as it did before. What was
  uploaded before a failure is not uploaded again.
- Weights of an earlier push that the folder does not have (other shards) are removed in the same
  commit; `from_pretrained` could take them for the new ones.
"""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from .command_line import run_command
from .option_parser import command_options, require
from .options import PushOptions

EPILOG = """\
examples:
  vlmoe push outputs/tiny --repo_id user/tiny-vlmoe
  vlmoe push outputs/tiny --repo_id user/tiny-vlmoe --private --message "Three epochs more"
  vlmoe push outputs/tiny --repo_id user/tiny-vlmoe --revision experiment

Log in first with `hf auth login`, or set HF_TOKEN to a token with write access."""

WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
VOCABULARY = ("*.model", "vocab.txt", "merges.txt")  # and tokenizer.json
PUSHED = (*WEIGHTS, *VOCABULARY, "*.json", "*.jinja", "*.py", "*.png", "README.md", "LICENSE")
LEFT_OUT = (".*", "trainer_state.json")
# What `from_pretrained` looks for in a repo, if only to read it before the new weights.
OLD_WEIGHTS = ("model*.safetensors*", "adapter_*", "pytorch_model*.bin*")
MAIN = "main"
REMEDIES = {
    401: "the token is missing or not valid: run `hf auth login`, or set HF_TOKEN to a token with "
    "write access (https://huggingface.co/settings/tokens)",
    403: "the token may not write there: use one with write access to it, or a --repo_id in your "
    "own namespace",
    404: "there is no such repo, namespace or branch that the token may see: check --repo_id and "
    "--revision",
    412: "its branch has got another commit since the push began: look at it, then push again",
}


@dataclass(frozen=True)
class Pushed:
    """What a push did.

    Attributes:
        repo_id: the repo, with its namespace.
        revision: the branch.
        commit: its newest commit.
        is_new: False if the repo already held all of this, and no commit was made.
        url: where to look at the commit.
        files: the files of the folder that the commit holds.
        bytes: their size in all.
        left_out: what else is in the folder.
    """

    repo_id: str
    revision: str
    commit: str
    is_new: bool
    url: str
    files: list[str]
    bytes: int
    left_out: list[str]


def main(argv: list[str]) -> None:
    """Run `vlmoe push`."""
    parsed = command_options(
        argv,
        [PushOptions],
        usage="vlmoe push FOLDER --repo_id USER/NAME [options]",
        description="Push the folder of a trained model to the Hugging Face Hub, in one commit.",
        epilog=EPILOG,
        argument=("folder", "Folder of the model, as `vlmoe train` saves it."),
    )
    if parsed is None:
        return
    options, rest = parsed
    print(f"\n{push_table(push(rest.folder, options))}")


def push(folder: str | Path, options: PushOptions) -> Pushed:
    """Push the folder of a saved model as one commit.

    Raises:
        ValueError: the folder holds no whole model, another process writes there, its card has
            wrong metadata, or an option has a wrong value.
        FileNotFoundError: there is no such folder.
        OSError: the Hub cannot be reached or refuses; the message names the repo and the remedy.
    """
    repo_id = require(options.repo_id, "repo_id", "push")
    from huggingface_hub.utils import validate_repo_id

    validate_repo_id(repo_id)
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no model folder {folder}.")
    from vlmoe.hub.folder_lock import folder_lock

    is_read_only = not os.access(folder, os.W_OK)  # then nobody else writes there either
    with nullcontext() if is_read_only else folder_lock(folder):
        check_folder(folder)
        return _push(folder, repo_id, options)


def _push(folder: Path, repo_id: str, options: PushOptions) -> Pushed:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    from vlmoe.hub.folder_lock import LOCK_FILE
    from vlmoe.lora.card import pushed_instead

    if (folder / "config.json").is_file():  # an adapter has none; PEFT wrote its card
        from vlmoe.hub.model_card import write_model_card

        write_model_card(folder, repo_id=repo_id)
    files = files_to_push(folder)
    contents: dict[str, Path | bytes] = {name: folder / name for name in files}
    contents |= pushed_instead(folder)
    revision = options.revision or MAIN
    api = HfApi(token=options.token, library_name="vlmoe")
    repo_id = ensure_repo(repo_id, options.token, options.private)
    with hub_errors(repo_id):
        if revision != MAIN and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        before = api.model_info(repo_id, revision=revision)
        there = [sibling.rfilename for sibling in before.siblings or []]
        commit = api.create_commit(
            repo_id,
            [
                *(CommitOperationAdd(*item) for item in contents.items()),
                *(CommitOperationDelete(name) for name in old_weights(there, files)),
            ],
            commit_message=options.message or f"Upload {folder.absolute().name}",
            revision=revision,
            parent_commit=before.sha,
        )
    return Pushed(
        repo_id=repo_id,
        revision=revision,
        commit=commit.oid,
        is_new=commit.oid != before.sha,
        url=str(commit.commit_url),
        files=files,
        bytes=sum(
            len(each) if isinstance(each, bytes) else each.stat().st_size
            for each in contents.values()
        ),
        left_out=sorted({path.name for path in folder.iterdir()} - {*files, LOCK_FILE}),
    )


def ensure_repo(repo_id: str, token: str | None = None, private: bool | None = None) -> str:
    """The repo's id with its namespace; the repo is created if need be.

    Raises:
        ValueError: that is no name of a repo.
        OSError: as for `push`.
    """
    from huggingface_hub import HfApi

    with hub_errors(repo_id):
        api = HfApi(token=token, library_name="vlmoe")
        return api.create_repo(repo_id, private=private or None, exist_ok=True).repo_id


def check_folder(folder: Path) -> None:
    """Refuse a folder from which nobody could load the model.

    Raises:
        ValueError: it holds no whole model, weights only as a pickle, numbers in them that are not
            finite, or a chat template that does not end.
    """
    from vlmoe.hub.input_errors import reading
    from vlmoe.hub.template_trial import try_templates
    from vlmoe.hub.whole_model import require_finite_files
    from vlmoe.training.checkpoints import model_problems

    problems = model_problems(folder)
    if problems:
        raise ValueError(f"{folder} holds no whole model: {'; '.join(problems)}.")
    require_finite_files(folder)
    template = folder / "chat_template.jinja"
    if template.is_file():
        with reading(str(template)):
            text = template.read_text(encoding="utf-8")
        try_templates(text, str(folder))


def files_to_push(folder: Path) -> list[str]:
    """Names of the folder's own files that go to the Hub, sorted."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    return [name for name in names if _matches(name, PUSHED) and not _matches(name, LEFT_OUT)]


def old_weights(there: list[str], files: list[str]) -> list[str]:
    """Weight files of the repo's own folder that the new commit does not replace."""
    return [
        name
        for name in there
        if "/" not in name and _matches(name, OLD_WEIGHTS) and name not in files
    ]


@contextmanager
def hub_errors(repo_id: str) -> Iterator[None]:
    """Turn what goes wrong between us and the Hub into an `OSError` that names repo and remedy."""
    from httpx2 import HTTPError
    from huggingface_hub.errors import OfflineModeIsEnabled

    try:
        yield
    except RuntimeError as error:  # huggingface_hub's, around the reason why an upload failed
        _close_progress_bars()
        raise _hub_error(repo_id, error.__cause__ or error) from error
    except (HTTPError, OfflineModeIsEnabled, json.JSONDecodeError) as error:
        raise _hub_error(repo_id, error) from error


def _close_progress_bars() -> None:
    """End the bars that a failed upload leaves open, so that the error gets a line of its own."""
    from huggingface_hub.utils import tqdm

    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()


def _hub_error(repo_id: str, error: BaseException) -> OSError:
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        reason = f"the Hub answered {status}"
        remedy = REMEDIES.get(status, f"{error.server_message or error}; push again later")
    elif isinstance(error, OfflineModeIsEnabled):
        reason, remedy = "HF_HUB_OFFLINE is set", "unset it and push again"
    else:
        reason = f"the connection failed ({error or type(error).__name__})"
        remedy = "check the network, and HF_ENDPOINT if you set it, then push again"
    return OSError(f"{repo_id}: {reason}: {remedy}.")


def push_table(pushed: Pushed) -> str:
    """What was pushed, one line each."""
    rows = {
        "repo": pushed.repo_id,
        "branch": pushed.revision,
        "commit": f"{pushed.commit[:12]}{'' if pushed.is_new else ' (nothing new: none was made)'}",
        "files": str(len(pushed.files)),
        "bytes": f"{pushed.bytes:,}",
        "left out": ", ".join(pushed.left_out) or "-",
        "look at": pushed.url,
    }
    return "\n".join(f"{name:<10}{value}" for name, value in rows.items())


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


if __name__ == "__main__":
    sys.exit(run_command("vlmoe push", main))

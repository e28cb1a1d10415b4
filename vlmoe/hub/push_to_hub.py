# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Push the folder of a saved model or adapter to the Hugging Face Hub, in one commit.

- The commit holds the files that others need, from the folder itself: weights, config, processor,
  the model's code, results, pictures and the card. The card is rendered again unless it was edited
  by hand. Checkpoints, optimizer state, TensorBoard logs and pickled arguments are not pushed.
- The commit is whole or absent: until it is made, the repo loads as before. Files that were
  uploaded before a failure are not uploaded again.
- The same commit removes weights of an earlier push that the folder lacks (other shards):
  `from_pretrained` could load them in place of the new ones.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import huggingface_hub
from httpx2 import HTTPError
from huggingface_hub import CommitOperationAdd, CommitOperationDelete
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import tqdm, validate_repo_id

from .adapter_card import pushed_instead
from .folder_lock import LOCK_FILE, folder_lock
from .input_errors import reading
from .model_card import write_model_card
from .template_trial import try_templates
from .whole_model import model_problems, require_finite_files

WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
VOCABULARY = ("*.model", "vocab.txt", "merges.txt")  # and tokenizer.json
PUSHED = (*WEIGHTS, *VOCABULARY, "*.json", "*.jinja", "*.py", "*.png", "README.md", "LICENSE")
LEFT_OUT = (".*", "trainer_state.json")
# `from_pretrained` looks for these in a repo, some of them before it looks for the new weights.
OLD_WEIGHTS = ("model*.safetensors*", "adapter_*", "pytorch_model*.bin*")
MAIN = "main"
REMEDIES = {
    401: "the token is missing or not valid: run `hf auth login`, or set HF_TOKEN to a token with "
    "write access (https://huggingface.co/settings/tokens)",
    403: "the token may not write there: use one with write access to it, or a repo in your own "
    "namespace",
    404: "there is no such repo, namespace or branch that the token may see: check the name of the "
    "repo and the revision",
    412: "its branch has got another commit since the push began: look at it, then push again",
}


@dataclass(frozen=True)
class PushResult:
    """The outcome of a push.

    Attributes:
        repo_id: the repo, with its namespace.
        revision: the branch.
        commit: its newest commit.
        is_new: False if the repo already held all of this, and no commit was made.
        url: the page of the commit.
        files: the files of the folder that the commit holds.
        bytes: their size in all.
        left_out: the other contents of the folder.
    """

    repo_id: str
    revision: str
    commit: str
    is_new: bool
    url: str
    files: list[str]
    bytes: int
    left_out: list[str]

    def table(self) -> str:
        """Format the result as text, one line for each fact."""
        remark = "" if self.is_new else " (nothing new: none was made)"
        rows = {
            "repo": self.repo_id,
            "branch": self.revision,
            "commit": f"{self.commit[:12]}{remark}",
            "files": str(len(self.files)),
            "bytes": f"{self.bytes:,}",
            "left out": ", ".join(self.left_out) or "-",
            "look at": self.url,
        }
        return "\n".join(f"{name:<10}{value}" for name, value in rows.items())


def push(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    token: str | None = None,
) -> PushResult:
    """Push the folder of a saved model or adapter as one commit.

    Args:
        folder: as training or `save_pretrained` wrote it.
        repo_id: the repo, `user/name`; it is created if need be.
        private: create it as a private one; an existing repo stays as it is.
        revision: the branch to push to, created if need be; by default `main`.
        message: of the commit; by default `Upload` and the name of the folder.
        token: with write access; by default HF_TOKEN, or that of `hf auth login`.

    Raises:
        ValueError: the folder holds no whole model, another process writes there, its card has
            wrong metadata, or an argument has a wrong value.
        FileNotFoundError: there is no such folder.
        OSError: the Hub cannot be reached or refuses; the message names the repo and the remedy.
    """
    validate_repo_id(repo_id)
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no model folder {folder}.")
    is_read_only = not os.access(folder, os.W_OK)  # then nobody else writes there either
    with nullcontext() if is_read_only else folder_lock(folder):
        check_folder(folder)
        if (folder / "config.json").is_file():  # an adapter has none; PEFT wrote its card
            write_model_card(folder, repo_id=repo_id)
        repo_id = ensure_repo(repo_id, token, private)
        return _commit(folder, repo_id, revision or MAIN, message, token)


def _commit(
    folder: Path, repo_id: str, revision: str, message: str | None, token: str | None
) -> PushResult:
    """Upload the folder's files to a repo that exists."""
    files = files_to_push(folder)
    contents: dict[str, Path | bytes] = {name: folder / name for name in files}
    contents |= pushed_instead(folder)
    api = huggingface_hub.HfApi(token=token, library_name="vlmoe")
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
            commit_message=message or f"Upload {folder.absolute().name}",
            revision=revision,
            parent_commit=before.sha,
        )
    return PushResult(
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
    """Create the repo if need be, and return its id with its namespace.

    Raises:
        ValueError: that is no name of a repo.
        OSError: as for `push`.
    """
    with hub_errors(repo_id):
        api = huggingface_hub.HfApi(token=token, library_name="vlmoe")
        return api.create_repo(repo_id, private=private or None, exist_ok=True).repo_id


def check_folder(folder: Path) -> None:
    """Refuse a folder from which nobody could load the model.

    Raises:
        ValueError: it holds no whole model, weights only as a pickle, numbers in them that are not
            finite, or a chat template that does not end.
    """
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
    """Return the names of the folder's own files that go to the Hub, sorted."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    return [name for name in names if _matches(name, PUSHED) and not _matches(name, LEFT_OUT)]


def old_weights(there: list[str], files: list[str]) -> list[str]:
    """Return the weight files of the repo's own folder that the new commit does not replace."""
    return [
        name
        for name in there
        if "/" not in name and _matches(name, OLD_WEIGHTS) and name not in files
    ]


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


@contextmanager
def hub_errors(repo_id: str) -> Iterator[None]:
    """Turn a failure between us and the Hub into an `OSError` that names repo and remedy."""
    try:
        yield
    except RuntimeError as error:  # huggingface_hub's, around the reason why an upload failed
        for bar in list(getattr(tqdm, "_instances", ())):
            bar.close()  # left open by the upload; the error gets a line for itself
        raise _hub_error(repo_id, error.__cause__ or error) from error
    except (HTTPError, OfflineModeIsEnabled, json.JSONDecodeError) as error:
        raise _hub_error(repo_id, error) from error


def _hub_error(repo_id: str, error: BaseException) -> OSError:
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

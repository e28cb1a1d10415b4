# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Allow one writer at a time in a folder.

A writer holds an `flock` on the file `_vlmoe.lock` in its folder. The operating system releases the
lock when the process ends, however it ends. The file names its holder and start time in JSON.

- The holder deletes the file at the end. The next writer takes over a file that a killed process
  left. A file is deleted only under its own lock, and a lock on a file that is no longer in the
  folder does not count: two writers never hold different files of one name.
- In one process the lock is re-entrant. Processes that the holder starts inherit it, by a token in
  their environment.
- Names with a leading underscore are not pushed to the Hub, by `Trainer` or by `vlmoe push`.
"""

import functools
import json
import logging
import os
import shutil
import socket
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TypedDict

from .atomic_files import HIDDEN_FOLDERS, remove_unfinished_files

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

LOCK_FILE = "_vlmoe.lock"
TOKENS = "VLMOE_LOCK_TOKENS"
"""Environment variable: the tokens of the locks that a process or its ancestors hold."""

_TRIES = 100
_READING_SECONDS = 0.5  # for the holder to write who it is


class FolderInUseError(ValueError):
    """Another process writes into the folder; the message says which."""


@dataclass
class _Lock:
    """A lock that this process has, or inherited (then without an open file)."""

    file: Path
    descriptor: int | None = None
    token: str = ""
    made: list[Path] = field(default_factory=list)
    depth: int = 1


class Holder(TypedDict, total=False):
    """The process that holds a lock, as the lock's file names it."""

    pid: int
    host: str
    since: str
    command: str
    token: str


_locks: dict[Path, _Lock] = {}
_guard = threading.RLock()


@contextmanager
def folder_lock(folder: str | Path, *, beside: bool = False) -> Iterator[None]:
    """Keep other writers out of a folder, which is made if need be.

    Unfinished files of killed writers are removed. A folder that was made for the lock is removed
    at the end if it is empty.

    Args:
        folder: to write into.
        beside: put the file beside the folder, hidden, for one that comes by a rename.

    Raises:
        FolderInUseError: another process is writing there; it names the process and the remedy.
        OSError: the folder cannot be written into.
    """
    path = Path(folder).expanduser().resolve()
    file = path.with_name(f".{path.name}.lock") if beside else path / LOCK_FILE
    with _guard:
        lock = _locks.get(file)
        if lock is None:
            lock = _locks[file] = _acquired(file, str(folder))
        else:
            lock.depth += 1
    try:
        yield
    finally:
        with _guard:
            lock.depth -= 1
            if lock.depth == 0:
                del _locks[file]
                _release(lock)


@contextmanager
def new_folder(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield the resolved path of a folder to make, locked from beside.

    Raises:
        ValueError: it exists and is not empty, or another process makes it.
        OSError: it is a dangling link, or cannot be made.
    """
    target = Path(folder).expanduser()
    refuse_dangling(target)
    target = target.resolve()
    with folder_lock(target, beside=True):
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise ValueError(f"{target} is not an empty folder; choose another one or remove it.")
        yield target


@contextmanager
def launch_lock(folder: str | Path, takes_it: bool = True) -> Iterator[None]:
    """`folder_lock` for all ranks of a launch: some take it before any of them goes on.

    All ranks must enter this.

    Args:
        folder: of the launch's output.
        takes_it: whether this rank does: the first one, or the first of its machine where each
            machine keeps its own files.

    Raises:
        FolderInUseError, OSError: as `folder_lock`, on all ranks.
    """
    from accelerate.utils import gather_object

    with ExitStack() as stack:
        errors: list[Exception | None] = [None]
        if takes_it:
            try:
                stack.enter_context(folder_lock(folder))
            except (FolderInUseError, OSError) as error:
                errors = [error]
        for problem in [*errors, *gather_object(errors)]:
            if problem is not None:
                raise problem
        yield


def _acquired(file: Path, shown: str) -> _Lock:
    made: list[Path] = []
    for _ in range(_TRIES):
        descriptor, new = _open(file, shown)
        made += new
        if not _locked(descriptor, shown):
            holder = _holder(descriptor)
            os.close(descriptor)
            if holder.get("token") in os.environ.get(TOKENS, "").split():
                return _Lock(file)  # of the process that started this one
            raise FolderInUseError(
                f"{shown} is being written to by {_described(holder)}: wait until it has ended, "
                "stop it, or choose another folder."
            )
        if _is_in_place(descriptor, file):
            break
        os.close(descriptor)  # its holder has just deleted it
    else:
        raise OSError(f"{shown} cannot be locked: its file system gives files no lasting number.")
    lock = _Lock(file, descriptor, uuid.uuid4().hex, made)
    _take_over(lock, shown)
    os.environ[TOKENS] = " ".join([*os.environ.get(TOKENS, "").split(), lock.token])
    return lock


def _release(lock: _Lock) -> None:
    if lock.descriptor is None:
        return
    tokens = os.environ.get(TOKENS, "").split()
    os.environ[TOKENS] = " ".join(token for token in tokens if token != lock.token)
    with suppress(OSError):  # such as a folder that was moved away
        if _is_in_place(lock.descriptor, lock.file):
            lock.file.unlink()
    os.close(lock.descriptor)
    for folder in reversed(lock.made):
        with suppress(OSError):  # it holds something
            folder.rmdir()


def _close_in_child() -> None:
    """Close an inherited lock in a forked process, which must not hold it after its parent."""
    for lock in _locks.values():
        if lock.descriptor is not None:
            os.close(lock.descriptor)
            lock.descriptor = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)


def require_writable(path: str | Path) -> None:
    """Refuse a file that could not be written, before the work whose result it will hold.

    Raises:
        OSError: names the path and the obstacle.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        raise OSError(f"{path} is a folder; name a file.")
    folder = next(each for each in path.parents if each.exists())
    refuse_dangling(path.parent)
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise _unwritable(str(path), error) from error


def refuse_dangling(folder: Path) -> None:
    """Refuse a path through a dangling link, whose target must not be made by accident.

    Raises:
        OSError: names the link and its target.
    """
    for path in (folder, *folder.parents):
        if path.is_symlink() and not path.exists():
            raise OSError(f"{path} is a link to {path.readlink()}, which is not there.")


def _open(file: Path, shown: str) -> tuple[int, list[Path]]:
    """Open the lock's file; return it and the folders that had to be made."""
    only_this = getattr(os, "O_NOFOLLOW", 0)
    refuse_dangling(Path(shown).expanduser())
    made: list[Path] = []
    for attempt in range(_TRIES):
        try:
            folders = (file.parent, *file.parent.parents)
            made += [folder for folder in folders if not folder.exists()][::-1]
            file.parent.mkdir(parents=True, exist_ok=True)
            return os.open(file, os.O_RDWR | os.O_CREAT | only_this, 0o666), made
        except FileNotFoundError as error:  # the last writer has removed the folders that it made
            if attempt == _TRIES - 1:
                raise _unwritable(shown, error) from error
        except FileExistsError as error:
            raise OSError(f"{shown} is a file; name a folder.") from error
        except PermissionError as error:
            if not file.exists():
                raise _unwritable(shown, error) from error
            return os.open(file, os.O_RDONLY | only_this), made  # of another user: it locks, too
        except OSError as error:
            raise _unwritable(shown, error) from error
    raise AssertionError


def _unwritable(path: str, error: OSError) -> OSError:
    """Make the error for a path that cannot be written to, without names of our own files."""
    return OSError(f"{path} cannot be written to: {error.strerror or error}. Choose another place.")


def _locked(descriptor: int, shown: str) -> bool:
    """Try to lock; return True, too, where the file system has no locks."""
    if fcntl is None:
        _warn_without_locks(shown, "this system has no flock")
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:  # some network file systems
        _warn_without_locks(shown, str(error.strerror))
    return True


@functools.cache
def _warn_without_locks(shown: str, reason: str) -> None:
    logger.warning(
        "%s cannot be locked (%s), so a second process could write there at the same time. Make "
        "sure that only one does.",
        shown,
        reason,
    )


def _is_in_place(descriptor: int, file: Path) -> bool:
    """Tell whether the open file is the one in the folder."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(file))
    except FileNotFoundError:
        return False


def _take_over(lock: _Lock, shown: str) -> None:
    """Write the holder into the file, then remove leftovers of a killed holder."""
    assert lock.descriptor is not None
    before = _read(lock.descriptor)
    if before:
        logger.warning("%s was left by %s, which has ended.", shown, _described(before))
    word = [each for each in sys.argv[1:2] if not each.startswith("-")]
    holder: Holder = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
        "command": " ".join([Path(sys.argv[0]).name, *word]),
        "token": lock.token,
    }
    with suppress(OSError):  # a full disk: the lock holds all the same
        os.ftruncate(lock.descriptor, 0)
        os.pwrite(lock.descriptor, f"{json.dumps(holder)}\n".encode(), 0)
    for pattern in HIDDEN_FOLDERS if lock.file.name == LOCK_FILE else ():
        for folder in lock.file.parent.glob(pattern):
            shutil.rmtree(folder, ignore_errors=True)
    remove_unfinished_files(lock.file.parent)


def _holder(descriptor: int) -> Holder:
    """Read the holder of the lock; empty if it is not written there."""
    end = time.monotonic() + _READING_SECONDS
    while not (holder := _read(descriptor)) and time.monotonic() < end:
        time.sleep(0.01)
    return holder


def _read(descriptor: int) -> Holder:
    try:
        holder = json.loads(os.pread(descriptor, 4096, 0))
    except ValueError:  # empty, or being written
        return {}
    return Holder(**holder) if isinstance(holder, dict) else {}


def _described(holder: Holder) -> str:
    return (
        f"process {holder.get('pid', '?')} on {holder.get('host', '?')} "
        f"({holder.get('command', '?')}, since {holder.get('since', '?')})"
    )

"""A process of its own that holds the lock of a folder."""

import multiprocessing
import os
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

from vlmoe.hub.folder_lock import TOKENS, FolderInUseError, folder_lock


@contextmanager
def holder(folder: Path, beside: bool = False) -> Iterator[tuple[BaseProcess, str]]:
    """Run a process that takes the lock; gives it, and `held` or why it has not got the lock."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["vlmoe.hub.folder_lock"])
    ours, theirs = context.Pipe()
    process = context.Process(target=_hold, args=(str(folder), beside, theirs))
    process.start()
    try:
        yield process, ours.recv()
        if process.is_alive():
            ours.send("let go")
            process.join(60)
    finally:
        process.kill()
        process.join()


def _hold(folder: str, beside: bool, pipe: Connection) -> None:
    os.environ.pop(TOKENS, None)  # no child of the process that asks
    try:
        with folder_lock(folder, beside=beside):
            pipe.send("held")
            pipe.recv()
    except FolderInUseError as error:
        pipe.send(str(error))

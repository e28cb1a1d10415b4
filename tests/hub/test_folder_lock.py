"""One writer at a time in a folder, whatever becomes of the others."""

import json
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from lock_holder import holder

from vlmoe.hub import folder_lock as module
from vlmoe.hub.folder_lock import (
    LOCK_FILE,
    FolderInUseError,
    folder_lock,
    require_writable,
)


def hold_with_a_child(folder: str, pipe: Connection) -> None:
    """Hold the lock, with a forked process that lives on."""
    with folder_lock(folder):
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
        pipe.send(child)
        pipe.recv()


@pytest.fixture
def start() -> Iterator[Callable[..., Any]]:
    """`start(folder, function)`: a process that runs it, and a pipe to it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["vlmoe.hub.folder_lock"])
    processes = []

    def start_process(folder: Path, function: Callable[..., None]) -> Any:
        ours, theirs = context.Pipe()
        process = context.Process(target=function, args=(str(folder), theirs))
        process.start()
        processes.append(process)
        return process, ours

    yield start_process
    for process in processes:
        process.kill()
        process.join()


def test_the_second_process_is_told_who_the_first_is(tmp_path: Path) -> None:
    with holder(tmp_path) as (process, answer):
        assert answer == "held"
        with pytest.raises(FolderInUseError) as error, folder_lock(tmp_path):
            pass
        told = str(error.value)
        assert told.startswith(f"{tmp_path} is being written to by process {process.pid} on ")
        assert socket.gethostname() in told and "choose another folder" in told
        assert re.search(r"since \d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC", told) and "\n" not in told
        written = json.loads((tmp_path / LOCK_FILE).read_text())
        assert (written["pid"], written["host"]) == (process.pid, socket.gethostname())
    with folder_lock(tmp_path):
        pass
    assert os.listdir(tmp_path) == []


def test_a_killed_holder_holds_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with holder(tmp_path) as (process, _):
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert (tmp_path / LOCK_FILE).exists()
        with folder_lock(tmp_path):
            assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()
    assert f"was left by process {process.pid} on" in caplog.text
    assert os.listdir(tmp_path) == []


def test_a_forked_process_that_lives_on_holds_nothing(
    tmp_path: Path, start: Callable[..., Any]
) -> None:
    process, pipe = start(tmp_path, hold_with_a_child)
    child = pipe.recv()
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    try:
        with folder_lock(tmp_path):
            os.kill(child, 0)  # it is alive
    finally:
        os.kill(child, signal.SIGKILL)


def test_the_lock_is_re_entrant(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmp_path)
    with folder_lock(tmp_path):
        with folder_lock(link):
            pass
        with holder(tmp_path) as (_, answer):
            assert "is being written to" in answer


INSIDE = """
import os, sys
from vlmoe.hub.folder_lock import TOKENS, FolderInUseError, folder_lock
with folder_lock(sys.argv[1]): print("inside")
del os.environ[TOKENS]  # of somebody else
try:
    with folder_lock(sys.argv[1]): print("inside")
except FolderInUseError: print("outside")
"""


def test_a_process_that_the_holder_starts_inherits_the_lock(tmp_path: Path) -> None:
    with folder_lock(tmp_path):
        command = [sys.executable, "-c", INSIDE, str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.stdout == "inside\noutside\n", done.stderr
        assert (tmp_path / LOCK_FILE).exists()
    assert not os.environ[module.TOKENS]


def race(folder: str, pipe: Connection) -> None:
    """Take the lock again and again; count how often another one was inside at the same time."""
    own, wins, clashes = Path(folder) / "inside", 0, 0
    end = time.monotonic() + 1.5
    while time.monotonic() < end:
        try:
            with folder_lock(folder):
                wins += 1
                try:
                    own.touch(exist_ok=False)
                except FileExistsError:
                    clashes += 1
                own.unlink(missing_ok=True)
        except FolderInUseError:
            pass
    pipe.send((wins, clashes))


def test_two_never_hold_it_at_once(tmp_path: Path, start: Callable[..., Any]) -> None:
    """Also while the file, and the folder that was made for it, come and go."""
    pipes = [start(tmp_path / "new" / "folder", race)[1] for _ in range(3)]
    results = [pipe.recv() for pipe in pipes]
    assert all(wins > 10 for wins, _ in results) and sum(clashes for _, clashes in results) == 0
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_folder_made_for_the_lock_goes_with_it_unless_it_holds_something(tmp_path: Path) -> None:
    with folder_lock(tmp_path / "a" / "b"):
        pass
    assert os.listdir(tmp_path) == []
    with folder_lock(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "file").touch()
    assert os.listdir(tmp_path / "a" / "b") == ["file"]


def test_without_flock_one_warning_and_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unsupported(*arguments: Any) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(module.fcntl, "flock", unsupported)
    for _ in range(2):
        with folder_lock(tmp_path):
            pass
    assert caplog.text.count("cannot be locked (Operation not supported)") == 1


def test_what_killed_writers_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    host = re.sub(r"[^\w-]", "_", socket.gethostname())
    dead = subprocess.Popen(["true"])
    dead.wait()
    ours = [f".config.{host}-{dead.pid}.tmp.json", f".incoming.{host}-{dead.pid}/a", ".removed-x/b"]
    others = [f".config.{host}-{os.getpid()}.tmp.json", f".x.elsewhere-{dead.pid}.tmp.json"]
    others += [".mine.tmp.json", "checkpoint-1/model.safetensors", ".incoming", "_incoming.x/a"]
    for name in (*ours, *others):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with folder_lock(tmp_path):
        left = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
        assert left == {*others, LOCK_FILE}


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("folder", "is a folder; name a file"),
        ("file/x.json", "cannot be written to: Not a directory"),
        ("link/x.json", "is a link to .*nowhere, which is not there"),
        ("folder/new/x.json", None),
        ("folder/ünï code [1]*.json", None),
    ],
)
def test_a_path_that_cannot_be_written_is_named(
    tmp_path: Path, path: str, message: str | None
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    if message is None:
        require_writable(tmp_path / path)
        return
    with pytest.raises(OSError, match=message):
        require_writable(tmp_path / path)


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("/proc/nothing", "/dev/null", "/dev/null/x", f"{tmp_path}/link"):
        message = rf"^{name} (cannot be written to|is a file|is a link to)"
        with pytest.raises(OSError, match=message) as error, folder_lock(name):
            pass
        assert LOCK_FILE not in str(error.value)


@pytest.mark.parametrize("reason", ["Read-only file system", "No space left on device"])
def test_a_disk_that_takes_no_file_is_named(
    reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, *arguments: Any) -> int:
        raise OSError(30, reason, str(path))

    monkeypatch.setattr(module.os, "open", refuse)
    with pytest.raises(OSError) as error, folder_lock(tmp_path):
        pass
    assert str(error.value) == f"{tmp_path} cannot be written to: {reason}. Choose another place."


def test_a_file_that_another_user_left_locks_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / LOCK_FILE).write_text("{}")
    plain = os.open

    def read_only(path: Path, flags: int, *arguments: Any) -> int:
        if flags & os.O_RDWR:
            raise PermissionError(13, "Permission denied", str(path))
        return plain(path, flags, *arguments)

    monkeypatch.setattr(module.os, "open", read_only)
    with folder_lock(tmp_path), holder(tmp_path) as (_, answer):
        assert "is being written to" in answer


def test_a_lock_on_a_deleted_file_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, calls = module._locked, []

    def late(descriptor: int, shown: str) -> bool:
        if not calls:
            (tmp_path / LOCK_FILE).unlink()  # its holder lets go between our opening and locking
        calls.append(descriptor)
        return plain(descriptor, shown)

    monkeypatch.setattr(module, "_locked", late)
    with folder_lock(tmp_path), holder(tmp_path) as (_, answer):
        assert len(calls) == 2 and "is being written to" in answer

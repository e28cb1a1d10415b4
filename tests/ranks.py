"""A function on two ranks of a gloo group, each a new process; a hang is an error, not a wait."""

import os
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

WORLD_SIZE = 2
HANG = 150.0  # seconds until the whole of it counts as hung, imports included


def on_ranks(function: Callable[..., Any], *arguments: Any, folder: Path) -> list[Any]:
    """What `function(*arguments)` returns on each rank.

    Args:
        function: at the top of a module, so that a new process finds it.
        arguments: no tensors, which the ranks would share.
        folder: an empty one, for the results.

    Raises:
        TimeoutError: the ranks wait for each other; they are killed.
        torch.multiprocessing.ProcessRaisedException: a rank failed; it holds the traceback.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = torch.multiprocessing.start_processes(
        _rank, (port, folder, function, arguments), WORLD_SIZE, join=False, start_method="spawn"
    )
    deadline = time.monotonic() + HANG
    while not group.join(timeout=1):
        if time.monotonic() > deadline:
            for process in group.processes:
                process.kill()
            raise TimeoutError(f"{function.__name__} did not end on all ranks in {HANG:.0f} s.")
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD_SIZE)]


def _rank(
    rank: int, port: int, folder: Path, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank)}
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(WORLD_SIZE)}
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=HANG / 3))
    torch.save(function(*arguments), folder / f"{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()

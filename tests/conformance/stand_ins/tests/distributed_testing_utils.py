# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Stands in for a file that no release of transformers holds."""

import os
import tempfile
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch.multiprocessing import start_processes


def run_distributed(world_size: int) -> Callable[..., Any]:
    """`run_distributed(2)(function)(*args)` calls `function(rank, *args)` in two CPU processes."""

    def with_function(function: Callable[..., None]) -> Callable[..., None]:
        def run(*args: Any) -> None:
            with tempfile.TemporaryDirectory() as folder:
                # Forked, as each process would otherwise import everything once more.
                rank_args = (world_size, f"file://{folder}/store", function, args)
                start_processes(_run_rank, rank_args, nprocs=world_size, start_method="fork")

        return run

    return with_function


def _run_rank(
    rank: int, world_size: int, store: str, function: Callable[..., None], args: tuple[Any, ...]
) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
    try:
        function(rank, *args)
    finally:
        dist.destroy_process_group()

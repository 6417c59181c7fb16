"""Run a function on several ranks of one machine: spawned processes, gloo over a file store, one thread a rank.

For tests (of this package and of any that builds on it) and for small local jobs. No fixed ports: the ranks meet
through a file. The first rank to fail decides the error; the others are ended.
"""

from __future__ import annotations

import os
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


class RankFailedError(RuntimeError):
    """A rank raised, died or did not finish; `rank` says which, the message holds its traceback."""

    def __init__(self, rank: int, message: str) -> None:
        super().__init__(f"rank {rank}: {message}")
        self.rank = rank


def run_ranks(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout_s: float = 120.0,
    tolerate: tuple[int, ...] = (),
) -> list[Any]:
    """Call `fn(rank, *args)` on every rank and return the results in rank order.

    Args:
        fn: a module-level function; its arguments and result must pickle.
        world_size: number of processes.
        args: the same for every rank.
        timeout_s: seconds until all ranks are ended and the call fails.
        tolerate: ranks that may die or fail; their result is the exception, as text.

    Raises:
        RankFailedError: the first rank that failed, with its traceback.
    """
    context = mp.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        pipes: list[Connection[Any, Any]] = []
        processes = []
        for rank in range(world_size):
            parent, child = context.Pipe(duplex=False)
            process = context.Process(
                target=_rank_main,
                args=(fn, rank, world_size, os.path.join(folder, "store"), child, args),
                daemon=True,
            )
            process.start()
            child.close()
            pipes.append(parent)
            processes.append(process)
        try:
            return _collect(pipes, processes, timeout_s, tolerate)
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                process.join()


def _rank_main(
    fn: Any, rank: int, world_size: int, store_path: str, pipe: Connection[Any, Any], args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), OMP_NUM_THREADS="1")
    try:
        dist.init_process_group(
            "gloo", store=dist.FileStore(store_path, world_size), rank=rank, world_size=world_size,
            timeout=timedelta(minutes=5),
        )  # fmt: skip
        pipe.send((True, fn(rank, *args)))
    except BaseException:  # whatever ended the rank is the parent's to report
        pipe.send((False, traceback.format_exc()))
    finally:
        pipe.close()
    # A peer may still be inside a collective that this rank has finished; leave without tearing the group down under
    # it, and without the atexit handlers of libraries that were never asked for.
    os._exit(0)


def _collect(
    pipes: list[Connection[Any, Any]], processes: list[Any], timeout_s: float, tolerate: tuple[int, ...]
) -> list[Any]:
    results: list[Any] = [None] * len(pipes)
    waiting = list(range(len(pipes)))
    deadline = time.monotonic() + timeout_s
    while waiting:
        ready = wait([pipes[rank] for rank in waiting], timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise RankFailedError(waiting[0], f"not finished after {timeout_s:g} s")
        for rank in [rank for rank in waiting if pipes[rank] in ready]:
            waiting.remove(rank)
            try:
                finished, value = pipes[rank].recv()
            except EOFError:
                processes[rank].join()
                finished, value = False, f"died with exit code {processes[rank].exitcode}"
            if not finished and rank not in tolerate:
                raise RankFailedError(rank, str(value))
            results[rank] = value
    return results

"""Run a function on several ranks of one machine: new processes, gloo over a file store, one thread a rank.

For tests (of this package and of any that builds on it) and for small local jobs. No fixed ports: the ranks meet
through a file. The first rank to fail decides the error; the others are ended. Processes whose ranks all succeeded
wait for the next call, which gives them a new process group: starting one costs seconds, reusing it none.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch._C._distributed_c10d import FileStore


class RankFailedError(RuntimeError):
    """A rank raised, died or did not finish; `rank` says which, the message holds its traceback."""

    def __init__(self, rank: int, message: str) -> None:
        super().__init__(f"rank {rank}: {message}")
        self.rank = rank


def process_context() -> Any:
    """A `multiprocessing` context whose processes are forked from one that has imported torch and this package.

    Importing torch costs each process seconds. Where the system cannot fork they start from nothing.
    """
    if "forkserver" not in mp.get_all_start_methods():
        return mp.get_context("spawn")
    context = mp.get_context("forkserver")
    # Dynamo, for the first optimizer that is made imports it.
    context.set_forkserver_preload(["torch", "torch.distributed", "torch._dynamo", __name__])
    return context


class _Worker:
    """A process that runs one rank after another."""

    def __init__(self) -> None:
        context = process_context()
        self.pipe: Connection[Any, Any]
        self.pipe, child = context.Pipe()
        self.process = context.Process(target=_serve, args=(child, dict(os.environ)), daemon=True)
        self.process.start()
        child.close()

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


_idle: list[_Worker] = []


def _take_worker() -> _Worker:
    """One that waits and still lives (somebody may have ended it meanwhile), or a new one."""
    while _idle:
        worker = _idle.pop()
        if worker.process.is_alive():
            return worker
        worker.end()
    return _Worker()


def run_ranks(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout_s: float = 120.0,
    tolerate: tuple[int, ...] = (),
) -> list[Any]:
    """Call `fn(rank, *args)` on every rank and return the results in rank order.

    Args:
        fn: a module-level function, of any module or script file; its arguments and result must pickle.
        world_size: number of processes.
        args: the same for every rank.
        timeout_s: seconds until all ranks are ended and the call fails.
        tolerate: ranks that may die or fail; their result is the traceback or exit code, as text.

    Raises:
        RankFailedError: the first rank that failed, with its traceback.
    """
    workers = [_take_worker() for _ in range(world_size)]
    clean = False
    try:
        with tempfile.TemporaryDirectory() as folder:
            task = _Target.of(fn), world_size, os.path.join(folder, "store"), args
            for rank, worker in enumerate(workers):
                worker.pipe.send((rank, *task))
            results = _collect(workers, timeout_s, tolerate)
        clean = not tolerate
        return results
    finally:
        for worker in workers:
            if clean:
                _idle.append(worker)
            else:
                worker.end()


@dataclass(frozen=True)
class _Target:
    """A function by name and file: a test module or a script need not be importable by name in the new process."""

    module: str
    file: str | None
    name: str

    @staticmethod
    def of(fn: Callable[..., Any]) -> _Target:
        return _Target(
            fn.__module__, getattr(sys.modules.get(fn.__module__), "__file__", None), fn.__qualname__
        )

    def load(self) -> Callable[..., Any]:
        name = "__mp_main__" if self.module == "__main__" else self.module
        if name not in sys.modules:
            try:
                importlib.import_module(name)
            except ImportError:
                assert self.file is not None
                spec = importlib.util.spec_from_file_location(name, self.file)
                assert spec is not None
                assert spec.loader is not None
                sys.modules[name] = importlib.util.module_from_spec(spec)
                spec.loader.exec_module(sys.modules[name])
        found: Callable[..., Any] = getattr(sys.modules[name], self.name)
        return found


def _serve(pipe: Connection[Any, Any], environ: dict[str, str]) -> None:
    """A worker's life: run ranks until the parent goes away or one of them fails."""
    os.environ.update(environ)  # those of now, not of when the process that it comes from was started
    torch.set_num_threads(1)
    while True:
        try:
            rank, target, world_size, store, args = pipe.recv()
        except EOFError:
            os._exit(0)
        try:
            pipe.send((True, _run_rank(target, rank, world_size, store, args)))
        except BaseException:  # whatever ended the rank is the parent's to report
            pipe.send((False, traceback.format_exc()))


def _run_rank(target: _Target, rank: int, world_size: int, store: str, args: tuple[Any, ...]) -> Any:
    if (
        dist.is_initialized()
    ):  # the last call's; kept until now, since a peer may still have been inside a collective
        dist.destroy_process_group()
        gc.collect()  # models of the last call hold its group, and that its threads
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), OMP_NUM_THREADS="1")
    dist.init_process_group(
        "gloo",
        store=FileStore(store, world_size),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(minutes=5),
    )
    return target.load()(rank, *args)


def _collect(workers: list[_Worker], timeout_s: float, tolerate: tuple[int, ...]) -> list[Any]:
    results: list[Any] = [None] * len(workers)
    waiting = list(range(len(workers)))
    deadline = time.monotonic() + timeout_s
    while waiting:
        ready = wait([workers[rank].pipe for rank in waiting], timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise RankFailedError(waiting[0], f"not finished after {timeout_s:g} s")
        for rank in [rank for rank in waiting if workers[rank].pipe in ready]:
            waiting.remove(rank)
            try:
                finished, value = workers[rank].pipe.recv()
            except (EOFError, ConnectionResetError):
                workers[rank].process.join()
                finished, value = False, f"died with exit code {workers[rank].process.exitcode}"
            if not finished and rank not in tolerate:
                raise RankFailedError(rank, str(value))
            results[rank] = value
    return results

"""Run a script on one or several new processes, with what torchrun gives a rank, forked from one that knows torch.

Importing torch costs seconds in each process; a process that is forked from one which has imported it pays nothing,
and is otherwise as new: its own folder, arguments, environment and standard streams.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
from torch._C._distributed_c10d import TCPStore
from zero_core.testing import process_context


def run_script(script: Path, ranks: int, environ: Mapping[str, str], timeout_s: float) -> tuple[int, str]:
    """Run `script` in the folder where it lies; the first rank to fail ends the others, as torchrun does.

    Returns:
        The exit code of the first rank that failed, or 0; and what all ranks wrote, standard output and error together.
    """
    output = script.with_suffix(".output")
    output.touch()
    given, store = dict(environ), None
    if ranks > 1:
        store = _store()
        given |= {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store is here, not in the first rank
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
        }
    context = process_context()
    processes: list[Any] = []
    try:
        for rank in range(ranks):
            own = given | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {})
            process = context.Process(target=_run, args=(str(script), str(output), own))
            process.start()
            processes.append(process)
        code = _wait(processes, timeout_s)
    finally:
        for process in processes:
            _end(process)
    said = output.read_text(errors="replace")
    if code is None:
        return 1, f"{said}\nended after {timeout_s:g} s"
    return code, said


def _store() -> TCPStore:
    """Where the ranks meet, on a port that the system chooses."""
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(minutes=5))


def _run(script: str, output: str, environ: dict[str, str]) -> None:
    """A rank's life."""
    os.setsid()  # its children can be ended with it
    target = os.open(output, os.O_WRONLY | os.O_APPEND)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for stream, given in enumerate((nothing, target, target)):
        os.dup2(given, stream)
    sys.stdin = open(0, closefd=False)  # multiprocessing gives a closed one # noqa: SIM115
    os.environ.clear()
    os.environ.update(environ)
    if threads := environ.get("OMP_NUM_THREADS"):
        # torch has read the environment of the process that it was imported in.
        torch.set_num_threads(int(threads))
    folder = os.path.dirname(script)
    os.chdir(folder)
    sys.argv, sys.path[0] = [script], folder
    runpy.run_path(script, run_name="__main__")


def _wait(processes: list[Any], timeout_s: float) -> int | None:
    """The first exit code that is not 0, or 0; None: not all have ended in time."""
    deadline, left = time.monotonic() + timeout_s, {each.sentinel: each for each in processes}
    while left:
        ended = wait(list(left), timeout=max(0.0, deadline - time.monotonic()))
        if not ended:
            return None
        for sentinel in ended:
            process = left.pop(sentinel)
            process.join()
            if process.exitcode:
                return int(process.exitcode)
    return 0


def _end(process: Any) -> None:
    """End a process and its children, if it has not ended."""
    if process.is_alive():
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:  # not yet in a group of its own
            process.kill()
    process.join()
    process.close()

"""Who reads and writes one file in the NVMe benchmark: our engines here, fio and DeepSpeed in processes of their own.

Each contestant is a function from "read" or "write" to seconds for the whole file, with its own start left out.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import accel_kernels as ak
import torch

Contestant = Callable[[str], float]


@dataclass(frozen=True)
class Job:
    """What all of them do."""

    path: Path
    nbytes: int
    block_bytes: int
    queue_depth: int
    num_threads: int = 4


def noise(nbytes: int) -> torch.Tensor:
    """Memory that disks cannot shorten: a MiB of noise again and again."""
    memory = ak.aligned_empty(nbytes)
    memory.view(-1, 1 << 20)[:] = torch.randint(0, 256, (1 << 20,), dtype=torch.uint8)
    return memory


def ours(engine: ak.TransferEngine, job: Job, memory: torch.Tensor) -> Contestant:
    """One request for the whole file, to or from memory of its size."""
    file = engine.open(job.path)

    def move(act: str) -> float:
        began = time.perf_counter()
        (engine.read if act == "read" else engine.write)(file, 0, memory).wait()
        return time.perf_counter() - began

    return move


def ours_again(engine: ak.TransferEngine, job: Job, memory: torch.Tensor) -> Contestant:
    """The whole file, to or from the same few blocks again and again: as fio does it."""
    file = engine.open(job.path)

    def move(act: str) -> float:
        began = time.perf_counter()
        start = engine.read if act == "read" else engine.write
        step = memory.numel()
        for transfer in [start(file, offset, memory) for offset in range(0, job.nbytes, step)]:
            transfer.wait()
        return time.perf_counter() - began

    return move


def fio(job: Job, engine: str, *more: str) -> Contestant:
    """One pass of fio over the file; it writes again and again what its buffers hold, as we do."""
    command = [
        "fio",
        "--name=peer",
        f"--filename={job.path}",
        f"--ioengine={engine}",
        f"--bs={job.block_bytes}",
        f"--iodepth={job.queue_depth}",
        "--direct=1",
        "--scramble_buffers=0",
        "--group_reporting",
        "--output-format=json",
        *(more or (f"--size={job.nbytes}",)),
    ]

    def move(act: str) -> float:
        said = subprocess.run([*command, f"--rw={act}"], capture_output=True, text=True, check=True).stdout
        found = json.loads(said[said.index("{") :])["jobs"][0][act]
        assert found["io_bytes"] == job.nbytes
        return float(job.nbytes / found["bw_bytes"])

    return move


def fio_fixed(job: Job) -> Contestant:
    """io_uring with registered buffers and files."""
    return fio(job, "io_uring", f"--size={job.nbytes}", "--fixedbufs=1", "--registerfiles=1")


def fio_threads(job: Job) -> Contestant:
    """Plain reads and writes by several processes, each its part of the file."""
    part = job.nbytes // job.num_threads
    return fio(job, "psync", f"--numjobs={job.num_threads}", f"--size={part}", f"--offset_increment={part}")


def fio_version() -> str | None:
    """The installed fio, if there is one."""
    if shutil.which("fio") is None:
        return None
    return subprocess.run(["fio", "--version"], capture_output=True, text=True, check=True).stdout.strip()


DEEPSPEED = """
import json, sys, time
import deepspeed, torch
from deepspeed.accelerator import get_accelerator
aio = get_accelerator().create_op_builder("AsyncIOBuilder").load()
path, nbytes, block, depth, threads = sys.argv[1], *map(int, sys.argv[2:6])
handle = aio.aio_handle(block, depth, False, True, threads)
memory = handle.new_cpu_locked_tensor(nbytes, torch.empty(0, dtype=torch.uint8))
memory.view(-1, 1 << 20)[:] = torch.randint(0, 256, (1 << 20,), dtype=torch.uint8)
print("READY", deepspeed.__version__, flush=True)
for line in sys.stdin:
    start = time.perf_counter()
    if line.strip() == "read":
        assert handle.sync_pread(memory, path, 0) in (1, nbytes)
    else:
        assert handle.sync_pwrite(memory, path, 0) in (1, nbytes)
    print("TIME", time.perf_counter() - start, flush=True)
"""


class DeepSpeedAio:
    """DeepSpeed's asynchronous I/O handle in the peers' environment; one act in, one time out."""

    def __init__(self, job: Job, num_threads: int, environ: Path) -> None:
        peers = json.loads(environ.read_text())
        # Asked for without it, DeepSpeed would call a compiler first.
        if not Path(peers["environ"]["TORCH_EXTENSIONS_DIR"], "async_io", "async_io.so").exists():
            raise RuntimeError("its AsyncIO operator is not built")
        numbers = (job.nbytes, job.block_bytes, job.queue_depth, num_threads)
        self.process = subprocess.Popen(
            [str(Path(peers["bin"], "python")), "-c", DEEPSPEED, str(job.path), *map(str, numbers)],
            env={
                **os.environ,
                **peers["environ"],
                "PATH": f"{peers['bin']}:{os.environ.get('PATH', os.defpath)}",
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.version = self._read("READY")

    def _read(self, tag: str) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(tag):
                return line[len(tag) :].strip()
        raise RuntimeError("the DeepSpeed process ended")

    def __call__(self, act: str) -> float:
        """Seconds of one act."""
        assert self.process.stdin is not None
        self.process.stdin.write(act + "\n")
        self.process.stdin.flush()
        return float(self._read("TIME"))

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

"""The processes of an engine: two ranks that build its model, then step when told to, and otherwise sleep.

In: an engine's name, and commands. Out: what each rank answered, as `Round`s and bytes of memory.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import textwrap
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import _measure
from _lab import Lab

HERE = Path(__file__).resolve().parent
PEERS = HERE.parent / ".venv-peers" / "environ.json"
RANKS = 2
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


class EngineError(RuntimeError):
    """A rank ended or said something else than an answer; carries the end of what it printed."""


@dataclass(frozen=True)
class Round:
    """Means over the steps of one round; processor time is both ranks', sent bytes one rank's."""

    seconds: float
    processor_seconds: float
    sent_bytes: float


class Engine:
    """Two worker processes of one engine, on hosts of a lab or on this one, and everything measured of them."""

    def __init__(
        self,
        name: str,
        dtype: str,
        options: argparse.Namespace,
        hosts: Lab | None = None,
        *,
        script: str = "_train_worker.py",
    ) -> None:
        self.name, self.dtype = name, dtype
        python, environ = environment(name)
        port, work = free_port(), [python, str(HERE / script)]
        self.log = tempfile.TemporaryFile("w+", prefix=f"{name}-")  # noqa: SIM115 - closed by stop()
        self.ranks = [
            subprocess.Popen(
                work if hosts is None else hosts.command(rank, work),
                env={
                    **environ,
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "MASTER_PORT": str(port),
                    **({} if hosts is None else hosts.environ(rank, port)),
                },
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.log,
                text=True,
                bufsize=1,
            )
            for rank in range(RANKS)
        ]
        order = {
            "engine": name,
            "model": options.model,
            "dtype": DTYPES[dtype],
            "sequences": options.sequences,
            "accumulate": options.accumulate,
            "recompute": options.recompute,
        }
        self.versions: dict[str, str] = self.ask(order)[0]["versions"]
        self.losses: list[float] = []
        self.rounds: list[Round] = []
        self.memory: dict[str, int] = {}

    def ask(self, command: dict[str, Any]) -> list[dict[str, Any]]:
        """Give every rank a command; their answers, by rank."""
        try:
            for rank in self.ranks:
                assert rank.stdin is not None
                rank.stdin.write(json.dumps(command) + "\n")
            return [json.loads(rank.stdout.readline()) for rank in self.ranks if rank.stdout is not None]
        except (BrokenPipeError, ValueError):
            self.log.seek(0)
            said = "\n".join(self.log.read().splitlines()[-15:])
            self.stop()
            raise EngineError(
                f"{self.name} ({self.dtype}) failed:\n{textwrap.indent(said, '    ')}"
            ) from None

    def warm_up(self, steps: int) -> None:
        """Take the first steps: losses are kept, times are not."""
        answers = self.ask({"do": "run", "steps": steps, "lead": 0})
        self.losses = [
            statistics.mean(losses) for losses in zip(*(a["losses"] for a in answers), strict=True)
        ]

    def measure_round(self, steps: int, *, lead: int = 0) -> None:
        """Take some steps and keep what they cost; `lead` more before them, which are not timed."""
        before = _measure.loopback_bytes()
        answers = self.ask({"do": "run", "steps": steps, "lead": lead})
        sent = (_measure.loopback_bytes() - before) / (lead + steps) / RANKS
        self.rounds.append(
            Round(
                # A step has ended when its last rank has.
                seconds=statistics.mean(map(max, zip(*(a["seconds"] for a in answers), strict=True))),
                processor_seconds=sum(sum(a["processor_seconds"]) for a in answers) / steps,
                sent_bytes=sent,
            )
        )

    def measure_memory(self) -> None:
        """Keep the memory of the rank that uses most."""
        answers = self.ask({"do": "memory"})
        self.memory = {key: max(answer[key] for answer in answers) for key in answers[0]}

    def stop(self) -> None:
        """End the workers."""
        for rank in self.ranks:
            assert rank.stdin is not None
            try:
                rank.stdin.write('{"do": "stop"}\n')
                rank.stdin.close()
            except (OSError, ValueError):  # it has ended already, or been stopped
                continue
        for rank in self.ranks:
            end(rank)
        self.log.close()


def end(process: subprocess.Popen[str]) -> None:
    """Wait for a process that was told to stop; not for ever."""
    try:
        process.wait(timeout=20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def environment(name: str) -> tuple[str, dict[str, str]]:
    """The interpreter of an engine, and the variables of its processes: the same for all, but for paths."""
    python, extra = sys.executable, {}
    if name.startswith("deepspeed"):
        peers = json.loads(PEERS.read_text())
        python, extra = str(Path(peers["bin"], "python")), peers["environ"]
    path = os.pathsep.join([str(Path(python).parent), os.environ.get("PATH", os.defpath)])
    common = {
        "OMP_NUM_THREADS": "1",
        # The C library keeps what is freed. By default it gives large blocks back at once, and faulting the same
        # pages in again costs every engine 0 to 5 % of a step, by chance: more than what is compared here.
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": str(1 << 36),
        "WORLD_SIZE": str(RANKS),
        "LOCAL_WORLD_SIZE": str(RANKS),
        "LOCAL_SIZE": str(RANKS),
        "MASTER_ADDR": "127.0.0.1",
        "GLOO_SOCKET_IFNAME": "lo",
        "PATH": path,
    }
    return python, {**os.environ, **extra, **common}


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def missing(name: str) -> str:
    """Why an engine cannot run here, or nothing."""
    if name.startswith("deepspeed") and not PEERS.exists():
        return "DeepSpeed is not set up here: python3 tools/dev.py peers"
    if name.startswith("zero-core") and find_spec("zero_core") is None:
        return "zero-core is not installed here: python3 tools/dev.py bench installs it"
    return ""


def say(text: str) -> None:
    """Progress, beside the table on standard output."""
    print(text, file=sys.stderr, flush=True)

"""Start the demo's processes, hand Ctrl-C on to them, and end as they end.

In: `Settings`. Out: an exit status. The processes are in a session of their own, so that Ctrl-C reaches this process
alone; it asks them to stop, which they do together after the current step, with a checkpoint.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from ..cli.text import complain, say
from ..machine import environment_of_each
from .settings import Settings
from .training import INTERRUPTED

_POLL_S = 0.2


@dataclass
class _Presses:
    """How often Ctrl-C was pressed."""

    count: int = 0

    def press(self, signum: int, frame: FrameType | None) -> None:
        self.count += 1


def launch(settings: Settings) -> int:
    """Run the demo; returns the exit status of the first process that failed, 130 if it was interrupted, or 0."""
    presses = _Presses()
    with tempfile.TemporaryDirectory() as folder, _handling(presses):
        workers = _start(settings, Path(folder) / "store")
        try:
            status = _watch(workers, presses)
        finally:
            _end(workers)
    if status == INTERRUPTED:
        _say_how_to_resume(settings)
    return status


def _start(settings: Settings, store: Path) -> list[subprocess.Popen[bytes]]:
    environment = {**os.environ, **environment_of_each(settings.procs)}
    command = [sys.executable, "-m", "zerostack.demo.worker", str(store)]
    # What is ignored here stays ignored there, until the worker is far enough to listen.
    ours = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    workers = [
        subprocess.Popen(
            [*command, str(rank), str(settings.procs), settings.to_json()],
            env=environment,
            start_new_session=True,
            stdin=subprocess.DEVNULL,
        )
        for rank in range(settings.procs)
    ]
    for number, handler in ours.items():
        signal.signal(number, handler)
    return workers


@contextmanager
def _handling(presses: _Presses) -> Iterator[None]:
    """Count Ctrl-C and SIGTERM."""
    before = {number: signal.signal(number, presses.press) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _watch(workers: list[subprocess.Popen[bytes]], presses: _Presses) -> int:
    """Wait until all have ended; a first Ctrl-C asks them to stop, a second one ends them."""
    said = False
    while True:
        states = [worker.poll() for worker in workers]
        failed = [state for state in states if state not in {None, 0, INTERRUPTED}]
        if failed:
            return _failure(states)
        if all(state is not None for state in states):
            return INTERRUPTED if INTERRUPTED in states else 0
        if presses.count > 1:
            return INTERRUPTED
        if presses.count == 1:
            if not said:
                complain("\nStopping after this step and saving; press Ctrl-C again to stop at once.")
                said = True
            for worker in workers:
                if worker.poll() is None:
                    worker.send_signal(signal.SIGINT)
        time.sleep(_POLL_S)


def _failure(states: list[int | None]) -> int:
    rank, state = next((r, s) for r, s in enumerate(states) if s not in {None, 0, INTERRUPTED})
    assert state is not None
    cause = (
        f"was killed by signal {signal.Signals(-state).name}" if state < 0 else f"failed with status {state}"
    )
    complain(f"zerostack demo: process {rank} {cause}; the others were ended")
    return state if state > 0 else 1


def _end(workers: list[subprocess.Popen[bytes]]) -> None:
    for worker in workers:
        if worker.poll() is None:
            worker.kill()
        worker.wait()


def _say_how_to_resume(settings: Settings) -> None:
    if not (settings.checkpoints / "latest").exists():
        say("Interrupted before there was anything to save.")
        return
    defaults = Settings()
    words = ["zerostack", "demo", "--resume"]
    for flag, name in {
        "--text": "text",
        "--stage": "stage",
        "--steps": "steps",
        "--params": "num_params",
        "--procs": "procs",
        "--seed": "seed",
        "--out": "out",
    }.items():
        value = getattr(settings, name)
        if value != getattr(defaults, name):
            words += [flag, f"{value:g}" if isinstance(value, float) else str(value)]
    say(f"Interrupted. Go on with: {shlex.join(words)}")

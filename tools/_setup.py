"""What setting up an environment takes: an interpreter, a lock, logged steps, a virtual environment.

Used by `dev.py` (the developers' environment) and `peers.py` (the engines that benchmarks compare with).
Standard library only: this runs before anything is installed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
OLDEST, NEWEST = (3, 10), (3, 13)
SUPPORTED = f"Python {OLDEST[0]}.{OLDEST[1]} to {NEWEST[0]}.{NEWEST[1]}"
LOG_LINES_SHOWN = 25


class SetupError(RuntimeError):
    """Set-up cannot go on; the message says why and what to do."""


def find_python() -> str:
    """The interpreter for a new environment: the one running this, else the newest one on PATH."""
    if OLDEST <= sys.version_info[:2] <= NEWEST:
        return sys.executable
    for minor in range(NEWEST[1], OLDEST[1] - 1, -1):
        found = shutil.which(f"python3.{minor}")
        if found and python_version(Path(found)):
            return found
    have = ".".join(map(str, sys.version_info[:3]))
    raise SetupError(
        f"{SUPPORTED} is needed; this is {have} and PATH has none. Install one and run this again."
    )


def python_version(python: Path) -> str | None:
    """`3.x` of an interpreter that starts and is supported, else None."""
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    try:
        out = subprocess.run(
            [python, "-c", code], capture_output=True, text=True, timeout=60, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    major, minor = map(int, out.split("."))
    return out.strip() if OLDEST <= (major, minor) <= NEWEST else None


@contextlib.contextmanager
def locked(name: str) -> Iterator[None]:
    """Hold the lock `name`, so that two set-ups never write one environment at the same time."""
    try:
        import fcntl
    except ImportError:  # not POSIX: no lock to be had, and nothing here starts two
        yield
        return
    folder = REPO / ".build"
    folder.mkdir(exist_ok=True)
    with open(folder / f"{name}.lock", "w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another set-up is at work here; waiting for it ...")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield  # the kernel lets go of the lock when this process ends, however it ends


def say(text: str) -> None:
    """Tell the person, on standard error: standard output belongs to the command that follows."""
    print(text, file=sys.stderr, flush=True)


class Steps:
    """Runs commands one after the other: a line and a time for each, everything else into a log."""

    def __init__(self, log: Path, environ: Mapping[str, str] | None = None) -> None:
        self.log = log
        self.environ = {**os.environ, **(environ or {})}
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text("")

    def run(self, title: str, command: Sequence[str | Path], cure: str) -> None:
        """Run `command`; when it fails, show the log's end and `cure`."""
        began = time.monotonic()
        prefix = f"  {title} ... "
        live = sys.stderr.isatty()
        if live:
            print(prefix, end="", file=sys.stderr, flush=True)
        with open(self.log, "a") as log:
            print(f"\n== {title}\n$ {' '.join(map(str, command))}", file=log, flush=True)
            code = subprocess.call(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=self.environ,
                cwd=REPO,
            )
        ended = f"{'failed' if code else 'done'} in {time.monotonic() - began:.1f} s"
        say(ended if live else prefix + ended)
        if code:
            tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-LOG_LINES_SHOWN:])
            raise SetupError(
                f"{tail}\n\n{title} failed (exit code {code}). Whole log: {shown(self.log)}\n{cure}"
            )


def shown(path: Path) -> str:
    """A path as a person at the repository's root would type it."""
    return str(path.relative_to(REPO)) if path.is_relative_to(REPO) else str(path)


class Venv:
    """One virtual environment in the repository."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bin = folder / ("Scripts" if os.name == "nt" else "bin")
        self.python = self.bin / ("python.exe" if os.name == "nt" else "python")

    def environ(self) -> dict[str, str]:
        """Variables that make the environment's commands (ninja, cmake, ruff) the first ones found."""
        path = os.pathsep.join([str(self.bin), os.environ.get("PATH", os.defpath)])
        return {"PATH": path, "VIRTUAL_ENV": str(self.folder), "PYTHONNOUSERSITE": "1"}

    def create(self, log_name: str) -> Steps:
        """Make the environment where there is no sound one, and mend what an interrupted install left."""
        steps_log = self.folder / log_name
        if self.python.exists() and python_version(self.python) and self._has_pip():
            self._forget_half_installed()
            return Steps(steps_log, self.environ())
        python = find_python()
        if self.folder.exists():
            shutil.rmtree(self.folder)
        steps = Steps(steps_log, self.environ())
        try:
            steps.run(f"making {shown(self.folder)}", [python, "-m", "venv", self.folder], "")
        except SetupError as error:
            raise SetupError(
                f"{error}{python} could not make a virtual environment. Where `venv` is a package of its own "
                "(Debian, Ubuntu: `apt install python3-venv`), install that; then run this again."
            ) from None
        return steps

    def _has_pip(self) -> bool:
        return subprocess.run([self.python, "-m", "pip", "--version"], capture_output=True).returncode == 0

    def _forget_half_installed(self) -> None:
        # pip writes INSTALLER after a package's own files: without it the install was cut short, and pip,
        # which looks at the metadata alone, would take the package for whole.
        for record in self.folder.glob("lib*/python*/site-packages/*.dist-info"):
            if not (record / "INSTALLER").exists():
                shutil.rmtree(record)

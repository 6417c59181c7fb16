"""Set up `.venv-peers`: the engines that benchmarks run beside ours, at fixed versions, kernels built.

`python3 tools/dev.py peers` comes here. DeepSpeed compiles each of its CPU operators when it is first used,
which takes minutes; this does it once, into the environment itself, so that no benchmark's clock or time-out
meets a compiler. `environ.json` holds the variables that a process of this environment needs; it is written
last, so where it is, the environment is whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
from pathlib import Path

from _setup import REPO, SetupError, Venv, locked, say, shown

FOLDER = REPO / ".venv-peers"
PINS = REPO / "tools" / "peers-constraints.txt"
# Builder names of DeepSpeed's CPU operators that the benchmarks meet, quickest first.
OPERATORS = ("ShareMemCommBuilder", "FusedAdamBuilder", "CPUAdamBuilder")
BUILD = "from deepspeed.accelerator import get_accelerator as a; a().create_op_builder({name!r}).load()"


def set_up() -> None:
    """Install the peers and build their operators; does nothing when both are there."""
    key = setup_key()
    with locked("peers"):
        if ready(key):
            return
        if not (shutil.which("c++") or shutil.which("g++")):
            raise SetupError(
                "DeepSpeed compiles its operators: install a C++ compiler (Debian: `apt install g++`)."
            )
        say(f"setting up {shown(FOLDER)} (once; about ten minutes, most of it compiling)")
        venv = Venv(FOLDER)
        steps = venv.create("setup.log")
        environ = {
            "DS_ACCELERATOR": "cpu",
            "DS_BUILD_OPS": "0",
            "TORCH_EXTENSIONS_DIR": str(FOLDER / f"operators-{key}"),
            **venv.environ(),
        }
        steps.environ.update(environ, MAX_JOBS="2")
        pip: list[str | Path] = [venv.python, "-m", "pip", "install"]
        retry = "Run this again when that is mended; what is already there is kept."
        # DeepSpeed's own build asks torch about this machine: torch first, no isolated build for the rest.
        names = ("torch", "numpy", "setuptools", "ninja")
        steps.run("installing torch", [*pip, "-c", PINS, *names], retry)
        steps.run("installing the peers", [*pip, "--no-build-isolation", "-r", PINS], retry)
        for name in OPERATORS:
            forget_stale_locks(Path(environ["TORCH_EXTENSIONS_DIR"]))
            title = f"building DeepSpeed's {name.removesuffix('Builder')}"
            steps.run(title, [venv.python, "-c", BUILD.format(name=name)], retry)
        environ.pop("PATH")
        (FOLDER / "environ.json").write_text(
            json.dumps({"key": key, "bin": str(venv.bin), "environ": environ})
        )


def setup_key() -> str:
    """What the installed environment depends on; operators are compiled for this very processor."""
    text = PINS.read_text() + platform.machine() + processor() + os.fspath(REPO)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def processor() -> str:
    """The processor's name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")


def ready(key: str) -> bool:
    """Whether the environment of `key` is there and whole."""
    try:
        return bool(json.loads((FOLDER / "environ.json").read_text())["key"] == key)
    except (OSError, ValueError, KeyError):
        return False


def forget_stale_locks(operators: Path) -> None:
    """Remove locks of builds that were ended midway: later ones would wait for them for ever, silently."""
    for lock in operators.glob("**/lock"):
        lock.unlink()

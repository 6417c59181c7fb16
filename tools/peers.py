"""Set up `.venv-peers`: the engines that benchmarks run beside ours, at fixed versions, kernels built.

`python3 tools/dev.py peers` comes here. DeepSpeed compiles each of its CPU operators when it is first used,
which takes minutes; this does it once, into the environment itself, so that no benchmark's clock or time-out
meets a compiler. `environ.json` holds the variables that a process of this environment needs; it is written
last, so where it is, DeepSpeed and its operators are whole. llama.cpp is compiled after it, for this very processor;
where that fails, the rest stays and `llama-cpp.json` is missing: a benchmark says that it leaves it out.

Peers that are programs (fio) come from the system's packages, where this process may install them; a benchmark says
what it leaves out.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import shutil
from pathlib import Path

from _setup import REPO, SetupError, Steps, Venv, locked, say, shown

FOLDER = REPO / ".venv-peers"
PINS = REPO / "tools" / "peers-constraints.txt"
# Builder names of DeepSpeed's CPU operators that the benchmarks meet, quickest first.
OPERATORS = ("ShareMemCommBuilder", "FusedAdamBuilder", "CPUAdamBuilder")
# Needs a system library; without it the rest is whole.
OPTIONAL_OPERATORS = ("AsyncIOBuilder",)
# Not among the pins, which must all install. No curl, no pictures: nothing but the library.
LLAMA_CPP = "llama-cpp-python==0.3.36"
LLAMA_CPP_OPTIONS = "-DGGML_NATIVE=ON -DGGML_OPENMP=ON -DLLAVA_BUILD=OFF -DLLAMA_OPENSSL=OFF"
# Debian packages, and what shows that each is there.
PROGRAMS = {"fio": "fio"}
HEADERS = {"libaio-dev": "libaio.h"}
BUILD = "from deepspeed.accelerator import get_accelerator as a; a().create_op_builder({name!r}).load()"


def set_up() -> None:
    """Install the peers and build what they compile; does nothing when all is there."""
    with locked("peers"):
        install_system_packages()
        key = setup_key()
        if not ready(key):
            install_peers(key)
        build_llama_cpp()


def install_peers(key: str) -> None:
    """Make the environment: the pinned packages, DeepSpeed's operators."""
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
    for name in operators():
        forget_stale_locks(Path(environ["TORCH_EXTENSIONS_DIR"]))
        title = f"building DeepSpeed's {name.removesuffix('Builder')}"
        steps.run(title, [venv.python, "-c", BUILD.format(name=name)], retry)
    environ.pop("PATH")
    (FOLDER / "environ.json").write_text(json.dumps({"key": key, "bin": str(venv.bin), "environ": environ}))


def build_llama_cpp() -> None:
    """Compile llama.cpp into the environment, unless it is there; where that fails, say so and go on."""
    made = FOLDER / "llama-cpp.json"
    key = digest(LLAMA_CPP, LLAMA_CPP_OPTIONS, platform.machine(), processor())
    if made.exists() and json.loads(made.read_text())["key"] == key:
        return
    made.unlink(missing_ok=True)
    venv = Venv(FOLDER)
    build = {"CMAKE_ARGS": LLAMA_CPP_OPTIONS, "CMAKE_BUILD_PARALLEL_LEVEL": str(os.cpu_count() or 1)}
    steps = Steps(FOLDER / "llama-cpp.log", {**venv.environ(), **build})
    # A wheel in pip's cache may have been built for another processor, or with other options.
    how = ("--no-build-isolation", "--no-binary", "llama-cpp-python", "--no-cache-dir", "--force-reinstall")
    command: list[str | Path] = [venv.python, "-m", "pip", "install", "-v", "--no-deps", *how, LLAMA_CPP]
    try:
        steps.run("building llama.cpp (about ten minutes)", command, "")
    except SetupError as error:
        say(f"{error}  llama.cpp is left out of benchmarks; run this again to build it")
        return
    made.write_text(json.dumps({"key": key}))


def install_system_packages() -> None:
    """Install what is missing of the system's packages, where that can be done; says what stays missing."""
    wanted = missing_packages()
    if wanted and shutil.which("apt-get") and os.geteuid() == 0:
        command = ["apt-get", "install", "-y", "--no-install-recommends", *wanted]
        steps = Steps(REPO / ".build" / "peers-system.log", {"DEBIAN_FRONTEND": "noninteractive"})
        with contextlib.suppress(SetupError):
            steps.run(f"installing {', '.join(wanted)}", command, "")
    for name in missing_packages():
        say(f"  {name} is not here: benchmarks leave out what needs it (Debian: `apt-get install {name}`)")


def missing_packages() -> list[str]:
    """Those of the system's packages that are not there."""
    programs = [package for package, program in PROGRAMS.items() if not shutil.which(program)]
    return programs + [package for package, header in HEADERS.items() if not has_header(header)]


def has_header(name: str) -> bool:
    """Whether a C header is among the system's."""
    return any(Path(folder, name).exists() for folder in ("/usr/include", "/usr/local/include"))


def operators() -> tuple[str, ...]:
    """DeepSpeed's operators that can be built here."""
    return OPERATORS + OPTIONAL_OPERATORS * all(map(has_header, HEADERS.values()))


def setup_key() -> str:
    """What the installed environment depends on; operators are compiled for this very processor."""
    return digest(PINS.read_text(), platform.machine(), processor(), os.fspath(REPO), " ".join(operators()))


def digest(*texts: str) -> str:
    """One short hash of all."""
    return hashlib.sha256("".join(texts).encode()).hexdigest()[:12]


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

"""The developer's one command: sets everything up when it has to, then runs what was asked for.

    python3 tools/dev.py demo            train a small model sharded over two processes, in about two minutes
    python3 tools/dev.py test [ARGS]     all tests and documentation examples; ARGS go to pytest
    python3 tools/dev.py lint            style, types, import boundaries, declared dependencies
    python3 tools/dev.py docs            run the examples of every README and documentation page
    python3 tools/dev.py bench [NAME..]  every benchmark in quick mode, or one with its own arguments
    python3 tools/dev.py build           wheels and source distributions of every package, into dist/
    python3 tools/dev.py shell [CMD..]   a shell, or one command, inside the environment
    python3 tools/dev.py peers           the engines that benchmarks compare with, in their own environment

Set-up makes `.venv` from `tools/constraints.txt` and installs every package of the repository in editable
mode. It notices what changed since (pins, a package's metadata, C++ sources) and redoes that part alone;
otherwise it is silent. To start afresh, or to move to another Python, delete `.venv`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypedDict

from _setup import REPO, SetupError, Steps, Venv, locked, say, shown

PINS = REPO / "tools" / "constraints.txt"
VENV = Venv(REPO / ".venv")
STAMP = VENV.folder / "set-up.json"
NOT_BY_DEFAULT = "not gpu and not slow and not net"
RETRY = "Run the same command again when that is mended; what is already there is kept."


class State(TypedDict):
    """What is installed, as hashes of everything it was made from."""

    dependencies: str
    packages: dict[str, str]


# -- set-up ------------------------------------------------------------------------------------------


def set_up() -> None:
    """Bring `.venv` up to date with the working tree."""
    if up_to_date():
        return
    with locked("setup"):
        if up_to_date():  # another process did it while this one waited
            return
        first = not VENV.python.exists()
        say(
            f"setting up {shown(VENV.folder)}"
            + (" (once; some minutes)" if first else " (something changed)")
        )
        steps = VENV.create("set-up.log")
        have, want = read_state(), wanted_state()
        pip: list[str | Path] = [VENV.python, "-m", "pip", "--disable-pip-version-check", "--no-input"]
        if have["dependencies"] != want["dependencies"]:
            STAMP.unlink(missing_ok=True)
            have = State(dependencies=want["dependencies"], packages={})
            steps.run("installing pinned dependencies", [*pip, "install", "-r", PINS], RETRY)
            write_state(have)
        install_packages(steps, pip, have, want)


def install_packages(steps: Steps, pip: Sequence[str | Path], have: State, want: State) -> None:
    """Install those packages of the repository whose metadata or native sources changed."""
    for name in have["packages"].keys() - want["packages"].keys():
        steps.run(f"removing {name}", [*pip, "uninstall", "-y", name], RETRY)
        del have["packages"][name]
    changed = [name for name, key in want["packages"].items() if have["packages"].get(name) != key]
    native = [name for name in changed if is_native(package_folder(name))]
    plain = [name for name in changed if name not in native]
    if native and compiler() is None:
        say(
            "  no C++ compiler (c++, g++, clang++) here: kernels use their portable back end, which is slower"
        )
    for title, names in [*((f"building {name}", [name]) for name in native), ("installing packages", plain)]:
        if names:
            editable = [argument for name in names for argument in ("-e", package_folder(name))]
            steps.run(title, [*pip, "install", "--no-build-isolation", "--no-deps", *editable], RETRY)
            have["packages"].update((name, want["packages"][name]) for name in names)
            write_state(have)


def up_to_date() -> bool:
    """Whether the environment is there and was made from what the working tree holds now."""
    return VENV.python.exists() and read_state() == wanted_state()


def read_state() -> State:
    """What was installed, or nothing where that is unknown."""
    try:
        state = json.loads(STAMP.read_text())
        return State(dependencies=state["dependencies"], packages=state["packages"])
    except (OSError, ValueError, KeyError):
        return State(dependencies="", packages={})


def write_state(state: State) -> None:
    """Keep `state`; written beside and renamed, so that an interruption leaves the old or the new one."""
    beside = STAMP.with_suffix(".new")
    beside.write_text(json.dumps(state, indent=1))
    beside.replace(STAMP)


def wanted_state() -> State:
    """Hashes of what the working tree asks for."""
    # An environment cannot be moved: its path counts.
    dependencies = digest([PINS, VENV.folder / "pyvenv.cfg"], os.fspath(REPO))
    return State(dependencies=dependencies, packages={name: package_key(name) for name in package_names()})


def package_names() -> list[str]:
    """The repository's packages: every folder under packages/ that has metadata."""
    return sorted(path.parent.name for path in (REPO / "packages").glob("*/pyproject.toml"))


def package_folder(name: str) -> Path:
    """Where a package of the repository lives."""
    return REPO / "packages" / name


def is_native(folder: Path) -> bool:
    """Whether a package compiles something."""
    return (folder / "CMakeLists.txt").exists()


def package_key(name: str) -> str:
    """A hash of what an editable install of the package depends on."""
    folder = package_folder(name)
    metadata = [folder / name for name in ("pyproject.toml", "setup.py", "requirements.txt")]
    if not is_native(folder):
        return digest(metadata)
    sources = [path for path in (REPO / "csrc").rglob("*") if path.is_file()]
    # A native package's editable install lists its modules: their names count, their text does not.
    modules = sorted(path.name for path in (folder / "src").rglob("*.py"))
    return digest([*metadata, folder / "CMakeLists.txt", *sources], str(compiler()), *modules)


def digest(files: Iterable[Path], *texts: str) -> str:
    """One hash over files (names and contents) and texts."""
    total = hashlib.sha256()
    for path in sorted(files):
        content = path.read_bytes() if path.exists() else b""
        total.update(f"{path.name}:{len(content)}:".encode() + content)
    for text in texts:
        total.update(f"{len(text)}:{text}".encode())
    return total.hexdigest()[:16]


def compiler() -> str | None:
    """The C++ compiler that a build would find."""
    candidates = (os.environ.get("CXX", "").split(" ")[0], "c++", "g++", "clang++")
    return next((found for name in candidates if name and (found := shutil.which(name))), None)


# -- commands ----------------------------------------------------------------------------------------


def demo(arguments: list[str]) -> int:
    """Train a small model sharded over two processes."""
    if "zerostack" not in package_names():
        raise SetupError("The demo belongs to packages/zerostack, which this working tree does not have.")
    return run(VENV.python, "-m", "zerostack", "demo", *arguments)


def test(arguments: list[str]) -> int:
    """Run pytest over everything, or over what the arguments name."""
    paths = [] if any(names_path(argument) for argument in arguments) else test_paths()
    # Tests start several processes each: one thread a process, or they fight over the processor's cores.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # Half of a test's time is waiting, for processes and sockets: one worker more than there are cores.
    workers = str(len(os.sched_getaffinity(0)) + 1)
    # The same examples in every run; `--hypothesis-profile default` after it looks for new ones.
    chosen = ["-n", workers, "-m", NOT_BY_DEFAULT, "--hypothesis-profile", "ci"]
    return run(VENV.python, "-m", "pytest", *chosen, *arguments, *paths)


def test_paths() -> list[str]:
    """Every folder of tests in the repository."""
    folders = [*(REPO / "packages").glob("*/tests"), REPO / "integration_tests", REPO / "tools" / "tests"]
    return [shown(folder) for folder in sorted(folders) if folder.is_dir()]


def names_path(argument: str) -> bool:
    """Whether a pytest argument is a file, a folder or a test inside one."""
    return not argument.startswith("-") and (REPO / argument.split("::")[0]).exists()


def lint(arguments: list[str]) -> int:
    """Run every static check."""
    return run(VENV.python, "tools/lint.py", *arguments)


def docs(arguments: list[str]) -> int:
    """Run the documentation's examples."""
    return run(VENV.python, "tools/run_examples.py", *arguments)


def bench(arguments: list[str]) -> int:
    """Run every benchmark quickly, or one with its own arguments."""
    if arguments and not arguments[0].startswith("-"):
        name, known = (
            arguments[0].removesuffix(".py"),
            [*benchmark_names(), *benchmark_names("gpu_"), *benchmark_names("net_")],
        )
        if name not in known:
            raise SetupError(f"no benchmark {name!r}; there are: {', '.join(known)}")
        return run(VENV.python, f"benchmarks/{name}.py", *arguments[1:])
    codes = {
        name: run(VENV.python, f"benchmarks/{name}.py", "--quick", *arguments) for name in benchmark_names()
    }
    failed = [name for name, code in codes.items() if code]
    if failed:
        say(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


def benchmark_names(prefix: str = "") -> list[str]:
    """The benchmarks: every script in benchmarks/ that can be run; `gpu_` need a GPU, `net_` root, for the lab."""
    scripts = (REPO / "benchmarks").glob(f"{prefix or '[!_]'}*.py")
    names = sorted(path.stem for path in scripts if '__name__ == "__main__"' in path.read_text())
    return [name for name in names if prefix or not name.startswith(("gpu_", "net_"))]


def build(arguments: list[str]) -> int:
    """Build what would be published."""
    return run(VENV.python, "-m", "nox", "-s", "build", *arguments)


def shell(arguments: list[str]) -> int:
    """Start a shell, or a command, inside the environment."""
    return run(*(arguments or [os.environ.get("SHELL", "sh")]))


def peers(arguments: list[str]) -> int:
    """Set up the engines that benchmarks compare with."""
    from peers import FOLDER
    from peers import set_up as set_up_peers

    set_up_peers()
    say(f"{shown(FOLDER)} is ready")
    return 0


def run(program: str | Path, *arguments: str | Path) -> int:
    """Run a program inside the environment, from the repository's root; returns its exit code."""
    os.environ.update(VENV.environ())
    os.chdir(REPO)
    try:
        return subprocess.call([program, *arguments])
    except KeyboardInterrupt:  # the program got it too, and has ended by itself
        return 130
    except FileNotFoundError:
        raise SetupError(f"there is no command {str(program)!r}") from None


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    command.__name__: command for command in (demo, test, lint, docs, bench, build, shell, peers)
}


def main(arguments: list[str]) -> int:
    """Carry out one command line."""
    if not arguments or arguments[0] not in COMMANDS:
        say(__doc__ or "")
        known = arguments and arguments[0] in ("-h", "--help", "help")
        if arguments and not known:
            say(f"unknown command {arguments[0]!r}; one of: {', '.join(COMMANDS)}")
        return 0 if known else 2
    name, *rest = arguments
    try:
        if name != "peers":
            set_up()
        return COMMANDS[name](rest)
    except SetupError as error:
        say(f"\n{error}")
        return 1
    except KeyboardInterrupt:
        say("\nstopped; run the same command again to go on")
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

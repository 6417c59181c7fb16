"""Sessions for CI and releases, each in an environment of its own. For daily work there is tools/dev.py."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import nox

sys.path.insert(0, str(Path(__file__).parent / "tools"))
import dev

nox.options.sessions = ["lint", "tests", "docs"]
nox.options.reuse_existing_virtualenvs = True

PINS = "tools/constraints.txt"
PACKAGES = dev.package_names()
# What the GPU sessions need beside the pinned packages; CuPy is built per CUDA release.
CUPY_EXTRA = {"12": "cuda12", "13": "cuda13"}


@nox.session
def tests(session: nox.Session) -> None:
    """All tests, all packages together."""
    install_everything(session)
    run_pytest(session, "-n", "auto", "-m", dev.NOT_BY_DEFAULT, *(session.posargs or dev.test_paths()))


@nox.session
@nox.parametrize("package", PACKAGES, ids=PACKAGES)
def isolated(session: nox.Session, package: str) -> None:
    """One package's tests beside nothing but what it declares."""
    session.install("-c", PINS, f"packages/{package}", "pytest", "hypothesis")
    session.run("python", "-m", "pip", "check")
    run_pytest(session, "-m", dev.NOT_BY_DEFAULT, f"packages/{package}/tests", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Style, types, import boundaries, declared dependencies."""
    install_everything(session)
    session.run("python", "tools/lint.py")


@nox.session
def docs(session: nox.Session) -> None:
    """Every example of the documentation."""
    install_everything(session)
    session.run("python", "tools/run_examples.py", *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """Every benchmark in its quick mode."""
    install_everything(session)
    for name in dev.benchmark_names():
        session.run("python", f"benchmarks/{name}.py", "--quick", *session.posargs)


@nox.session
def slow(session: nox.Session) -> None:
    """Tests that take minutes: the same promises as the others, tried longer (two hundred kills in a save)."""
    install_everything(session)
    run_pytest(session, "-m", "slow", *(session.posargs or dev.test_paths()))


@nox.session
def gpu(session: nox.Session) -> None:
    """The tests that need a CUDA device; skipped where there is none."""
    require_gpu(session)
    run_pytest(session, "-m", "gpu", *(session.posargs or dev.test_paths()))


@nox.session
def bench_gpu(session: nox.Session) -> None:
    """The benchmarks on a CUDA device; skipped where there is none."""
    require_gpu(session)
    for name in dev.benchmark_names("gpu_"):
        session.run("python", f"benchmarks/{name}.py", *session.posargs)


@nox.session
def build(session: nox.Session) -> None:
    """Wheels and source distributions of every package, into dist/; each wheel is built from its sdist."""
    session.install("-c", PINS, "build")
    shutil.rmtree("dist", ignore_errors=True)
    for name in PACKAGES:
        session.run("python", "-m", "build", "--outdir", "dist", f"packages/{name}")


def install_everything(session: nox.Session) -> None:
    """The pinned dependencies, then every package from the working tree."""
    session.install("-r", PINS)
    editable = [argument for name in PACKAGES for argument in ("-e", f"packages/{name}")]
    session.install("--no-build-isolation", "--no-deps", *editable)


def run_pytest(session: nox.Session, *arguments: str) -> None:
    """Run pytest; one thread a process, for tests start several processes each."""
    session.run("python", "-m", "pytest", *arguments, env={"OMP_NUM_THREADS": "1"})


def require_gpu(session: nox.Session) -> None:
    """Install everything and CuPy for this machine's CUDA release, or skip the session."""
    if shutil.which("nvidia-smi") is None:
        session.skip("no NVIDIA driver here (nvidia-smi is not on PATH)")
    install_everything(session)
    code = "import torch; print((torch.version.cuda or '0') if torch.cuda.is_available() else '0')"
    version = str(session.run("python", "-c", code, silent=True)).strip().split(".")[0]
    if version not in CUPY_EXTRA:
        session.skip("torch finds no CUDA device here, or was built without CUDA")
    session.install(f"packages/accel-kernels[{CUPY_EXTRA[version]}]")

"""Set-up redoes what changed, and nothing else; it explains failures; two at once take turns."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import _setup
import dev
import pytest


@pytest.fixture
def repo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small repository: one native package, one plain."""
    for name in ("kernels", "plain"):
        (tmp_path / "packages" / name / "src" / name).mkdir(parents=True)
        (tmp_path / "packages" / name / "pyproject.toml").write_text(f"[project]\nname = '{name}'\n")
        (tmp_path / "packages" / name / "src" / name / "__init__.py").write_text("")
    (tmp_path / "packages" / "kernels" / "CMakeLists.txt").write_text("project(kernels)\n")
    (tmp_path / "packages" / "unfinished" / "src").mkdir(parents=True)
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "op.cpp").write_text("int op();\n")
    (tmp_path / "constraints.txt").write_text("numpy==2.0\n")
    for module in (dev, _setup):
        monkeypatch.setattr(module, "REPO", tmp_path)
    monkeypatch.setattr(dev, "PINS", tmp_path / "constraints.txt")
    monkeypatch.setattr(dev, "VENV", _setup.Venv(tmp_path / ".venv"))
    monkeypatch.setattr(dev, "STAMP", tmp_path / "set-up.json")
    return tmp_path


def changed(before: dev.State, after: dev.State) -> set[str]:
    names = {name for name, key in after["packages"].items() if before["packages"].get(name) != key}
    return names | ({"dependencies"} if before["dependencies"] != after["dependencies"] else set())


@pytest.mark.parametrize(
    ("file", "text", "affected"),
    [
        ("constraints.txt", "numpy==2.1\n", {"dependencies"}),
        ("packages/plain/pyproject.toml", "[project]\nname = 'plain'\nversion = '2'\n", {"plain"}),
        ("packages/plain/requirements.txt", "numpy\n", {"plain"}),
        ("packages/plain/src/plain/new.py", "", set()),
        ("packages/kernels/src/kernels/new.py", "", {"kernels"}),
        ("packages/kernels/src/kernels/__init__.py", "x = 1\n", set()),
        ("csrc/op.cpp", "int op(int);\n", {"kernels"}),
        ("csrc/new.cpp", "int op2();\n", {"kernels"}),
        ("packages/another/pyproject.toml", "[project]\nname = 'another'\n", {"another"}),
        ("README.md", "# Title\n", set()),
    ],
)
def test_only_what_a_change_touches_is_set_up_again(
    repo: Path, file: str, text: str, affected: set[str]
) -> None:
    before = dev.wanted_state()
    (repo / file).parent.mkdir(parents=True, exist_ok=True)
    (repo / file).write_text(text)
    assert changed(before, dev.wanted_state()) == affected


def test_a_compiler_that_appears_rebuilds_the_kernels(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = dev.wanted_state()
    monkeypatch.setattr(dev, "compiler", lambda: "/opt/new/c++")
    assert changed(before, dev.wanted_state()) == {"kernels"}


def test_what_was_installed_is_remembered(repo: Path) -> None:
    assert dev.read_state() == {"dependencies": "", "packages": {}}
    dev.write_state(dev.wanted_state())
    assert dev.read_state() == dev.wanted_state()
    dev.STAMP.write_text("{cut sho")
    assert dev.read_state() == {"dependencies": "", "packages": {}}


def test_packages_are_installed_step_by_step_and_removed_when_gone(
    repo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[list[str]] = []

    class Recorder(_setup.Steps):
        def run(self, title: str, command: object, cure: str) -> None:
            ran.append([title, *map(str, command)])  # type: ignore[call-overload]

    monkeypatch.setattr(dev, "compiler", lambda: "/usr/bin/c++")
    have = dev.State(dependencies="", packages={"old": "key", "plain": dev.package_key("plain")})
    dev.install_packages(Recorder(repo / "log"), ["pip"], have, dev.wanted_state())
    assert [command[0] for command in ran] == ["removing old", "building kernels"]
    assert dev.read_state()["packages"] == dev.wanted_state()["packages"]


def test_half_installed_packages_are_forgotten(tmp_path: Path) -> None:
    site = tmp_path / "lib" / "python3.11" / "site-packages"
    for name, files in {"whole": ["METADATA", "INSTALLER"], "cut": ["METADATA"]}.items():
        (site / f"{name}-1.dist-info").mkdir(parents=True)
        for file in files:
            (site / f"{name}-1.dist-info" / file).write_text("")
    _setup.Venv(tmp_path)._forget_half_installed()
    assert [path.name for path in site.iterdir()] == ["whole-1.dist-info"]


def test_a_failed_step_shows_the_end_of_its_log_and_the_cure(tmp_path: Path) -> None:
    steps = _setup.Steps(tmp_path / "log")
    code = "print('first'); print('no space left'); raise SystemExit(3)"
    with pytest.raises(_setup.SetupError, match=r"(?s)no space left.*exit code 3.*make room"):
        steps.run("installing", [sys.executable, "-c", code], "make room")


def test_a_python_without_venv_is_told_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "python3"
    broken.write_text("#!/bin/sh\necho ensurepip is not available\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(_setup, "find_python", lambda: str(broken))
    with pytest.raises(_setup.SetupError, match=r"(?s)ensurepip is not available.*apt install python3-venv"):
        _setup.Venv(tmp_path / "venv").create("log")


def test_no_supported_python_is_said_plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 9, 1))
    monkeypatch.setenv("PATH", "")
    with pytest.raises(_setup.SetupError, match=r"Python 3\.10 to 3\.13 is needed; this is 3\.9\.1"):
        _setup.find_python()


def test_set_ups_take_turns(repo: Path, capfd: pytest.CaptureFixture[str]) -> None:
    waits = (
        f"import sys; sys.path.insert(0, {str(Path(dev.__file__).parent)!r})\n"
        "import pathlib, _setup\n"
        f"_setup.REPO = pathlib.Path({str(repo)!r})\n"
        "with _setup.locked('x'): print('mine', flush=True)\n"
    )
    with _setup.locked("x"):
        second = subprocess.Popen(
            [sys.executable, "-c", waits], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert second.stderr is not None
        assert "waiting" in second.stderr.readline()
        assert second.poll() is None
    assert second.communicate(timeout=30)[0] == "mine\n"


@pytest.mark.parametrize(
    ("argument", "is_path"),
    [("packages/plain", True), ("packages/plain::test_x", True), ("-x", False), ("no/such", False)],
)
def test_arguments_that_name_tests_replace_the_default_ones(repo: Path, argument: str, is_path: bool) -> None:
    assert dev.names_path(argument) is is_path


def test_an_unknown_command_names_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert dev.main(["tset"]) == 2
    assert "one of: demo, test" in capsys.readouterr().err

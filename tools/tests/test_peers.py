"""Peers that others can do without may fail to build: it is said, the rest stays, and the next set-up tries again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import _setup
import peers
import pytest


class Builds:
    """Stands in for `Steps.run`; keeps titles, and fails where it is told to."""

    def __init__(self) -> None:
        self.titles: list[str] = []
        self.failing = ""

    def __call__(self, title: str, command: Sequence[str | Path], cure: str) -> None:
        self.titles.append(title)
        if self.failing and self.failing in title:
            raise _setup.SetupError(f"{title} failed\n{cure}")


@pytest.fixture
def builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Builds:
    for name in ("REPO", "FOLDER"):
        monkeypatch.setattr(peers, name, tmp_path)
    monkeypatch.setattr(_setup, "REPO", tmp_path)
    monkeypatch.setattr(peers, "install_system_packages", lambda: None)
    (tmp_path / "bin").mkdir()
    made = Builds()
    monkeypatch.setattr(_setup.Steps, "run", lambda _self, *arguments: made(*arguments))
    monkeypatch.setattr(peers.Venv, "create", lambda self, log: _setup.Steps(self.folder / log))
    return made


def test_what_is_there_is_not_built_again(builds: Builds) -> None:
    peers.set_up()
    assert any("DeepSpeed" in title for title in builds.titles)
    assert any("llama.cpp" in title for title in builds.titles)
    count = len(builds.titles)
    peers.set_up()
    assert len(builds.titles) == count


def test_without_llama_cpp_the_rest_is_whole_and_the_next_set_up_tries_again(
    builds: Builds, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    builds.failing = "llama.cpp"
    peers.set_up()
    assert "left out" in capsys.readouterr().err
    assert json.loads((tmp_path / "environ.json").read_text())["bin"]
    assert not (tmp_path / "llama-cpp.json").exists()
    builds.titles.clear()
    builds.failing = ""
    peers.set_up()
    assert len(builds.titles) == 1
    assert "llama.cpp" in builds.titles[0]
    assert (tmp_path / "llama-cpp.json").exists()


def test_another_version_or_processor_is_built_anew(builds: Builds, monkeypatch: pytest.MonkeyPatch) -> None:
    peers.set_up()
    builds.titles.clear()
    monkeypatch.setattr(peers, "LLAMA_CPP_OPTIONS", "-DGGML_NATIVE=OFF")
    peers.set_up()
    assert [("llama.cpp" in title) for title in builds.titles] == [True]
    builds.titles.clear()
    monkeypatch.setattr(peers, "processor", lambda: "another")
    peers.set_up()
    assert any("DeepSpeed" in title for title in builds.titles)
    assert any("llama.cpp" in title for title in builds.titles)


def test_deepspeed_that_does_not_build_ends_the_set_up(builds: Builds, tmp_path: Path) -> None:
    builds.failing = "CPUAdam"
    with pytest.raises(_setup.SetupError, match="CPUAdam"):
        peers.set_up()
    assert not (tmp_path / "environ.json").exists()

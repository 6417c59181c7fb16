"""The command's exit code tells: 0 is said only of what was read and found well."""

from __future__ import annotations

import ckpt_universal as ckpt
import pytest
import torch
from ckpt_universal.cli import main as command


@pytest.fixture
def run(tmp_path):
    for step in (1, 2):
        ckpt.save(tmp_path / "run", {"w": torch.arange(4.0), "step": step}, step=step)
    return tmp_path / "run"


@pytest.mark.parametrize("step", [1, 2])
def test_any_bit_of_a_marker_is_noticed_by_verify_all(run, capsys, step):
    marker = run / f"step-00000000{step}" / "COMMIT"
    good = marker.read_bytes()
    for at in range(0, len(good.rstrip()), 5):
        bad = bytearray(good)
        bad[at] ^= 1 << at % 7
        marker.write_bytes(bad)
        assert command(["verify", str(run), "--all"]) == 1, at
        out = capsys.readouterr().out
        assert marker.parent.name in out
        assert "all as written" in out, "the other step was read all the same"
    marker.write_bytes(b"")
    assert command(["verify", str(run), "--all"]) == 1
    assert str(marker) in capsys.readouterr().out
    assert command(["verify", str(run), "--name", marker.parent.name]) == 1
    assert str(marker) in capsys.readouterr().out
    assert command(["verify", str(marker.parent)]) == 1
    assert str(marker) in capsys.readouterr().out
    marker.write_bytes(good)
    assert command(["verify", str(run), "--all"]) == 0
    assert command(["verify", str(marker.parent), "--all"]) == 0
    assert marker.parent.name in capsys.readouterr().out


def test_nothing_is_no_success(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    commands = (
        ["verify", "--all"],
        ["inspect", "--steps"],
        ["prune", "--keep-last", "1"],
        ["prune", "--partial"],
    )
    for words in commands:
        for where in ("nowhere", "empty"):
            assert command([*words, str(tmp_path / where)]) == 2, (words, where)
            assert f"{where}: no committed checkpoint" in capsys.readouterr().err
    assert command(["verify", str(tmp_path), "--all"]) == 2


def test_what_interrupted_saves_left_can_be_removed_where_no_step_is(tmp_path, capsys):
    left = tmp_path / "run" / "step-000000001" / "data-0123456789abcdef-00000"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"x")
    assert command(["prune", str(tmp_path / "run"), "--partial"]) == 0
    assert left.name in capsys.readouterr().out
    assert not left.exists()

"""Which step is there: commit, latest, replacing, pruning, and two runs in one place."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time

import ckpt_universal as ckpt
import pytest
import torch
from ckpt_universal import steps
from ckpt_universal.places import open_directory


def put(root, step, value=None, **more):
    return ckpt.save(
        root, {"w": torch.full((50,), float(step if value is None else value))}, step=step, **more
    )


def value(path, **more):
    state = {"w": torch.zeros(50)}
    loaded = ckpt.load(path, into=state, **more)
    assert (state["w"] == state["w"][0]).all()
    return loaded.step, float(state["w"][0])


def test_the_latest_step_is_loaded_or_the_one_named(tmp_path):
    for step in (1, 2, 10):
        put(tmp_path, step)
    put(tmp_path, 3, name="best", policy=ckpt.SavePolicy(point_latest=False))
    assert value(tmp_path) == (10, 10)
    assert value(tmp_path, name="step-000000002") == (2, 2)
    assert value(tmp_path / "step-000000001") == (1, 1)
    assert value(tmp_path, name="best") == (3, 3)
    assert [step.name for step in steps.list_steps(open_directory(tmp_path))] == [
        "best",
        "step-000000001",
        "step-000000002",
        "step-000000010",
    ]


def test_a_step_is_replaced_at_once_and_leaves_nothing_behind(tmp_path):
    put(tmp_path, 1, value=5)
    before = set(os.listdir(tmp_path / "step-000000001"))
    put(tmp_path, 1, value=6)
    after = set(os.listdir(tmp_path / "step-000000001"))
    assert value(tmp_path) == (1, 6)
    assert before & after == {"COMMIT"}
    assert len(after) == 3


def test_what_is_not_committed_does_not_exist(tmp_path, caplog):
    put(tmp_path, 1)
    put(tmp_path, 2)
    (tmp_path / "step-000000002" / "COMMIT").unlink()
    with caplog.at_level(logging.WARNING):
        assert value(tmp_path) == (1, 1)
    assert "'latest' points to 'step-000000002'" in caplog.text
    assert "taking step-000000001 instead" in caplog.text
    with pytest.raises(
        ckpt.NotACheckpointError, match="an interrupted save left files there: no file COMMIT"
    ):
        value(tmp_path / "step-000000002")
    with pytest.raises(ckpt.NotACheckpointError, match="no committed checkpoint"):
        value(tmp_path / "nowhere")


def test_retention_keeps_the_last_and_every_nth(tmp_path):
    policy = ckpt.SavePolicy(retention=ckpt.Retention(keep_last=2, keep_every=4))
    put(tmp_path, 0, name="mine")
    for step in range(1, 10):
        put(tmp_path, step, policy=policy)
    assert [s.number for s in steps.list_steps(open_directory(tmp_path))] == [-1, 4, 8, 9]
    assert sorted(os.listdir(tmp_path)) == ["latest", "mine", *(f"step-{n:09d}" for n in (4, 8, 9))]


@pytest.mark.parametrize("bad", [{"keep_last": 0}, {"keep_every": -1}, {"keep_last": 1.5}])
def test_bad_retention(bad):
    with pytest.raises(ckpt.ConfigError, match="expected a number >= 1 or None"):
        ckpt.Retention(**bad)


def test_a_retention_that_would_keep_everything_is_refused():
    with pytest.raises(ckpt.ConfigError, match="without keep_last every step stays"):
        ckpt.Retention(keep_every=3)


@pytest.mark.parametrize("name", ["../up", "a/b", "", ".hidden", "latest", "COMMIT", "x" * 300])
def test_names_stay_inside(tmp_path, name):
    with pytest.raises(ckpt.ConfigError, match="name: expected letters"):
        put(tmp_path, 1, name=name)
    (tmp_path / "latest").write_text(name)
    with pytest.raises(ckpt.NotACheckpointError):
        value(tmp_path)


HOLD = """
import sys, time
from ckpt_universal.places import open_directory
from ckpt_universal.steps import claim
claim(open_directory(sys.argv[1]), "f" * 16)
open(sys.argv[1] + "/data-" + "f" * 16 + "-00000.bin", "w").write("half")
print("held", flush=True)
time.sleep(60)
"""


def test_two_runs_saving_one_step_meet_an_error_and_a_dead_run_none(tmp_path):
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "step-000000001")], stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(
            ckpt.BusyError, match=rf"another run \(.*process {other.pid}\) is saving this very step"
        ):
            put(tmp_path, 1)
        put(tmp_path, 2)  # another step is nobody's business
        assert value(tmp_path) == (2, 2)
    finally:
        other.kill()
        other.wait()
    put(tmp_path, 1)
    names = os.listdir(tmp_path / "step-000000001")
    assert not any("f" * 16 in name for name in names), "what the dead run left is cleared"
    assert value(tmp_path) == (1, 1)


def test_leftovers_of_any_step_can_be_removed(tmp_path):
    put(tmp_path, 1)
    half = tmp_path / "step-000000002"
    half.mkdir()
    (half / f"data-{'a' * 16}-00000.bin").write_text("half")
    stray = tmp_path / "step-000000001" / f"index-{'b' * 16}.msgpack"
    stray.write_text("half")
    removed = steps.prune_partial(open_directory(tmp_path))
    assert removed == [f"step-000000001/{stray.name}", f"step-000000002/data-{'a' * 16}-00000.bin"]
    assert not half.exists()
    assert value(tmp_path) == (1, 1)


def test_a_url_of_a_store_in_memory(tmp_path):
    pytest.importorskip("fsspec")
    root = f"memory://{tmp_path.name}-{time.time_ns()}"
    for step in (1, 2, 2, 3):
        put(root, step, policy=ckpt.SavePolicy(retention=ckpt.Retention(keep_last=2)))
    assert value(root) == (3, 3)
    assert value(root, name="step-000000002") == (2, 2)
    directory = open_directory(root)
    assert [s.number for s in steps.list_steps(directory)] == [2, 3]
    assert len(directory.child("step-000000002").names()) == 3
    assert ckpt.verify(root).ok
    directory.child("step-000000003").remove("COMMIT")
    assert value(root) == (2, 2)
    assert steps.prune_partial(directory, older_than_s=3600) == []
    assert len(steps.prune_partial(directory)) == 2


def test_a_url_of_this_machine(tmp_path):
    put(f"file://{tmp_path}", 4)
    assert value(tmp_path) == (4, 4)
    with pytest.raises(ckpt.ConfigError, match="nosuch"):
        put("nosuch://bucket/x", 1)


def test_retention_keeps_the_step_just_saved(tmp_path):
    for step in (100, 200):
        put(tmp_path, step)
    policy = ckpt.SavePolicy(point_latest=False, retention=ckpt.Retention(keep_last=2))
    assert value(put(tmp_path, 50, policy=policy)) == (50, 50)


def test_retention_passes_over_a_step_that_is_saved_anew(tmp_path, caplog):
    for step in (1, 2):
        put(tmp_path, step)
    again = steps.claim(open_directory(tmp_path / "step-000000001"), steps.new_token())
    put(tmp_path, 3, policy=ckpt.SavePolicy(retention=ckpt.Retention(keep_last=1)))
    assert (
        "is saving this very step; save to another directory or under another name; it stays" in caplog.text
    )
    assert value(tmp_path, name="step-000000001") == (1, 1)
    again.release()
    put(tmp_path, 4, policy=ckpt.SavePolicy(retention=ckpt.Retention(keep_last=1)))
    assert [step.name for step in steps.list_steps(open_directory(tmp_path))] == ["step-000000004"]


def test_a_damaged_latest_is_passed_over(tmp_path, caplog):
    put(tmp_path, 1)
    for damaged in (b"x" * 10_000, b"\xff\xfe", b"../elsewhere"):
        (tmp_path / "latest").write_bytes(damaged)
        assert value(tmp_path) == (1, 1)
    put(tmp_path, 2, policy=ckpt.SavePolicy(point_latest=False, retention=ckpt.Retention(keep_last=1)))


def test_a_file_that_is_not_there_is_noticed_before_the_commit(tmp_path, monkeypatch):
    put(tmp_path, 1)
    save = sys.modules["ckpt_universal.save"]
    original = save.write_file

    def lost(directory, name, *args, **kwargs):
        written = original(directory, name, *args, **kwargs)
        directory.remove(name)
        return written

    monkeypatch.setattr(save, "write_file", lost)
    with pytest.raises(ckpt.CheckpointError, match=r"it is not there, though a rank has written it"):
        put(tmp_path, 2)
    assert value(tmp_path) == (1, 1)


@pytest.mark.parametrize("step", [-1, 2**63, 1.0, True])
def test_a_step_is_a_number(tmp_path, step):
    with pytest.raises(ckpt.ConfigError, match="expected a number >= 0"):
        put(tmp_path, step, value=1)

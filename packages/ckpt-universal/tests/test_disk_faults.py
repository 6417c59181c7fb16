"""The disk refuses: full, read-only, gone. What was committed before is as it was."""

from __future__ import annotations

import os
import subprocess

import ckpt_universal as ckpt
import pytest
import torch

MIB = 1 << 20


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 8 MiB."""
    mount = tmp_path / "disk"
    mount.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(mount)], capture_output=True, check=False
    )
    if made.returncode:
        pytest.skip("no right to mount a file system")
    yield mount
    subprocess.run(["umount", "-l", str(mount)], check=True)


def state(mib, fill=1.0):
    return {"w": torch.full((mib * MIB // 4,), fill)}


def assert_step(root, step, mib, fill):
    into = state(mib, 0.0)
    assert ckpt.load(root, into=into).step == step
    assert (into["w"] == fill).all()


@pytest.mark.parametrize("compress", [None, 1])
def test_a_full_disk(small_disk, compress):
    policy = ckpt.SavePolicy(compress=compress)
    ckpt.save(small_disk, state(3), step=1)
    big = {"w": torch.randn(7 * MIB // 4)}
    with pytest.raises(ckpt.CheckpointError, match=r"disk/step-000000002/data-.*(free|space)"):
        ckpt.save(small_disk, big, step=2, policy=policy)
    assert not (small_disk / "step-000000002").exists()
    assert_step(small_disk, 1, 3, 1.0)
    with pytest.raises(ckpt.CheckpointError):  # replacing needs room for both, and keeps the old one
        ckpt.save(small_disk, big, step=1, policy=policy)
    assert_step(small_disk, 1, 3, 1.0)
    ckpt.save(small_disk, state(3, 2.0), step=2)
    assert_step(small_disk, 2, 3, 2.0)


def test_a_full_disk_in_the_background(small_disk):
    saver = ckpt.AsyncSaver(small_disk)
    saver.save(state(3), step=1)
    assert saver.wait() == str(small_disk / "step-000000001")
    saver.save(state(7), step=2)
    with pytest.raises(ckpt.CheckpointError, match=r"step-000000002/data-.*free"):
        saver.wait()
    saver.save(state(2, 5.0), step=3)
    saver.close()
    assert_step(small_disk, 3, 2, 5.0)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere; see the next test")
def test_a_read_only_directory(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ckpt.CheckpointError, match="choose a path that this process may write to"):
        ckpt.save(tmp_path / "x", state(1), step=1)


def test_a_read_only_file_system(small_disk):
    ckpt.save(small_disk, state(1), step=1)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(
        ckpt.CheckpointError, match=r"Read-only file system; choose a path that this process may write"
    ):
        ckpt.save(small_disk, state(1), step=2)
    assert_step(small_disk, 1, 1, 1.0)


def test_a_path_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ckpt.CheckpointError, match="file"):
        ckpt.save(tmp_path / "file", state(1), step=1)

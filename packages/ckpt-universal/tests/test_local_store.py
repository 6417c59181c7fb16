"""Locks, temporary files and rights on this machine's file systems."""

from __future__ import annotations

import errno
import gc
import os
import threading
import weakref
from pathlib import Path

import ckpt_universal as ckpt
import pytest
import torch
from ckpt_universal import local_store
from ckpt_universal.local_store import LocalDirectory


def state(fill=1.0):
    return {"w": torch.full((1000,), fill)}


def open_files(path):
    """Descriptors of this process that are open on what lies in a directory."""
    found = []
    for each in Path("/proc/self/fd").iterdir():
        try:
            target = os.readlink(each)
        except FileNotFoundError:
            continue
        if target.startswith(str(path)):
            found.append(target)
    return found


def test_a_full_disk_at_the_lock_does_not_stop_a_save(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(local_store.os, "write", full)
        patch.setattr(local_store.os, "truncate", full)
        ckpt.save(tmp_path, state(2.0), step=1)
    assert not open_files(tmp_path)
    ckpt.save(tmp_path, state(3.0), step=1)
    assert (ckpt.read_tree(tmp_path)["w"] == 3).all()
    assert not [name for name in os.listdir(tmp_path / "step-000000001") if name.startswith(".")]


def test_a_lock_that_fails_leaves_nothing(tmp_path, monkeypatch):
    directory = LocalDirectory(tmp_path)

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(local_store.os, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            directory.lock("x")
    assert directory.names() == []
    assert not open_files(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(local_store.fcntl, "flock", interrupted)
        (tmp_path / "x").touch()  # another's, for all that is known
        with pytest.raises(KeyboardInterrupt):
            directory.lock("x")
    assert directory.names() == ["x"]
    assert not open_files(tmp_path)
    with monkeypatch.context() as patch:

        def full(*_):
            raise OSError(errno.ENOSPC, "No space left on device")

        patch.setattr(local_store.os, "open", full)
        with pytest.raises(ckpt.CheckpointError, match=r"No space left on device; .* make room"):
            directory.lock("x")
    release = directory.lock("x")
    assert release is not None
    assert directory.lock("x") is None
    assert len(open_files(tmp_path)) == 1  # the one that was refused is closed
    release()
    release()
    assert directory.names() == []


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # of threads, for those of torch
def test_a_forked_child_does_not_keep_the_lock(tmp_path):
    directory = LocalDirectory(tmp_path)
    asked, done = os.pipe(), os.pipe()
    holder = os.fork()
    if not holder:  # takes the lock, forks a child that lives on, and dies
        try:
            release = directory.lock("x")
            assert release is not None
            child = os.fork()
            if not child:
                release()  # as if it left a save by an exception: not its own
                os.write(done[1], b"up" if os.path.exists(tmp_path / "x") else b"no")
                os.close(asked[1])
                os.read(asked[0], 1)
        finally:
            os._exit(0)
    os.waitpid(holder, 0)
    os.close(done[1])
    try:
        assert os.read(done[0], 2) == b"up"
        release = directory.lock("x")
        assert release is not None
        release()
    finally:
        os.write(asked[1], b"x")
        for each in (*asked, done[0]):
            os.close(each)


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_the_parent_holds_it_on_while_a_child_ends(tmp_path):
    directory = LocalDirectory(tmp_path)
    release = directory.lock("x")
    assert release is not None
    child = os.fork()
    if not child:
        os._exit(0)
    os.waitpid(child, 0)
    assert directory.lock("x") is None
    release()
    lock = weakref.ref(release.__self__)
    del release
    gc.collect()
    assert lock() is None  # what is told of forks does not keep it


def test_threads_that_save_into_one_directory(tmp_path):
    errors = []
    begin = threading.Barrier(4)

    def run(number):
        try:
            begin.wait(30)
            for at in range(20):
                ckpt.save(tmp_path, state(float(number)), step=number * 100 + at)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len([name for name in os.listdir(tmp_path) if name.startswith("step-")]) == 80
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".new")]
    assert (ckpt.read_tree(tmp_path)["w"] >= 0).all()


def refuse(*_, **__):
    raise PermissionError(errno.EACCES, "Permission denied")


@pytest.mark.parametrize(("owner", "call"), [(os, "listdir"), (Path, "open"), (Path, "stat"), (os, "open")])
def test_what_one_may_not_read_is_an_error_with_a_cure(tmp_path, monkeypatch, owner, call):
    path = ckpt.save(tmp_path, state(), step=1)
    monkeypatch.setattr(owner, call, refuse)
    with pytest.raises(ckpt.CheckpointError, match=r"Permission denied; let this process read it"):
        ckpt.load(path, into=state(0.0))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read anything; see the one before")
def test_a_directory_that_one_may_not_read(tmp_path):
    ckpt.save(tmp_path / "run", state(), step=1)
    (tmp_path / "run").chmod(0)
    with pytest.raises(ckpt.CheckpointError, match="let this process read it"):
        ckpt.load(tmp_path / "run", into=state(0.0))
    (tmp_path / "run").chmod(0o700)

"""Saving while training goes on: what is saved is what was there, errors are not lost, ranks stay together."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
import time

import ckpt_universal as ckpt
import pytest
import torch
from ckpt_universal import async_save, local_store

run_ranks = pytest.importorskip("zero_core.testing").run_ranks  # spawns processes


def values_at(root, step):
    into = {"w": torch.zeros(1000), "step": -1}
    ckpt.load(root, into=into, name=f"step-{step:09d}")
    assert into["step"] == step
    return into["w"]


def test_the_state_may_change_at_once(tmp_path):
    state = {"w": torch.zeros(1000), "step": 0}
    with ckpt.AsyncSaver(tmp_path) as saver:
        for step in range(8):
            state["w"].fill_(step)
            state["step"] = step
            saver.save(state, step=step)
            state["w"].fill_(-1)
            state["step"] = -1
    assert saver.committed == str(tmp_path / "step-000000007")
    for step in range(8):
        assert (values_at(tmp_path, step) == step).all()


@pytest.fixture
def gate(monkeypatch):
    """Writing waits until it is opened."""
    opened = threading.Event()
    write = async_save.Writing.write

    def slow(*args, **kwargs):
        opened.wait(30)
        return write(*args, **kwargs)

    monkeypatch.setattr(async_save.Writing, "write", slow)
    return opened


def test_two_saves_wait_in_memory_and_the_third_waits_for_them(tmp_path, gate, caplog):
    caplog.set_level(logging.INFO, "ckpt_universal")
    saver = ckpt.AsyncSaver(tmp_path)
    state = {"w": torch.ones(10)}
    before = time.monotonic()
    saver.save(state, step=0)
    saver.save(state, step=1)
    assert time.monotonic() - before < 5
    assert "is committed" not in caplog.text, "nothing is said before it is true"
    third = threading.Thread(target=saver.save, args=(state,), kwargs={"step": 2})
    third.start()
    third.join(0.3)
    assert third.is_alive()
    gate.set()
    third.join(20)
    assert not third.is_alive()
    saver.close()
    assert caplog.text.count("is committed") == 3


def test_an_error_comes_with_the_next_call_and_later_saves_go_on(tmp_path):
    saver = ckpt.AsyncSaver(tmp_path)
    (tmp_path / "step-000000000").write_text("in the way")
    saver.save({"w": torch.ones(10)}, step=0)
    while not saver._jobs[0].done():
        time.sleep(0.01)
    with pytest.raises(ckpt.CheckpointError, match="step-000000000"):
        saver.save({"w": torch.ones(10)}, step=1)
    saver.save({"w": torch.ones(10)}, step=2)
    assert saver.wait() == str(tmp_path / "step-000000002")
    saver.close()


def test_a_block_that_fails_is_not_hidden_by_a_save_that_does(tmp_path):
    (tmp_path / "step-000000000").write_text("in the way")

    def block():
        with ckpt.AsyncSaver(tmp_path) as saver:
            saver.save({"w": torch.ones(10)}, step=0)
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        block()


def ranks_rank(rank, root):
    with ckpt.AsyncSaver(root) as saver:
        for step in range(5):
            size = 6 if step < 3 else 9  # the layout changes: it is agreed on anew
            local = torch.full((size,), float(10 * step + rank))
            state = {"w": ckpt.Shard((3 * size,), torch.float32, (rank * size,), local), "step": step}
            saver.save(state, step=step)
            torch.distributed.barrier()  # training goes on in its own group
    for step in range(5):
        size = 6 if step < 3 else 9
        found = ckpt.read_tree(root, name=f"step-{step:09d}")["w"]
        expected = torch.cat([torch.full((size,), float(10 * step + r)) for r in range(3)])
        assert torch.equal(found, expected)


def test_ranks_save_together(tmp_path):
    run_ranks(ranks_rank, 3, tmp_path)


def one_fails_rank(rank, root):
    saver = ckpt.AsyncSaver(root)
    state = {"w": ckpt.Shard((4,), torch.float32, (2 * rank,), torch.ones(2))}
    if rank == 1:
        original = async_save.Writing.write

        def broken(writing, token, pieces, *args, **kwargs):
            bad = [async_save.Piece(p.name, torch.empty(2, device="meta")) for p in pieces]
            return original(writing, token, bad, *args, **kwargs)

        async_save.Writing.write = broken
    saver.save(state, step=0)
    with pytest.raises(Exception, match=r"meta|rank 1"):
        saver.wait()
    if rank == 1:
        async_save.Writing.write = original
    saver.save(state, step=1)
    saver.close()
    assert ckpt.read_tree(root)["w"].sum() == 4


def test_a_save_that_fails_on_one_rank_fails_on_all(tmp_path):
    run_ranks(one_fails_rank, 2, tmp_path)


def no_room(*_):
    raise MemoryError("no room")


def one_cannot_copy_rank(rank, root, first):
    saver = ckpt.AsyncSaver(root)
    state = {"w": ckpt.Shard((4,), torch.float32, (2 * rank,), torch.ones(2))}
    if not first:
        saver.save(state, step=0)
        saver.wait()
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr(async_save.HostBuffer, "copy", no_room)
            with pytest.raises(MemoryError):
                saver.save(state, step=1)
        else:
            saver.save(state, step=1)
        with pytest.raises((MemoryError, ckpt.CheckpointError), match=r"no room"):
            saver.wait()
    saver.save(state, step=2)
    saver.close()
    assert sorted(each.name for each in root.glob("step-*")) == [
        f"step-{step:09d}" for step in ([2] if first else [0, 2])
    ]


@pytest.mark.parametrize("first", [True, False])
def test_a_rank_that_cannot_copy_keeps_nobody_waiting(tmp_path, first):
    run_ranks(one_cannot_copy_rank, 2, tmp_path, first)


def one_changes_rank(rank, root):
    with ckpt.AsyncSaver(root) as saver:
        for step in range(4):
            state = {"w": ckpt.Shard((4,), torch.float32, (2 * rank,), torch.full((2,), float(step)))}
            if rank == 1 and step % 2:
                state["mine"] = torch.full((3,), float(step))
            saver.save(state, step=step)
    for step in range(4):
        found = ckpt.read_tree(root, name=f"step-{step:09d}")
        assert torch.equal(found["w"], torch.full((4,), float(step)))


def test_one_rank_may_hold_something_else_than_before(tmp_path):
    run_ranks(one_changes_rank, 2, tmp_path)


def come_and_go_rank(rank, root):
    first_and_last = torch.distributed.new_group([0, 2])
    for step in range(8):
        time.sleep(0.01 * ((7 * rank + step) % 3))  # one is always ahead of another
        with ckpt.AsyncSaver(root / "all") as saver:
            saver.save({"w": torch.ones(3)}, step=step)
        if rank != 1:
            with ckpt.AsyncSaver(root / "two", group=first_and_last) as saver:
                saver.save({"w": torch.ones(3)}, step=step)


def test_savers_may_come_and_go(tmp_path):
    run_ranks(come_and_go_rank, 3, tmp_path)
    assert len(list((tmp_path / "all").glob("step-*"))) == len(list((tmp_path / "two").glob("step-*"))) == 8


def test_an_interruption_while_waiting_leaves_the_older_save_whole(tmp_path, monkeypatch):
    original = local_store.LocalSink.write_at

    def slow(sink, *args):
        time.sleep(0.5)
        original(sink, *args)

    monkeypatch.setattr(local_store.LocalSink, "write_at", slow)
    tensors = [torch.zeros(1000) for _ in range(50)]
    saver = ckpt.AsyncSaver(tmp_path)

    def put(number):
        for tensor in tensors:
            tensor.fill_(number)
        saver.save({"w": tensors}, step=number)

    put(1)
    put(2)
    with monkeypatch.context() as patch:
        patch.setattr(async_save, "wait_for", interrupt)
        with pytest.raises(KeyboardInterrupt):
            put(3)
    put(4)
    saver.close()
    for step in (1, 2, 4):
        found = ckpt.read_tree(tmp_path, name=f"step-{step:09d}")["w"]
        assert all(bool((each == step).all()) for each in found)


def interrupt(*_):
    raise KeyboardInterrupt


FORGOTTEN = """
import sys, torch, ckpt_universal as ckpt
saver = ckpt.AsyncSaver(sys.argv[1])
for step in (1, 2):
    saver.save({"w": torch.ones(8 << 20)}, step=step)
"""


def test_a_program_that_forgets_to_close_ends_when_all_is_saved(tmp_path):
    ended = subprocess.run(
        [sys.executable, "-c", FORGOTTEN, str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == 0, ended.stderr
    assert "was not closed" in ended.stderr
    assert bool(ckpt.read_tree(tmp_path, name="step-000000002")["w"].all())

"""kill -9 at any instant: the latest committed step loads, never a mix of two. And ranks that die among others."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import ckpt_universal as ckpt
import pytest
import torch
from ckpt_universal.places import open_directory
from ckpt_universal.ranks import Ranks
from ckpt_universal.steps import claim, new_token

run_ranks = pytest.importorskip("zero_core.testing").run_ranks  # spawns processes
save_module = importlib.import_module("ckpt_universal.save")  # the package has a function of this name
ROUNDS = Path(__file__).with_name("kill_rounds.py")


def rounds(root, mode, count, seed):
    done = subprocess.run(
        [sys.executable, str(ROUNDS), str(root), mode, str(count), str(seed)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_kills_at_random_instants(tmp_path, mode):
    found = rounds(tmp_path / "run", mode, 25, seed=1)
    assert found["newest"] >= 12, "every second round commits a step"
    assert found["under_way"] > 0, "no kill met a save"


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["sync", "async"])
def test_kills_at_two_hundred_random_instants(tmp_path, mode):
    found = rounds(tmp_path / "run", mode, 200, seed=2)
    assert found["newest"] >= 100
    assert found["under_way"] > 20


def part(rank, value):
    return {"w": ckpt.Shard((300,), torch.float32, (100 * rank,), torch.full((100,), float(value)))}


def a_rank_dies(rank, root, where):
    ckpt.save(root, part(rank, 1), step=1)
    if rank == 1:

        def die(*args, **kwargs):
            os.kill(os.getpid(), signal.SIGKILL)

        if where == "beginning":
            save_module.take_apart = die
        elif where == "writing":
            save_module.write_file = die
        else:
            written = save_module.write_file

            def write_then_die(*args, **kwargs):
                written(*args, **kwargs)
                die()

            save_module.write_file = write_then_die
    with pytest.raises(ckpt.CheckpointError, match=r"save.*: rank 1 of 3 has ended or did not answer"):
        ckpt.save(root, part(rank, 2), step=2, policy=ckpt.SavePolicy(timeout_s=20))
    if rank == 0:  # its claim has been let go
        claim(open_directory(root / "step-000000002"), new_token()).release()
    return True


@pytest.mark.parametrize("where", ["beginning", "writing", "written"])
def test_a_rank_that_dies_in_a_save_is_named_and_nothing_is_committed(tmp_path, where):
    results = run_ranks(a_rank_dies, 3, tmp_path, where, tolerate=(1,))
    assert results[0] is True
    assert results[2] is True
    into = {"w": torch.zeros(300)}
    assert ckpt.load(tmp_path, into=into).step == 1
    assert (into["w"] == 1).all()
    ckpt.save(tmp_path, {"w": torch.full((300,), 3.0)}, step=2)
    assert ckpt.verify(tmp_path).ok
    assert len(os.listdir(tmp_path / "step-000000002")) == 3, "leftovers are cleared"


def comes_after_the_death(rank):
    ranks = Ranks(timeout_s=20)
    ranks.gather(rank, "first")
    time.sleep(rank)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    began = time.monotonic()
    with pytest.raises(ckpt.CheckpointError, match=r"second: rank 1 of 3 has ended or did not answer"):
        ranks.gather(rank, "second")
    return time.monotonic() - began


def test_a_rank_that_waits_before_another_dies_hears_of_it_from_who_comes_after():
    waited = run_ranks(comes_after_the_death, 3, tolerate=(1,))
    assert max(waited[0], waited[2]) < 10


def disagree_rank(rank, root):
    expected = (
        (ckpt.ConfigError, r"lr: ranks have different values: 0 on rank 0, 1 on rank 1; .*PerRank"),
        (ckpt.CheckpointError, r"failed on another rank. rank 0: ConfigError: lr: ranks have"),
    )[rank]
    with pytest.raises(expected[0], match=expected[1]):
        ckpt.save(root, {"lr": rank}, step=0)
    shapes = [torch.ones(2), torch.ones(3)]
    with pytest.raises(ckpt.ConfigError, match=r"'w': ranks disagree about it: rank 0: \(2,\)"):
        ckpt.save(root, {"w": shapes[rank]}, step=0)


def test_ranks_that_disagree(tmp_path):
    run_ranks(disagree_rank, 2, tmp_path / "run")
    assert not (tmp_path / "run").exists()

"""A rank that ends while others talk to it: each of them says which one it was, and none waits for another."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch.distributed as dist
from zero_core.testing import run_ranks
from zerostack import LostRankError, ranks


def comes_after_the_death(rank):
    assert ranks.gather_json(rank, dist.group.WORLD) == [0, 1, 2]
    time.sleep(rank)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    began = time.monotonic()
    with pytest.raises(LostRankError, match="rank 1 of 3 has ended or did not answer"):
        ranks.gather_json(rank, dist.group.WORLD)
    return time.monotonic() - began


def test_a_rank_that_waits_before_another_dies_hears_of_it_from_who_comes_after():
    waited = run_ranks(comes_after_the_death, 3, tolerate=(1,))
    assert max(waited[0], waited[2]) < 10

"""The norm of gradients in a store: known while they were on their way there, and the same as without one."""

from __future__ import annotations

import torch
import zero_core as zero
from stored_models import batch, build, loss_of
from zero_core.testing import run_ranks
from zero_offload_nvme import NvmeStore


class Watched(NvmeStore):
    """Lists what is read."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.read: list[str] = []

    def fetch(self, name, out, start=0):
        self.read.append(name)
        return super().fetch(name, out, start)

    def view(self, name):
        self.read.append(name)
        return super().view(name)


def norm_rank(rank: int, folder: str) -> None:
    norms = []
    for store in (None, Watched(folder)):
        model, opt = build(
            None if store is None else zero.Stores(grads=store, optimizer=store), 2, torch.float32
        )
        found = []
        for backwards in (1, 2):
            for number in range(backwards):
                loss_of(model, batch(number, rank)).backward()
            if store is not None:
                store.read.clear()
            found.append(float(zero.clip_grad_norm(opt, 0.1)))
            if store is not None:
                assert not [name for name in store.read if "grad" in name]
            opt.step()
            opt.zero_grad()
        loss_of(model, batch(5, rank)).backward()
        name = "blocks.1.up.weight"  # of which something else is known
        zero.set_full(model, name, 2 * zero.get_full(model, name, what="grad"), what="grad")
        found.append(float(zero.grad_norm(opt)))
        norms.append(found)
    assert norms[0] == norms[1]


def test_a_norm_reads_nothing_back(tmp_path) -> None:
    run_ranks(norm_rank, 2, str(tmp_path))

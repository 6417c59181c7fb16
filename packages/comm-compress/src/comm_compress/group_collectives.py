"""Compressed collectives of one group: which way each gather and each reduction takes.

In: shards and gradients. Out: handles of `gather`, `reduce`, or zero-core's own collectives. `adapters` gives these
objects to those who call for collectives.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import partial
from typing import Literal

import torch
import torch.distributed as dist
import zero_core as zero

from . import ops, wire
from .agreement import agree
from .error_feedback import LoCo
from .gather import WeightGather
from .hops import Hop
from .reduce import GradientReduction
from .settings import Settings
from .topology import grid_of, resolve
from .traffic import Entry
from .trials import Spending, Trial
from .wire import BlockFormat

logger = logging.getLogger(__name__)


class GroupCollectives:
    """`zero_core.Collectives` and `zero_core.WeightCollectives` of one group; every rank of it makes one.

    Args:
        settings: see `QuantizedCollectives`.
        group: the ranks.
        spending: of all groups of the model (`policy="auto"`); None: of this one alone.

    Raises:
        CompressConfigError: a node size that does not divide the group, a mesh of other ranks, ranks that were given
            other settings; nothing of the model has travelled then.
    """

    def __init__(
        self, settings: Settings, group: dist.ProcessGroup, spending: Spending | None = None
    ) -> None:
        self.settings = settings
        self.group = group
        rank = group.rank()
        hop = partial(Hop, timeout_s=settings.timeout_s, shared_memory=settings.shared_memory)
        grid = grid_of(group, settings.node_size, settings.mesh)
        self.grid = grid
        near = [grid.node_of(other) == grid.node_of(rank) for other in range(grid.num_ranks)]
        by_messages = Hop(group, near, settings.timeout_s, shared_memory=False)
        agree(by_messages, "QuantizedCollectives", settings.shared(grid.node_size))
        every = hop(group, near)
        nodes = resolve(group, node_size=settings.node_size, mesh=settings.mesh)
        inside = every if nodes.inside is group else hop(nodes.inside, [True] * grid.node_size)
        alone = [node == grid.node_of(rank) for node in range(grid.num_nodes)]
        across = every if nodes.across is group else hop(nodes.across, alone)
        self.every = every
        self.gathers = WeightGather(grid, every, inside, secondary=settings.secondary)
        self.exact = Entry("exact_gather")
        self.reductions = GradientReduction(
            grid,
            inside,
            across,
            Entry("reduce"),
            stochastic=settings.stochastic,
            feedback=None if settings.loco is None else LoCo(settings.loco),
        )
        self._hops = [every, inside, across]
        self._spending = spending or Spending()
        self._trials: dict[str, Trial] = {}
        self._has_told = False

    # -- zero_core.Collectives -----------------------------------------------------------------------------------

    def all_gather(self, shard: torch.Tensor, out: torch.Tensor, *, tag: int) -> zero.Handle:
        """See `zero_core.Collectives.all_gather`: exact."""
        sent = wire.to_each(self.grid, shard.numel() * shard.element_size())
        self.exact.begin(sent)
        self.exact.sent += sent
        return self._plain.all_gather(shard, out, tag=tag)

    def reduce_scatter(self, full: torch.Tensor, out: torch.Tensor, *, tag: int) -> zero.Handle:
        """See `zero_core.Collectives.reduce_scatter`: quantized."""
        nbytes = full.numel() * full.element_size()
        form = self.settings.form("grads", nbytes, full.dtype)
        form = None if out.dtype not in ops.FLOATS or self.grid.num_ranks == 1 else form
        if form is None:
            return self._reduce_plain(full, out, tag)
        if self.settings.policy == "always":
            return self.reductions.run(full, out, tag=tag, form=form)

        def run(compressed: bool) -> zero.Handle:
            if compressed:
                return self.reductions.run(full, out, tag=tag, form=form)
            return self._reduce_plain(full, out, tag)

        return self._trial("reduce", self.reductions.entry, full.device).run(nbytes, tag, None, run)

    def trim(self) -> None:
        """See `zero_core.Collectives.trim`."""
        for hop in self._hops:
            hop.trim()
        self.reductions.trim()

    # -- zero_core.WeightCollectives -----------------------------------------------------------------------------

    def is_exact(self, nbytes: int, dtype: torch.dtype, *, trainable: bool = True) -> bool:
        """See `zero_core.WeightCollectives.is_exact`."""
        return self._weights_form(nbytes, dtype, trainable=trainable) is None

    def gather_weights(
        self,
        shard: Callable[[], torch.Tensor],
        out: torch.Tensor,
        *,
        tag: int,
        version: int | None,
        trainable: bool = True,
    ) -> zero.Handle:
        """See `zero_core.WeightCollectives.gather_weights`: quantized."""
        if version is None and self.gathers.keeps and not self._has_told:
            self._has_told = True
            logger.warning(
                "secondary=True: weights that stay whole between steps (stages 1 and 2) are gathered once a step, and "
                "nodes keep nothing of them"
            )
        nbytes = out.numel() * out.element_size()
        form = self._weights_form(nbytes, out.dtype, trainable=trainable)
        run = partial(self.gathers.run, shard, out, tag=tag, version=version)
        if (
            self.settings.policy == "always"
            or form is None
            or self.gathers.has(out, tag=tag, version=version)
        ):
            return run(form=form)
        return self._trial("gather", self.gathers.first, out.device).run(
            nbytes, tag, version, lambda compressed: run(form=form if compressed else None)
        )

    # -- for others ----------------------------------------------------------------------------------------------

    def entries(self) -> Iterator[Entry]:
        """See `comm_compress.traffic`."""
        yield from (self.gathers.first, self.gathers.again, self.exact, self.reductions.entry)

    @property
    def _plain(self) -> zero.PlainCollectives:
        assert self.every.plain is not None
        return self.every.plain

    def _weights_form(self, nbytes: int, dtype: torch.dtype, *, trainable: bool) -> BlockFormat | None:
        if self.grid.num_ranks == 1:
            return None
        as_weights = trainable or self.settings.frozen is None
        return self.settings.form("weights" if as_weights else "frozen", nbytes, dtype)

    def _reduce_plain(self, full: torch.Tensor, out: torch.Tensor, tag: int) -> zero.Handle:
        sent = wire.plain_reduce(self.grid, out.numel(), full.element_size())
        self.reductions.entry.begin(sent)
        self.reductions.entry.sent += sent
        return self._plain.reduce_scatter(full, out, tag=tag)

    def _trial(self, kind: Literal["gather", "reduce"], entry: Entry, device: torch.device) -> Trial:
        if kind not in self._trials:
            self._trials[kind] = Trial(kind, entry, self.every, device, self._spending)
        return self._trials[kind]

"""`QuantizedCollectives`: qwZ, hpZ and qgZ as zero-core's collectives, each alone or together.

In: shards and gradients, from zero-core's wires. Out: handles. What may not change its values (`all_gather`) and what
is too small or of a dtype that no codec knows travels as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.distributed as dist
import zero_core as zero
from torch.distributed.device_mesh import DeviceMesh

from .. import ops, wire
from ..agreement import agree
from ..errors import CompressConfigError, CompressStateError
from ..gather import WeightGather
from ..hops import Hop
from ..reduce import GradientReduction
from ..topology import grid_of, resolve
from ..traffic import Entry
from ..trials import Trials
from ..wire import BlockFormat

Quantized = Literal["int8", "int4"]


@dataclass(frozen=True, kw_only=True)
class _Settings:
    """What all ranks must agree on; see `QuantizedCollectives`."""

    weights: Quantized | None
    grads: Quantized | None
    frozen: Quantized | None
    node_size: int | None
    secondary: bool
    block_size: int
    min_bytes: int
    policy: Literal["always", "auto"]
    stochastic: bool

    def __post_init__(self) -> None:
        for name in ("weights", "grads", "frozen"):
            ops.block_format(getattr(self, name), name, self.block_size)
        if self.policy not in ("always", "auto"):
            raise CompressConfigError(f"policy: expected 'always' or 'auto', got {self.policy!r}")
        if not isinstance(self.min_bytes, int) or self.min_bytes < 0:
            raise CompressConfigError(f"min_bytes: expected a number of bytes >= 0, got {self.min_bytes!r}")

    def form(self, which: str, nbytes: int, dtype: torch.dtype) -> BlockFormat | None:
        """How a buffer of `nbytes` in all travels; None: as it is."""
        if nbytes < self.min_bytes or dtype not in ops.FLOATS:
            return None
        return ops.block_format(getattr(self, which), which, self.block_size)


class QuantizedCollectives:
    """Less on the wire for a sharded model: give it to `zero_core.shard(collectives=...)` as it is.

    Without `group` it is called with each group that needs collectives, and `traffic` counts for all of them; with
    `group` it can be used by itself. Every rank makes it alike, and calls it at the same time.

    Args:
        weights: how weights travel to be computed with (qwZ): "int8", "int4", or None: as they are. All ranks, the
            owner too, compute with the same quantized values; shards and masters stay exact, and so does whatever is
            saved, exported or read as a whole (`zero_core.materialized`, `full_state_dict`).
        grads: how gradients are reduced (qgZ): "int4", "int8", or None: as they are.
        frozen: how frozen weights travel; None: as `weights`.
        node_size: neighbouring ranks that share a node. None: every rank is a node of its own.
        mesh: nodes x ranks of a node, of the ranks of the group, instead of `node_size`.
        secondary: hpZ, stage 3: the ranks of a node keep, each 1/node_size, what a gather brought. Until an optimizer
            steps or something else writes the shards, further gathers stay in the node.
        block_size: elements that share a scale.
        min_bytes: units that have fewer bytes when whole travel as they are.
        policy: "auto": where measuring the first calls shows that compression does not pay, it is left off; see
            `traffic`.
        stochastic: gradients are rounded up or down at random, right on average.
        timeout_s: deadline of a wait on the CPU.
        shared_memory: on the CPU, use memory that ranks of one machine share.
        group: the ranks, for use without zero-core.

    Raises:
        CompressConfigError: a value that cannot be honoured; `secondary` without a node. When called: a node size that
            does not divide the group, a mesh of other ranks, ranks that were given other settings.

    Elements on the wire between nodes per step, a rank's share (P parameters, N ranks, nodes of m; "int8" weights in
    bytes of 1 + 4 / block_size, "int4" in half of that plus its scale): forward (N - m) / N P in int8, backward 0,
    gradients (N / m - 1) / N P in int4. Bytes per rank with `secondary`: the model's, as it travels, / m.
    Source: ZeRO++ (Wang et al., 2023), section 3.
    """

    def __init__(
        self,
        *,
        weights: Quantized | None = "int8",
        grads: Quantized | None = "int4",
        frozen: Quantized | None = None,
        node_size: int | None = None,
        mesh: DeviceMesh | None = None,
        secondary: bool = False,
        block_size: int = 256,
        min_bytes: int = 1 << 14,
        policy: Literal["always", "auto"] = "always",
        stochastic: bool = False,
        timeout_s: float = 30.0,
        shared_memory: bool = True,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self.settings = _Settings(
            weights=weights,
            grads=grads,
            frozen=frozen,
            node_size=node_size,
            secondary=secondary,
            block_size=block_size,
            min_bytes=min_bytes,
            policy=policy,
            stochastic=stochastic,
        )
        if secondary and node_size is None and mesh is None:
            raise CompressConfigError(
                "secondary=True keeps weights within a node, and nothing says what a node is: give node_size= or mesh="
            )
        if not timeout_s > 0:
            raise CompressConfigError(f"timeout_s: expected seconds above 0, got {timeout_s!r}")
        self._mesh = mesh
        self._timeout_s = timeout_s
        self._shared_memory = shared_memory
        self._made: list[_Bound] = []
        self._own = None if group is None else self(group)

    def __call__(self, group: dist.ProcessGroup) -> _Bound:
        """The collectives of one group; every rank of it calls this."""
        grid_of(group, self.settings.node_size, self._mesh)  # refused before anything travels
        made = _Bound(self.settings, group, self._mesh, self._timeout_s, shared_memory=self._shared_memory)
        self._made.append(made)
        return made

    def entries(self) -> Iterator[Entry]:
        """See `comm_compress.traffic`."""
        for made in self._made:
            yield from made.entries()

    @property
    def secondary_bytes(self) -> int:
        """Bytes that this rank keeps for its node (`secondary`)."""
        return sum(made.gathers.secondary_bytes for made in self._made)

    # -- zero_core.Collectives, where a group was given ----------------------------------------------------------

    def all_gather(self, shard: torch.Tensor, out: torch.Tensor, *, tag: int) -> zero.Handle:
        """See `zero_core.Collectives.all_gather`: exact."""
        return self._bound.all_gather(shard, out, tag=tag)

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
        return self._bound.gather_weights(shard, out, tag=tag, version=version, trainable=trainable)

    def is_exact(self, nbytes: int, dtype: torch.dtype, *, trainable: bool = True) -> bool:
        """See `zero_core.WeightCollectives.is_exact`."""
        return self._bound.is_exact(nbytes, dtype, trainable=trainable)

    def reduce_scatter(self, full: torch.Tensor, out: torch.Tensor, *, tag: int) -> zero.Handle:
        """See `zero_core.Collectives.reduce_scatter`: quantized."""
        return self._bound.reduce_scatter(full, out, tag=tag)

    def trim(self) -> None:
        """See `zero_core.Collectives.trim`."""
        for made in self._made:
            made.trim()

    @property
    def _bound(self) -> _Bound:
        if self._own is None:
            raise CompressStateError(
                "QuantizedCollectives has no group yet: give it to zero_core.shard(collectives=...) as it is, or make "
                "it with group=..."
            )
        return self._own


class _Bound:
    """The same for one group: `zero_core.Collectives` and `zero_core.WeightCollectives`."""

    def __init__(
        self,
        settings: _Settings,
        group: dist.ProcessGroup,
        mesh: DeviceMesh | None,
        timeout_s: float,
        *,
        shared_memory: bool,
    ) -> None:
        self.settings = settings
        self.group = group
        rank = group.rank()
        hop = partial(Hop, timeout_s=timeout_s, shared_memory=shared_memory)
        grid = grid_of(group, settings.node_size, mesh)
        self.grid = grid
        every = hop(group, [grid.node_of(other) == grid.node_of(rank) for other in range(grid.num_ranks)])
        agree(every, "QuantizedCollectives", {**vars(settings), "node_size": grid.node_size})
        nodes = resolve(group, node_size=settings.node_size, mesh=mesh)
        inside = every if nodes.inside is group else hop(nodes.inside, [True] * grid.node_size)
        alone = [node == grid.node_of(rank) for node in range(grid.num_nodes)]
        across = every if nodes.across is group else hop(nodes.across, alone)
        self.every = every
        self.gathers = WeightGather(grid, every, inside, secondary=settings.secondary)
        self.exact = Entry("exact_gather")
        self.reductions = GradientReduction(
            grid, inside, across, Entry("reduce"), stochastic=settings.stochastic
        )
        self._hops = [every, inside, across]
        self._trials: Trials | None = None

    def all_gather(self, shard: torch.Tensor, out: torch.Tensor, *, tag: int) -> zero.Handle:
        """See `zero_core.Collectives.all_gather`."""
        sent = wire.to_each(self.grid, shard.numel() * shard.element_size())
        self.exact.begin(sent)
        self.exact.sent += sent
        return self._plain.all_gather(shard, out, tag=tag)

    def is_exact(self, nbytes: int, dtype: torch.dtype, *, trainable: bool) -> bool:
        """See `zero_core.WeightCollectives.is_exact`."""
        return self._weights_form(nbytes, dtype, trainable=trainable) is None

    def gather_weights(
        self,
        shard: Callable[[], torch.Tensor],
        out: torch.Tensor,
        *,
        tag: int,
        version: int | None,
        trainable: bool,
    ) -> zero.Handle:
        """See `zero_core.WeightCollectives.gather_weights`."""
        nbytes = out.numel() * out.element_size()
        form = self._weights_form(nbytes, out.dtype, trainable=trainable)
        run = partial(self.gathers.run, shard, out, tag=tag, version=version)
        if (
            self.settings.policy == "always"
            or form is None
            or self.gathers.has(out, tag=tag, version=version)
        ):
            return run(form=form)
        return self._trials_on(out.device).run(
            self.gathers.first,
            nbytes,
            tag,
            version,
            lambda compressed: run(form=form if compressed else None),
        )

    def reduce_scatter(self, full: torch.Tensor, out: torch.Tensor, *, tag: int) -> zero.Handle:
        """See `zero_core.Collectives.reduce_scatter`."""
        nbytes = full.numel() * full.element_size()
        form = self.settings.form("grads", nbytes, full.dtype)
        form = None if out.dtype not in ops.FLOATS or self.grid.num_ranks == 1 else form

        def run(compressed: bool) -> zero.Handle:
            if form is not None and compressed:
                return self.reductions.run(full, out, tag=tag, form=form)
            return self._reduce_plain(full, out, tag)

        if self.settings.policy == "always" or form is None:
            return run(compressed=True)
        return self._trials_on(full.device).run(self.reductions.entry, nbytes, tag, None, run)

    def trim(self) -> None:
        """See `zero_core.Collectives.trim`."""
        for hop in self._hops:
            hop.trim()

    def entries(self) -> Iterator[Entry]:
        """See `comm_compress.traffic`."""
        yield from (self.gathers.first, self.gathers.again, self.exact, self.reductions.entry)

    # -- inside ------------------------------------------------------------------------------------------------

    @property
    def _plain(self) -> zero.PlainCollectives:
        assert self.every.plain is not None
        return self.every.plain

    def _weights_form(self, nbytes: int, dtype: torch.dtype, *, trainable: bool) -> BlockFormat | None:
        if self.grid.num_ranks == 1:
            return None
        which = "weights" if trainable or self.settings.frozen is None else "frozen"
        return self.settings.form(which, nbytes, dtype)

    def _reduce_plain(self, full: torch.Tensor, out: torch.Tensor, tag: int) -> zero.Handle:
        sent = wire.plain_reduce(self.grid, out.numel(), full.element_size())
        self.reductions.entry.begin(sent)
        self.reductions.entry.sent += sent
        return self._plain.reduce_scatter(full, out, tag=tag)

    def _trials_on(self, device: torch.device) -> Trials:
        if self._trials is None:
            self._trials = Trials(self.every, device)
        return self._trials

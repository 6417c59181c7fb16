"""`QuantizedCollectives`: qwZ, hpZ and qgZ as zero-core's collectives, each alone or together.

In: what the user wants. Out: a `GroupCollectives` for each group that asks for one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

import torch
import torch.distributed as dist
import zero_core as zero
from torch.distributed.device_mesh import DeviceMesh

from ..error_feedback import LoCoPolicy
from ..errors import CompressStateError
from ..group_collectives import GroupCollectives
from ..settings import Quantized, Settings
from ..topology import grid_of
from ..traffic import Entry
from ..trials import Spending


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
        loco: what quantizing a unit's gradient has lost comes back next time, averaged (LoCo); not saved in
            checkpoints. Bytes per rank: 4 an element of the whole model, and a little more with nodes.
        timeout_s: deadline of a wait on the CPU.
        shared_memory: on the CPU, use memory that ranks of one machine share.
        group: the ranks, for use without zero-core.

    Raises:
        CompressConfigError: a value that cannot be honoured; `secondary` without a node. When called: a node size that
            does not divide the group, a mesh of other ranks, ranks that were given other settings.

    Elements that leave a rank for other nodes in a step of stage 3, as messages on the CPU (P parameters, N ranks,
    nodes of m): (N - m) / N P weights in forward, and in backward once more, or none with `secondary`; gradients
    (N / m - 1) / N P. An "int8" element is 1 + 4 / block_size bytes, an "int4" one 1/2 + 4 / block_size.
    Bytes per rank with `secondary`: the model's, as it travels, / m.
    Source: ZeRO++ (Wang et al., 2023), section 3; LoCo (Xie et al., 2024).
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
        loco: LoCoPolicy | None = None,
        timeout_s: float = 300.0,
        shared_memory: bool = True,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self.settings = Settings(
            weights=weights,
            grads=grads,
            frozen=frozen,
            node_size=node_size,
            mesh=mesh,
            secondary=secondary,
            block_size=block_size,
            min_bytes=min_bytes,
            policy=policy,
            stochastic=stochastic,
            loco=loco,
            timeout_s=timeout_s,
            shared_memory=shared_memory,
        )
        self._made: list[GroupCollectives] = []
        self._spending = Spending()
        self._own = None if group is None else self(group)

    def __call__(self, group: dist.ProcessGroup) -> GroupCollectives:
        """The collectives of one group; every rank of it calls this."""
        grid_of(group, self.settings.node_size, self.settings.mesh)  # refused before anything travels
        made = GroupCollectives(self.settings, group, self._spending)
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

    # -- zero_core.Collectives and WeightCollectives, where a group was given --------------------------------------

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
    def _bound(self) -> GroupCollectives:
        if self._own is None:
            raise CompressStateError(
                "QuantizedCollectives has no group yet: give it to zero_core.shard(collectives=...) as it is, or make "
                "it with group=..."
            )
        return self._own

"""Reduce-scatters of gradients in at most two hops, each quantized once (qgZ).

In: a full gradient. Out: this rank's slice of the mean over ranks. Within the node each rank gets, of every slice that
belongs to its place in any node, what the node's ranks have to add; it sums in fp32, quantizes the sums, and the ranks
of one place exchange these across nodes. So 1/node_size of the gradient leaves a node, and every number is quantized
as often as it travels.

Source: ZeRO++ (Wang et al., 2023), sections 3.3 and 4.2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import zero_core as zero

from . import ops, wire
from .hops import Done, Hop
from .topology import Grid
from .traffic import Entry
from .wire import BlockFormat


class GradientReduction:
    """Reductions of one group.

    Args:
        grid: its nodes.
        inside: the ranks of this node.
        across: those with this rank's place in every node.
        entry: counts them.
        stochastic: round up or down at random, right on average.
    """

    def __init__(
        self, grid: Grid, inside: Hop, across: Hop, entry: Entry, *, stochastic: bool = False
    ) -> None:
        self.grid = grid
        self.inside = inside
        self.across = across
        self.entry = entry
        self.stochastic = stochastic
        self._in_order = zero.InOrder()

    def run(self, full: torch.Tensor, out: torch.Tensor, *, tag: int, form: BlockFormat) -> zero.Handle:
        """Write the mean over ranks of this rank's slice of `full` to `out`.

        Args:
            full: [n], n = ranks x [out]; fp32, bf16 or fp16; read before this returns.
            out: any of these dtypes; may be a slice of `full`.
            tag: of the messages.
            form: how they travel.
        """
        numel = out.numel()
        self.entry.begin(wire.plain_reduce(self.grid, numel, full.element_size()))
        if self.grid.num_ranks == 1:
            out.copy_(full)
            return Done()
        seed = hash((tag, self.entry.calls, self.grid.num_ranks)) if self.stochastic else None
        job = _Job(self, full, out, form, seed)
        steps: list[Callable[[], zero.Handle]] = []
        if self.grid.node_size > 1:
            steps.append(lambda: job.within_node(tag))
        if self.grid.num_nodes > 1:
            steps.append(lambda: job.across_nodes(tag))
        return self._in_order.run(steps, full.device)


@dataclass
class _Job:
    """One reduction on its way."""

    of: GradientReduction
    full: torch.Tensor
    out: torch.Tensor
    form: BlockFormat
    seed: int | None
    sums: torch.Tensor | None = None  # [nodes, bytes of a slice's message]

    def within_node(self, tag: int) -> zero.Handle:
        """To each place of the node: this rank's slices for that place in every node, quantized."""
        grid, numel, nbytes = self.of.grid, self.out.numel(), self.form.message_bytes(self.out.numel())

        def arrive(parts: Sequence[torch.Tensor]) -> None:
            with self.of.entry.codec.running(self.out.device):
                if grid.num_nodes == 1:
                    ops.decode_sum(parts, self.out, self.form, 1.0 / grid.num_ranks)
                    return
                self.sums = parts[0].new_empty(grid.num_nodes, nbytes)
                for node in range(grid.num_nodes):
                    place = slice(node * nbytes, (node + 1) * nbytes)
                    seed = None if self.seed is None else self.seed + grid.num_ranks + node
                    ops.recode_sum(
                        [part[place] for part in parts], self.sums[node], self.form, numel, seed=seed
                    )

        return self.of.inside.swap(list(self._encoded().flatten(1)), tag, arrive, self.of.entry)

    def across_nodes(self, tag: int) -> zero.Handle:
        """To this place in each node: its slice, summed over this node's ranks, quantized."""
        sums = self._encoded()[0] if self.sums is None else self.sums

        def arrive(parts: Sequence[torch.Tensor]) -> None:
            with self.of.entry.codec.running(self.out.device):
                ops.decode_sum(parts, self.out, self.form, 1.0 / self.of.grid.num_ranks)

        return self.of.across.swap(list(sums), tag, arrive, self.of.entry)

    def _encoded(self) -> torch.Tensor:
        """Every rank's slice as a message, [places, nodes, bytes]: in the order in which they are sent."""
        grid, nbytes = self.of.grid, self.form.message_bytes(self.out.numel())
        shape = grid.node_size, grid.num_nodes, nbytes
        messages = torch.empty(shape, dtype=torch.uint8, device=self.full.device)
        with self.of.entry.codec.running(self.full.device):
            for rank, part in enumerate(self.full.view(grid.num_ranks, -1)):
                seed = None if self.seed is None else self.seed + rank
                target = messages[grid.place_of(rank), grid.node_of(rank)]
                ops.encode(part, target, self.form, seed)
        return messages

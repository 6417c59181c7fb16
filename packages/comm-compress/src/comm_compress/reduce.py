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
from .error_feedback import Feedback
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
        feedback: what either quantization has lost comes back, by the tag of the reduction. Bytes per rank: 4 an
            element of the full gradient, and with nodes 4 / node_size more; 8 an element of the largest to work in.
    """

    def __init__(
        self,
        grid: Grid,
        inside: Hop,
        across: Hop,
        entry: Entry,
        *,
        stochastic: bool = False,
        feedback: Feedback | None = None,
    ) -> None:
        self.grid = grid
        self.inside = inside
        self.across = across
        self.entry = entry
        self.stochastic = stochastic
        self.feedback = feedback
        self._in_order = zero.InOrder()
        self._scratch: torch.Tensor | None = None  # new pages would cost as much as all that is computed

    def room(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Two fp32 tensors of its size and device to work in, until the next call."""
        numel = like.numel()
        if self._scratch is None or self._scratch.numel() < 2 * numel:
            self._scratch = torch.empty(2 * numel, device=like.device)
        return self._scratch[:numel], self._scratch[numel : 2 * numel]

    def trim(self) -> None:
        """Give scratch memory back."""
        self._scratch = None

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
        own = (
            self.inside.rank,
            self.across.rank,
        )  # ranks err independently, or their mean would err as one of them
        seed = hash((tag, self.entry.calls, self.grid.num_ranks, *own)) if self.stochastic else None
        job = _Job(self, full, out, form, tag, seed)
        steps: list[Callable[[], zero.Handle]] = []
        if self.grid.node_size > 1:
            steps.append(job.within_node)
        if self.grid.num_nodes > 1:
            steps.append(job.across_nodes)
        return self._in_order.run(steps, full.device)


@dataclass
class _Job:
    """One reduction on its way."""

    of: GradientReduction
    full: torch.Tensor
    out: torch.Tensor
    form: BlockFormat
    tag: int
    seed: int | None
    sums: torch.Tensor | None = None  # [nodes, bytes of a slice's message]

    def within_node(self) -> zero.Handle:
        """To each place of the node: this rank's slices for that place in every node, quantized."""

        def arrive(parts: Sequence[torch.Tensor]) -> None:
            with self.of.entry.codec.running(self.out.device):
                if self.of.grid.num_nodes == 1:
                    ops.decode_sum(parts, self.out, self.form, 1.0 / self.of.grid.num_ranks)
                else:
                    self.sums = self._summed(parts)

        return self.of.inside.swap(self._encoded().flatten(1), self.tag, arrive, self.of.entry)

    def across_nodes(self) -> zero.Handle:
        """To this place in each node: its slice, summed over this node's ranks, quantized."""
        sums = self._encoded()[0] if self.sums is None else self.sums

        def arrive(parts: Sequence[torch.Tensor]) -> None:
            with self.of.entry.codec.running(self.out.device):
                ops.decode_sum(parts, self.out, self.form, 1.0 / self.of.grid.num_ranks)

        return self.of.across.swap(sums, self.tag, arrive, self.of.entry)

    def _encoded(self) -> torch.Tensor:
        """Every rank's slice as a message, [places, nodes, bytes]: in the order in which they are sent."""
        grid = self.of.grid
        shape = grid.node_size, grid.num_nodes, self.form.message_bytes(self.out.numel())
        messages = torch.empty(shape, dtype=torch.uint8, device=self.full.device)
        by_rank = [messages[grid.place_of(rank), grid.node_of(rank)] for rank in range(grid.num_ranks)]
        with self.of.entry.codec.running(self.full.device):
            self._encode(self.full, by_rank, f"{self.tag}", self.seed)
        return messages

    def _summed(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """The sums over this node's ranks, a message for each node: [nodes, bytes]."""
        numel, nbytes = self.out.numel(), self.form.message_bytes(self.out.numel())
        num_nodes = self.of.grid.num_nodes
        sums = parts[0].new_empty(num_nodes, nbytes)
        of_node = [[part[i * nbytes : (i + 1) * nbytes] for part in parts] for i in range(num_nodes)]
        seed = None if self.seed is None else self.seed + self.of.grid.num_ranks
        if self.of.feedback is None:
            for node, (messages, out) in enumerate(zip(of_node, sums, strict=True)):
                ops.recode_sum(messages, out, self.form, numel, seed=None if seed is None else seed + node)
            return sums
        floats = torch.empty(num_nodes, numel, device=self.out.device)
        for messages, out in zip(of_node, floats, strict=True):
            ops.decode_sum(messages, out, self.form)
        self._encode(floats.view(-1), list(sums), f"{self.tag} across", seed)
        return sums

    def _encode(
        self, values: torch.Tensor, messages: Sequence[torch.Tensor], name: str, seed: int | None
    ) -> None:
        """Equal parts of `values` to messages, with what is owed for them."""
        feedback = self.of.feedback
        wanted, arrived = values, values
        if feedback is not None:
            wanted, arrived = self.of.room(values)
            feedback.compensate(name, values, out=wanted)
        parts = wanted.view(len(messages), -1)
        for position, (part, message) in enumerate(zip(parts, messages, strict=True)):
            ops.encode(part, message, self.form, None if seed is None else seed + position)
        if feedback is not None:
            for message, part in zip(messages, arrived.view(len(messages), -1), strict=True):
                ops.decode(message, part, self.form)
            feedback.keep(name, wanted, arrived, out=wanted)

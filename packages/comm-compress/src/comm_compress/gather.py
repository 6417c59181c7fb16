"""All-gathers of weights: quantized (qwZ), and from what the ranks of a node have kept (hpZ).

In: this rank's shard. Out: all shards, the same bits on every rank, the shard's owner too. With `secondary`, each rank
keeps 1/node_size of what a gather brought, in the form in which it travelled; a gather of the same version is one
within the node, and brings the same bits again.

Source: ZeRO++ (Wang et al., 2023), sections 3.1 and 3.2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import zero_core as zero

from . import ops, wire
from .hops import Done, Hop
from .topology import Grid
from .traffic import Entry
from .wire import BlockFormat


@dataclass
class Once:
    """A handle that may be waited for by several: a `zero_core.Handle`."""

    inner: zero.Handle
    then: Callable[[], object] = field(default=lambda: None)
    over: bool = False

    def is_done(self) -> bool:
        """Whether `wait` need not wait for another rank."""
        ask: Callable[[], bool] | None = getattr(self.inner, "is_done", None)
        return self.over or ask is None or ask()

    def wait(self) -> None:
        """Finish; do what is to be done once."""
        if not self.over:
            self.inner.wait()
            self.then()
            self.over = True
            # They hold what has arrived, which may be the whole unit.
            self.inner, self.then = Done(), lambda: None


@dataclass
class Kept:
    """What this rank keeps of one gather for its node.

    Attributes:
        version: of the values.
        form: in which they travelled; None: as they are.
        part: this rank's 1/node_size: bytes of messages, or numbers.
        handle: of the gather that brings it.
    """

    version: int
    form: BlockFormat | None
    part: torch.Tensor
    handle: Once


class WeightGather:
    """Gathers of one group.

    Args:
        grid: its nodes.
        every: all ranks.
        inside: the ranks of this node.
        secondary: keep a part for the node.
    """

    def __init__(self, grid: Grid, every: Hop, inside: Hop, *, secondary: bool) -> None:
        self.grid = grid
        self.every = every
        self.inside = inside
        self.keeps = secondary and grid.num_nodes > 1  # in one node there is nothing nearer than the shards
        self.first = Entry("gather")
        self.again = Entry("gather_again")
        self._kept: dict[tuple[int, int, torch.dtype], Kept] = {}

    @property
    def secondary_bytes(self) -> int:
        """Bytes that this rank keeps for its node."""
        return sum(kept.part.numel() * kept.part.element_size() for kept in self._kept.values())

    def has(self, out: torch.Tensor, *, tag: int, version: int | None) -> bool:
        """Whether the node has kept these values; alike on all ranks."""
        kept = self._kept.get((tag, out.numel(), out.dtype))
        return kept is not None and kept.version == version

    def run(
        self,
        shard: Callable[[], torch.Tensor],
        out: torch.Tensor,
        *,
        tag: int,
        version: int | None,
        form: BlockFormat | None,
    ) -> zero.Handle:
        """Fill `out`.

        Args:
            shard: gives this rank's part.
            out: [n], n a multiple of the number of ranks.
            tag: as for `zero_core.WeightCollectives.gather_weights`.
            version: as there.
            form: how they travel if the node does not have them; None: as they are.
        """
        if self.keeps and self.has(out, tag=tag, version=version):
            return self._from_node(out, tag)
        self.first.begin(wire.to_each(self.grid, out.numel() // self.grid.num_ranks * out.element_size()))
        keep: Callable[[torch.Tensor], None] | None = None
        if self.keeps and version is not None:
            kept = Kept(version, form, out.new_empty(0), Once(Done()))
            self._kept[tag, out.numel(), out.dtype] = kept
            keep = lambda part: setattr(kept, "part", part)  # noqa: E731  # one expression
        if form is None:
            handle = self._plain(shard(), out, tag, keep)
        else:
            handle = gather_quantized(self.every, shard(), out, tag, form, self.first, self._cut(keep))
        once = Once(handle)
        if keep is not None:
            kept.handle = once
        return once

    # -- the first time ---------------------------------------------------------------------------------------

    def _plain(
        self, shard: torch.Tensor, out: torch.Tensor, tag: int, keep: Callable[[torch.Tensor], None] | None
    ) -> zero.Handle:
        self.first.sent += wire.to_each(self.grid, shard.numel() * shard.element_size())
        assert self.every.plain is not None
        handle = self.every.plain.all_gather(shard, out, tag=tag)
        if keep is None:
            return handle
        place = self.grid.place_of(self.every.rank)
        part = out.view(self.grid.node_size, -1)[place]
        return Once(handle, lambda: keep(part.clone()))

    def _cut(
        self, keep: Callable[[torch.Tensor], None] | None
    ) -> Callable[[Sequence[torch.Tensor]], None] | None:
        """Has this rank's part of all messages kept."""
        if keep is None:
            return None
        first = self.grid.place_of(self.every.rank) * self.grid.num_nodes
        return lambda messages: keep(torch.cat(list(messages[first : first + self.grid.num_nodes])))

    # -- and again --------------------------------------------------------------------------------------------

    def _from_node(self, out: torch.Tensor, tag: int) -> zero.Handle:
        kept = self._kept[tag, out.numel(), out.dtype]
        kept.handle.wait()
        numel = out.numel() // self.grid.num_ranks
        self.again.begin(wire.to_each(self.grid, numel * out.element_size()))
        if kept.form is None:
            if self.inside.plain is None:
                out.copy_(kept.part)
                return Done()
            self.again.sent += wire.gather_again(self.grid, numel, wire.PlainFormat(out.element_size()))
            return self.inside.plain.all_gather(kept.part, out, tag=tag)
        form, nbytes = kept.form, kept.form.message_bytes(numel)

        def arrive(parts: Sequence[torch.Tensor]) -> None:
            messages = [
                part[i * nbytes : (i + 1) * nbytes] for part in parts for i in range(self.grid.num_nodes)
            ]
            _decode_all(messages, out, form, self.again)

        return self.inside.gather(kept.part, tag, arrive, self.again)


def gather_quantized(
    hop: Hop,
    shard: torch.Tensor,
    out: torch.Tensor,
    tag: int,
    form: BlockFormat,
    entry: Entry,
    seen: Callable[[Sequence[torch.Tensor]], None] | None = None,
) -> zero.Handle:
    """Fill `out` with what every rank's shard has become by quantization, in rank order.

    Args:
        hop: the ranks.
        shard: [n / ranks], fp32, bf16 or fp16; read before this returns (on an accelerator: on the current stream).
        out: [n], of one of these dtypes.
        tag: of the messages.
        form: how they travel.
        entry: counts them.
        seen: gets every rank's message.
    """
    message = torch.empty(form.message_bytes(shard.numel()), dtype=torch.uint8, device=shard.device)
    with entry.codec.running(shard.device):
        ops.encode(shard.view(-1), message, form)

    def arrive(messages: Sequence[torch.Tensor]) -> None:
        _decode_all(messages, out, form, entry)
        if seen is not None:
            seen(messages)

    return hop.gather(message, tag, arrive, entry)


def _decode_all(messages: Sequence[torch.Tensor], out: torch.Tensor, form: BlockFormat, entry: Entry) -> None:
    with entry.codec.running(out.device):
        for message, part in zip(messages, out.view(len(messages), -1), strict=True):
            ops.decode(message, part, form)

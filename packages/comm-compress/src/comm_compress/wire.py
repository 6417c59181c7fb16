"""PURE: how messages lie in memory, and how many bytes each collective puts on the wire. Ints and dataclasses only.

In: sizes, ranks, formats. Out: bytes that one rank sends, within its node and to others. `gather` and `reduce` send
what stands here; tests hold the two together, and `traffic` prints both.

A *message* is one run of bytes whose length both sides know. Several messages for one rank lie back to back.
"""

from __future__ import annotations

from dataclasses import dataclass

from .errors import CompressConfigError
from .topology import Grid


@dataclass(frozen=True)
class BlockFormat:
    """Block-wise quantized numbers: fp32 scales (and, asymmetric, minima), then packed integers.

    Attributes:
        bits: 8 or 4.
        block_size: elements that share a scale.
        symmetric: zero is the middle of the range; else each block has a minimum too.

    Raises:
        CompressConfigError: other bits, or a block size below 1 or, with 4 bits, odd.
    """

    bits: int
    block_size: int = 256
    symmetric: bool = True

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise CompressConfigError(f"bits: expected 4 or 8, got {self.bits!r}")
        if (
            not isinstance(self.block_size, int)
            or self.block_size < 1
            or (self.bits == 4 and self.block_size % 2)
        ):
            even = "an even number" if self.bits == 4 else "a number"
            raise CompressConfigError(f"block_size: expected {even} of at least 1, got {self.block_size!r}")

    def message_bytes(self, n: int) -> int:
        """Bytes of a message of `n` elements."""
        num_blocks = -(-n // self.block_size)
        return num_blocks * (4 if self.symmetric else 8) + -(-n * self.bits // 8)

    @property
    def name(self) -> str:
        """As users write it."""
        return f"int{self.bits}"


@dataclass(frozen=True)
class PlainFormat:
    """Numbers as they are.

    Attributes:
        itemsize: bytes of one.
    """

    itemsize: int

    def message_bytes(self, n: int) -> int:
        """Bytes of a message of `n` elements."""
        return n * self.itemsize


Format = BlockFormat | PlainFormat


@dataclass(frozen=True)
class Sent:
    """Bytes that one rank sends.

    Attributes:
        inside: to ranks of its own node.
        across: to ranks of other nodes.
    """

    inside: int = 0
    across: int = 0

    def __add__(self, other: Sent) -> Sent:
        return Sent(self.inside + other.inside, self.across + other.across)

    @property
    def total(self) -> int:
        """Both."""
        return self.inside + self.across


NOTHING = Sent()


def to_each(grid: Grid, nbytes: int) -> Sent:
    """One message of `nbytes` to every other rank."""
    return Sent((grid.node_size - 1) * nbytes, (grid.num_ranks - grid.node_size) * nbytes)


def gather(grid: Grid, shard_numel: int, form: Format) -> Sent:
    """An all-gather of shards: every rank sends its own to every other.

    Source: ZeRO++ (Wang et al., 2023), section 3.1: qwZ halves the bytes of bf16.
    """
    return to_each(grid, form.message_bytes(shard_numel))


def gather_again(grid: Grid, shard_numel: int, form: Format) -> Sent:
    """A gather within the node of what its ranks kept, each `num_nodes` shards: hpZ.

    Source: ZeRO++, section 3.2: no traffic between nodes in backward.
    """
    return Sent(inside=(grid.node_size - 1) * grid.num_nodes * form.message_bytes(shard_numel))


def reduce(grid: Grid, shard_numel: int, form: BlockFormat) -> Sent:
    """A reduce-scatter in at most two hops, each quantized once: within the node, then across: qgZ.

    Source: ZeRO++, section 3.3.
    """
    message = form.message_bytes(shard_numel)
    return Sent((grid.node_size - 1) * grid.num_nodes * message, (grid.num_nodes - 1) * message)


def plain_reduce(grid: Grid, shard_numel: int, itemsize: int) -> Sent:
    """zero-core's own reduce-scatter on the CPU: every rank sends every other its part."""
    return to_each(grid, shard_numel * itemsize)


def slice_numel(n: int, num_ranks: int) -> int:
    """Elements of the equal slices, one a rank, in which `n` elements are reduced; the last ones may be empty."""
    return -(-n // num_ranks)


def all_reduce(grid: Grid, n: int, form: BlockFormat) -> Sent:
    """A reduce-scatter of slices (`reduce`), and a gather of what they have become."""
    part = slice_numel(n, grid.num_ranks)
    return reduce(grid, part, form) + gather(grid, part, form)


def plain_all_reduce(grid: Grid, n: int, itemsize: int) -> Sent:
    """The least that an all-reduce of whole numbers sends: a reduce-scatter and a gather."""
    part = slice_numel(n, grid.num_ranks)
    return to_each(grid, part * itemsize) + to_each(grid, part * itemsize)

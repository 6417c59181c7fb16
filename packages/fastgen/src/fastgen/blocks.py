"""PURE: which cache blocks are free, and how many sequences hold each of the others.

In: demands for blocks. Out: their ids. A block that nobody holds any more may be kept idle by a `Keeper` (the prefix
cache) as long as no other is free. No tensors: `kv_cache` has the memory. Next: `prefix`, then `block_tables`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from .errors import CacheError


class Keeper(Protocol):
    """Keeps blocks that nobody holds, since what is in them may be asked for again."""

    @property
    def num_idle(self) -> int:
        """Blocks that it keeps and that nobody holds."""

    def keep(self, block: int) -> bool:
        """The last holder of a block is gone. True: it is kept as it is; False: it is free."""

    def reuse(self, block: int) -> None:
        """An idle block has a holder again."""

    def give_up(self) -> int:
        """The idle block that has been of no use for longest; its content is forgotten. Only where there is one."""


class NoKeeper:
    """Keeps nothing."""

    num_idle = 0

    def keep(self, block: int) -> bool:
        """A block without holders is free."""
        return False

    def reuse(self, block: int) -> None:
        """Never called: no block is idle."""

    def give_up(self) -> int:
        """Never called: no block is idle."""
        raise CacheError("expected an idle block, got none")


class BlockAllocator:
    """Blocks 0 to `num_blocks` - 1 with the number of holders of each.

    Args:
        num_blocks: that there are.
        keeper: what keeps blocks without holders; None frees them.
    """

    def __init__(self, num_blocks: int, keeper: Keeper | None = None) -> None:
        self.num_blocks = num_blocks
        self._keeper: Keeper = NoKeeper() if keeper is None else keeper
        self._holders = [0] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))  # the last is taken first: low ids first

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` can give: free ones and idle ones."""
        return len(self._free) + self._keeper.num_idle

    @property
    def num_used(self) -> int:
        """Blocks that somebody holds."""
        return self.num_blocks - self.num_available

    def holders(self, block: int) -> int:
        """How many hold it."""
        return self._holders[block]

    def is_shared(self, block: int) -> bool:
        """It must not be written, since another holds it too."""
        return self._holders[block] > 1

    def allocate(self, count: int = 1) -> list[int]:
        """Ids of blocks with one holder, the caller; all or none.

        Raises:
            CacheError: fewer are available.
        """
        if count > self.num_available:
            raise CacheError(
                f"expected {count} available blocks, got {self.num_available} of {self.num_blocks}"
            )
        blocks = [self._free.pop() if self._free else self._keeper.give_up() for _ in range(count)]
        for block in blocks:
            self._holders[block] = 1
        return blocks

    def share(self, blocks: Iterable[int]) -> None:
        """One more holder for each; idle blocks are held again."""
        for block in blocks:
            if self._holders[block] == 0:
                self._keeper.reuse(block)
            self._holders[block] += 1

    def free(self, blocks: Iterable[int]) -> None:
        """One holder fewer for each; without any, a block is free or kept.

        Raises:
            CacheError: nobody holds one of them.
        """
        for block in blocks:
            if self._holders[block] < 1:
                raise CacheError(f"expected a block that somebody holds, got block {block}, which is free")
            self._holders[block] -= 1
            if self._holders[block] == 0 and not self._keeper.keep(block):
                self._free.append(block)

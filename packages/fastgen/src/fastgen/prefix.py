"""PURE: which blocks hold which beginnings of a text, so that they need not be computed again.

In: the hashes of a sequence's full blocks, each of which stands for all tokens up to its end. Out: the blocks that
hold them. Blocks that no sequence holds stay here, idle, until memory is wanted; then the one goes that has been of no
use for longest. Prompts and output are alike, so the next turn of a chat finds the one before. Next: `block_tables`.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence

_HASH_BYTES = 16  # two of 2^40 blocks meet with probability 2^-49


def root_hash(block_size: int, *keys: str | None) -> bytes:
    """Where a chain begins.

    Args:
        block_size: tokens of a block.
        keys: what keys and values depend on besides the tokens: the adapter; or who may share (a salt).
    """
    return hashlib.blake2b(repr((block_size, keys)).encode(), digest_size=_HASH_BYTES).digest()


def chain_hash(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Hash of a full block: of what is before it, and of its own tokens."""
    return hashlib.blake2b(parent + array("q", token_ids).tobytes(), digest_size=_HASH_BYTES).digest()


class PrefixCache:
    """Computed full blocks by their hash; a `Keeper` of those that nobody holds."""

    def __init__(self) -> None:
        self._blocks: dict[bytes, int] = {}
        self._hashes: dict[int, bytes] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # the first has been of no use for longest

    @property
    def num_idle(self) -> int:
        """Blocks that nobody holds."""
        return len(self._idle)

    @property
    def num_blocks(self) -> int:
        """Blocks that can be found."""
        return len(self._blocks)

    def lookup(self, hashes: Iterable[bytes]) -> list[int]:
        """Blocks of the longest beginning of a chain; whoever uses them must hold them (`BlockAllocator.share`)."""
        found = []
        for each in hashes:
            block = self._blocks.get(each)
            if block is None:
                break
            found.append(block)
        return found

    def insert(self, hash_: bytes, block: int) -> bool:
        """A held block is full and computed. False if another block holds the same; it stays the one that is found."""
        if hash_ in self._blocks or block in self._hashes:
            return False
        self._blocks[hash_] = block
        self._hashes[block] = hash_
        return True

    def keep(self, block: int) -> bool:
        """The last holder is gone; kept if it can be found."""
        if block not in self._hashes:
            return False
        self._idle[block] = None
        return True

    def reuse(self, block: int) -> None:
        """An idle block has a holder again."""
        del self._idle[block]

    def give_up(self) -> int:
        """The idle block of longest no use; it cannot be found any more."""
        block, _ = self._idle.popitem(last=False)
        del self._blocks[self._hashes.pop(block)]
        return block

"""PURE: the blocks of sequences: taken as they grow, shared, copied before a write, moved to host memory, given back.

In: a sequence and how far it is to go. Out: its `block_table`, and what must be copied. Filled blocks are told to the
prefix cache here. Who gets blocks when there are few is the `scheduler`'s to decide: nothing here takes them from
anyone. Next: `scheduler`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from .blocks import BlockAllocator
from .prefix import PrefixCache, chain_hash, root_hash
from .request import Request, Sequence

Pairs = list[tuple[int, int]]


@dataclass
class _Holding:
    """What is kept of a sequence besides its block table.

    Attributes:
        root: where its hash chain begins.
        hashes: of its first full blocks, as far as they were needed.
        num_registered: of its blocks, those told to the prefix cache.
        host_table: blocks in host memory, while it is swapped.
    """

    root: bytes
    hashes: list[bytes] = field(default_factory=list)
    num_registered: int = 0
    host_table: list[int] = field(default_factory=list)


class BlockTables:
    """The blocks of all sequences.

    Args:
        num_blocks: of the cache.
        block_size: tokens in a block.
        prefix: keep computed blocks for sequences that begin alike.
        num_host_blocks: for sequences that lose theirs.
    """

    def __init__(
        self, num_blocks: int, block_size: int, *, prefix: bool = True, num_host_blocks: int = 0
    ) -> None:
        self.block_size = block_size
        self.prefix = PrefixCache() if prefix else None
        self.device = BlockAllocator(num_blocks, self.prefix)
        self.host = BlockAllocator(num_host_blocks)
        self._holdings: dict[Sequence, _Holding] = {}
        self._generation = 0

    def count(self, num_tokens: int) -> int:
        """Blocks that so many tokens fill, the last perhaps in part."""
        return -(-num_tokens // self.block_size)

    # ---- growing -----------------------------------------------------------------------------------------------------

    def begin_cost(self, sequence: Sequence, donor: Sequence | None = None) -> int:
        """Available blocks that `begin` would use up."""
        found = self._find(sequence, donor)
        idle = sum(self.device.holders(block) == 0 for block in found)
        return self.count(sequence.num_tokens) - len(found) + idle

    def begin(self, sequence: Sequence, donor: Sequence | None = None) -> int:
        """Give a sequence that has none all blocks for its tokens, those that hold them already among them.

        Args:
            sequence: at its beginning, or to be computed again.
            donor: another of its request, which has computed the prompt.

        Returns:
            How many of its tokens are computed, and less than all: what follows the last is still to be found.
        """
        found = self._find(sequence, donor)
        self.device.share(found)
        sequence.block_table = found + self.device.allocate(self.count(sequence.num_tokens) - len(found))
        sequence.num_computed = len(found) * self.block_size
        self._holding(sequence).num_registered = len(found)
        return sequence.num_computed

    def skip(self, sequence: Sequence) -> int:
        """Go past tokens that another sequence has computed since this one began; returns how many."""
        begun = sequence.num_computed // self.block_size
        found = self._find(sequence, None, begun)
        if not found:
            return 0
        replaced = sequence.block_table[begun : begun + len(found)]
        self.device.share(found)
        sequence.block_table[begun : begun + len(found)] = found
        self.device.free(reversed(replaced))
        skipped = (begun + len(found)) * self.block_size - sequence.num_computed
        sequence.num_computed += skipped
        return skipped

    def is_writable(self, sequence: Sequence, end: int) -> bool:
        """The sequence's positions from `num_computed` to `end` are its own already: `extend` would do nothing."""
        return end <= len(sequence.block_table) * self.block_size and not self._writes_shared(sequence)

    def missing(self, sequence: Sequence, end: int) -> int:
        """Available blocks that `extend` would use up."""
        table = sequence.block_table
        growth = max(0, self.count(end) - len(table))
        return growth + self._writes_shared(sequence)

    def missing_together(self, sequences: Iterable[Sequence]) -> int:
        """Available blocks that `extend` by one token would use up for all of these, which may share blocks."""
        growth = 0
        writers: Counter[int] = Counter()
        for each in sequences:
            growth += max(0, self.count(each.num_computed + 1) - len(each.block_table))
            if self._writes_shared(each):
                writers[each.block_table[each.num_computed // self.block_size]] += 1
        # The last holder of a block need not copy it.
        return growth + sum(count - (count == self.device.holders(block)) for block, count in writers.items())

    def extend(self, sequence: Sequence, end: int) -> Pairs:
        """Make the sequence's positions from `num_computed` to `end` its own to write.

        Returns:
            (from, to) of the block that it shared and that must be copied: none or one.
        """
        table = sequence.block_table
        copies = []
        if self._writes_shared(sequence):
            first = sequence.num_computed // self.block_size
            shared = table[first]
            table[first] = self.device.allocate()[0]
            self.device.free([shared])
            copies.append((shared, table[first]))
        growth = self.count(end) - len(table)
        if growth > 0:
            table += self.device.allocate(growth)
        return copies

    def computed(self, sequence: Sequence, end: int) -> None:
        """The tokens before `end` are computed, and blocks that they fill can be found by other sequences."""
        sequence.num_computed = end
        if self.prefix is None:
            return
        holding = self._holdings[sequence]
        num_full = end // self.block_size
        if num_full > holding.num_registered:
            hashes = self._hashes(sequence, num_full)
            for i in range(holding.num_registered, num_full):
                self.prefix.insert(hashes[i], sequence.block_table[i])
            holding.num_registered = num_full

    # ---- sharing and ending ------------------------------------------------------------------------------------------

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """The child holds what the parent has computed; who writes into the last block first, copies it."""
        child.num_computed = parent.num_computed
        child.block_table = parent.block_table[: self.count(parent.num_computed)]
        self.device.share(child.block_table)
        of_parent = self._holding(parent)
        num_full = parent.num_computed // self.block_size
        self._holdings[child] = _Holding(
            of_parent.root, of_parent.hashes[:num_full], of_parent.num_registered
        )

    def release(self, sequence: Sequence) -> None:
        """Give all blocks back; nothing of the sequence is computed any more."""
        # The last first: of a chain in the prefix cache the end is forgotten before the beginning.
        self.device.free(reversed(sequence.block_table))
        sequence.block_table = []
        sequence.num_computed = 0
        holding = self._holdings.pop(sequence, None)
        if holding is not None:
            self.host.free(holding.host_table)

    def forget(self) -> None:
        """Nothing computed so far is found by sequences that begin from now on (the weights have changed)."""
        self._generation += 1
        holds = {each: kept for each, kept in self._holdings.items() if each.block_table or kept.host_table}
        self._holdings = holds

    # ---- host memory -------------------------------------------------------------------------------------------------

    def swap_out(self, sequences: Iterable[Sequence]) -> Pairs | None:
        """Move all computed blocks of some sequences to the host, shared ones once.

        Returns:
            (device block, host block) to copy before anything else; None, and nothing is done, where there is no room.
        """
        tables = {each: each.block_table[: self.count(each.num_computed)] for each in sequences}
        blocks = list(dict.fromkeys(block for table in tables.values() for block in table))
        if not blocks or len(blocks) > self.host.num_available:
            return None
        moved = dict(zip(blocks, self.host.allocate(len(blocks)), strict=True))
        for sequence, table in tables.items():
            host_table = [moved[block] for block in table]
            self.host.share(host_table)
            self.device.free(reversed(sequence.block_table))
            sequence.block_table = []
            self._holding(sequence).host_table = host_table
        self.host.free(moved.values())  # the sequences hold them now
        return list(moved.items())

    def swap_in_cost(self, sequences: Iterable[Sequence]) -> int:
        """Available blocks that `swap_in` would use up."""
        tables = [(each, self._holding(each).host_table) for each in sequences]
        growth = sum(self.count(each.num_tokens) - len(table) for each, table in tables if table)
        return growth + len({block for _, table in tables for block in table})

    def swap_in(self, sequences: Iterable[Sequence]) -> Pairs:
        """Move sequences back, with blocks for all their tokens.

        Returns:
            (host block, device block) to copy, before the host blocks are written again.
        """
        moved: dict[int, int] = {}
        for sequence in sequences:
            holding = self._holding(sequence)
            table = sequence.block_table = []
            for block in holding.host_table:
                if block in moved:
                    self.device.share([moved[block]])
                else:
                    moved[block] = self.device.allocate()[0]
                table.append(moved[block])
            if table:
                table += self.device.allocate(self.count(sequence.num_tokens) - len(table))
            self.host.free(holding.host_table)
            holding.host_table = []
            holding.num_registered = 0  # they are other blocks now
        return list(moved.items())

    # ---- inside ------------------------------------------------------------------------------------------------------

    def _writes_shared(self, sequence: Sequence) -> bool:
        first = sequence.num_computed // self.block_size
        return first < len(sequence.block_table) and self.device.is_shared(sequence.block_table[first])

    def _find(self, sequence: Sequence, donor: Sequence | None, begun: int = 0) -> list[int]:
        """Blocks that hold the beginning of the sequence, but not all of it; those after the first `begun` ones."""
        # A prompt whose log-probabilities are wanted must go through the model, once.
        looks = sequence.num_output_tokens or sequence.request.params.prompt_logprobs is None
        found: list[int] = []
        if self.prefix is not None and looks:
            most = (sequence.num_tokens - 1) // self.block_size
            found = self.prefix.lookup(self._hashes(sequence, most)[begun:most])
        if donor is None:
            return found
        # The donor's come first: two copies of one prompt may be more than the request was admitted with.
        given = donor.block_table[: sequence.num_prompt_tokens // self.block_size]
        return given + found[len(given) :]

    def _hashes(self, sequence: Sequence, count: int) -> list[bytes]:
        """Of the sequence's first so many blocks, at least."""
        holding = self._holding(sequence)
        hashes, size = holding.hashes, self.block_size
        for i in range(len(hashes), count):
            parent = hashes[-1] if hashes else holding.root
            hashes.append(chain_hash(parent, sequence.token_ids[i * size : (i + 1) * size]))
        return hashes

    def _holding(self, sequence: Sequence) -> _Holding:
        holding = self._holdings.get(sequence)
        if holding is None:
            holding = self._holdings[sequence] = _Holding(self._root(sequence.request))
        return holding

    def _root(self, request: Request) -> bytes:
        return root_hash(self.block_size, request.adapter, request.cache_salt, str(self._generation))

"""The allocator against a model of it: every block has one fate, and none is lost, whatever is asked in which order."""

from __future__ import annotations

from collections import Counter

import pytest
from fastgen.blocks import BlockAllocator
from fastgen.errors import CacheError
from fastgen.prefix import PrefixCache
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule


class Allocation(RuleBasedStateMachine):
    """Holders come and go; some blocks are told to the prefix cache, and found again."""

    def __init__(self) -> None:
        super().__init__()
        self.num_blocks = 7
        self.cache = PrefixCache()
        self.blocks = BlockAllocator(self.num_blocks, self.cache)
        self.held: list[int] = []  # one entry a holder
        self.found: dict[bytes, int] = {}  # what can be found, the longest unused of the idle first
        self.idle: list[int] = []
        self.num_hashes = 0

    @rule(count=st.integers(0, 9))
    def allocate(self, count: int) -> None:
        free = self.num_blocks - len(set(self.held)) - len(self.idle)
        if count > free + len(self.idle):
            with pytest.raises(CacheError, match=f"expected {count} available blocks"):
                self.blocks.allocate(count)
            return
        given = self.blocks.allocate(count)
        given_up, self.idle = self.idle[: max(0, count - free)], self.idle[max(0, count - free) :]
        assert len(set(given)) == count
        assert not set(given) & set(self.held)
        assert not set(given) & set(self.idle)
        assert set(given_up) <= set(given), "idle blocks go only when none is free, the longest unused first"
        self.found = {key: block for key, block in self.found.items() if block not in given_up}
        self.held += given

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(self.held))
        self.blocks.share([block])
        self.held.append(block)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(self.held))
        self.blocks.free([block])
        self.held.remove(block)
        if block not in self.held and block in self.found.values():
            self.idle.append(block)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), new=st.booleans())
    def insert(self, data: st.DataObject, new: bool) -> None:
        block = data.draw(st.sampled_from(self.held))
        self.num_hashes += new
        key = str(self.num_hashes).encode()
        inserted = self.cache.insert(key, block)
        assert inserted == (key not in self.found and block not in self.found.values())
        if inserted:
            self.found[key] = block

    @precondition(lambda self: self.found)
    @rule(data=st.data())
    def find(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.found)))
        assert self.cache.lookup([key, b"never there", key]) == [self.found[key]]
        self.blocks.share([self.found[key]])
        self.held.append(self.found[key])
        if self.found[key] in self.idle:
            self.idle.remove(self.found[key])

    @rule(block=st.integers(0, 6))
    def free_what_nobody_holds(self, block: int) -> None:
        if block not in self.held:
            with pytest.raises(CacheError, match=f"block {block}, which is free"):
                self.blocks.free([block])

    @invariant()
    def every_block_has_one_fate(self) -> None:
        holders = Counter(self.held)
        assert [self.blocks.holders(block) for block in range(self.num_blocks)] == [
            holders[block] for block in range(self.num_blocks)
        ]
        assert all(self.blocks.is_shared(block) == (holders[block] > 1) for block in range(self.num_blocks))
        assert self.blocks.num_used == len(holders)
        assert self.blocks.num_available == self.num_blocks - len(holders)
        assert self.cache.num_idle == len(self.idle)
        assert self.cache.num_blocks == len(self.found)
        assert all(self.cache.lookup([key]) == [block] for key, block in self.found.items())


Allocation.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestAllocation = Allocation.TestCase


def test_without_a_keeper_freed_blocks_are_free() -> None:
    blocks = BlockAllocator(3)
    first = blocks.allocate(3)
    blocks.free(first)
    assert blocks.num_available == 3
    assert sorted(blocks.allocate(3)) == sorted(first)


def test_no_blocks_at_all() -> None:
    blocks = BlockAllocator(0)
    assert blocks.allocate(0) == []
    with pytest.raises(CacheError):
        blocks.allocate(1)

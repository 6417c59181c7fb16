"""Values that would lead outside of a tensor, for back ends that do not look at them themselves.

In: the index tensors of one op. Out: nothing, or the error that the ``cpu`` back end raises. Only those on the CPU are
looked at: on a device that would mean to wait for it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import AccelValueError
from ...recording import refuse_while_recording


def check_positions(positions: Tensor, num_positions: int) -> None:
    """Demand positions from 0 to ``num_positions - 1``; see ``rotary``.

    Raises:
        AccelValueError: another one.
        AccelKernelsError: a recording is under way.
    """
    if positions.is_cpu:
        _refuse_while_recording("rotary")
        bad = (positions < 0) | (positions >= num_positions)
        _refuse_first("rotary", "positions", positions, bad, f"0 to {num_positions - 1}")


def check_slots(slots: Tensor, num_slots: int) -> None:
    """Demand slots below ``num_slots``; see ``write_kv``.

    Raises:
        AccelValueError: another one.
        AccelKernelsError: a recording is under way.
    """
    if slots.is_cpu:
        _refuse_while_recording("write_kv")
        _refuse_first("write_kv", "slots", slots, slots >= num_slots, f"below {num_slots}")


def check_attention(
    num_tokens: int, cache_shape: torch.Size, block_tables: Tensor, query_starts: Tensor, context_lens: Tensor
) -> None:
    """Demand starts that go up from 0 to ``num_tokens``, keys for every query, blocks of the cache.

    Raises:
        AccelValueError: others.
        AccelKernelsError: a recording is under way.
    """
    op = "paged_attention"
    _refuse_while_recording(op)
    if not query_starts.is_cpu:
        return
    num_blocks, _, block_size, _ = cache_shape
    starts, lengths, room = query_starts.tolist(), context_lens.tolist(), block_tables.shape[1] * block_size
    if starts[0] != 0:
        _refuse(op, "query_starts", 0, "0", starts[0])
    for s, keys in enumerate(lengths):
        queries = starts[s + 1] - starts[s]
        if queries < 0:
            _refuse(op, "query_starts", s + 1, f"at least {starts[s]}", starts[s + 1])
        if keys < queries:
            _refuse(op, "context_lens", s, f"at least the sequence's {queries} queries", keys)
        if keys > room:
            _refuse(op, "context_lens", s, f"at most what block_tables has room for, {room}", keys)
        blocks = block_tables[s, : -(-keys // block_size)]
        bad = ((blocks < 0) | (blocks >= num_blocks)).nonzero()
        if len(bad):
            _refuse(op, "block_tables", s, f"ids below {num_blocks}", int(blocks[bad[0, 0]]))
    if starts[-1] != num_tokens:
        _refuse(op, "query_starts", len(lengths), f"the number of queries, {num_tokens}", starts[-1])


def _refuse_while_recording(op: str) -> None:
    refuse_while_recording(op, "this back end looks at the values of its tensors")


def _refuse_first(op: str, name: str, values: Tensor, bad: Tensor, expected: str) -> None:
    found = bad.nonzero()
    if len(found):
        index = int(found[0, 0])
        _refuse(op, name, index, expected, int(values[index]))


def _refuse(op: str, name: str, index: int, expected: str, got: int) -> None:
    raise AccelValueError(f"{op}: {name}[{index}]: expected {expected}, got {got}")

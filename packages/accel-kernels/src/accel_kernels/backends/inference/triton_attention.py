"""Paged attention in Triton, for CUDA; imported when it is first called.

Rows are (query, head of the group) pairs of one sequence and key head, as in csrc/cpu/inference/attention.cpp:
a program takes ``ROWS`` of them through tiles of ``TILE`` keys, counted from key 0, and merges chunks of
``CHUNK`` keys in order. Where there are few rows, chunks go to programs of their own and ``_merge`` does the
merging, in the same order and with the same operations. So a row's bits depend on its own query and keys alone.

Milakov & Gimelshein, arXiv:1805.02867, algorithm 3; Dao et al., arXiv:2205.14135, algorithm 1.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...dispatch import AttentionOptions

ROWS = 32  # the same for one query as for a thousand: other shapes of a product might add in another order
TILE = 64
CHUNK = 1024
_ENOUGH_PROGRAMS = 256  # about two for each multiprocessor of a large GPU


@triton.jit
def _merged(highest, total, acc, chunk_highest, chunk_total, chunk_acc):  # type: ignore[no-untyped-def]
    """One chunk's state into the state of those before it."""
    now = tl.maximum(highest, chunk_highest)
    safe = tl.where(now == float("-inf"), 0.0, now)
    keep = tl.exp(highest - safe)
    add = tl.exp(chunk_highest - safe)
    total = tl.fma(chunk_total, add, total * keep)
    # Explicit, so that no compiler fuses it in one kernel and not in another.
    acc = tl.fma(chunk_acc, tl.broadcast_to(add[:, None], chunk_acc.shape), acc * keep[:, None])
    return now, total, acc


@triton.jit  # type: ignore[untyped-decorator]
def _attend(  # type: ignore[no-untyped-def]
    q_ptr,
    k_ptr,
    v_ptr,
    k_scale_ptr,
    v_scale_ptr,
    slopes_ptr,
    tables_ptr,
    starts_ptr,
    lengths_ptr,
    out_ptr,
    partial_ptr,
    q_token_stride,
    q_head_stride,
    table_stride,
    num_sequences,
    num_chunks,
    scale,
    window,
    softcap,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
    QUANTIZED: tl.constexpr,
    ALIBI: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """One block of rows of one sequence and key head; all its chunks, or if SPLIT the one of this program."""
    GROUP: tl.constexpr = HEADS // KV_HEADS
    kv_head = tl.program_id(1)
    # Sequence s owns the programs from start[s] * GROUP // ROWS + s on: at least as many as it has blocks of rows.
    program = tl.program_id(0)
    low_s = 0
    high_s = num_sequences
    while low_s < high_s:
        middle = (low_s + high_s) // 2
        if tl.load(starts_ptr + middle + 1) * GROUP // ROWS + middle + 1 <= program:
            low_s = middle + 1
        else:
            high_s = middle
    s = low_s
    if s < num_sequences:
        start = tl.load(starts_ptr + s)
        num_queries = tl.load(starts_ptr + s + 1) - start
        num_keys = tl.load(lengths_ptr + s)
        row = (program - start * GROUP // ROWS - s) * ROWS + tl.arange(0, ROWS)
        first_row = (program - start * GROUP // ROWS - s) * ROWS
        if first_row < num_queries * GROUP:
            real = row < num_queries * GROUP
            query = tl.where(real, row // GROUP, 0)
            token = (start + query).to(tl.int64)
            head = kv_head * GROUP + row % GROUP
            position = num_keys - num_queries + query
            first = num_keys - num_queries + first_row // GROUP
            last_row = tl.minimum(first_row + ROWS, num_queries * GROUP) - 1
            last = num_keys - num_queries + last_row // GROUP
            low = tl.maximum(first - window + 1, 0) if WINDOW else 0
            d = tl.arange(0, WIDTH)
            q_at = token * q_token_stride + head * q_head_stride
            q = tl.load(
                q_ptr + q_at[:, None] + d[None, :], mask=real[:, None] & (d < DIM)[None, :], other=0.0
            )
            slope = (
                tl.load(slopes_ptr + head, mask=real, other=0.0) if ALIBI else tl.zeros([ROWS], tl.float32)
            )
            highest = tl.full([ROWS], float("-inf"), tl.float32)
            total = tl.zeros([ROWS], tl.float32)
            result = tl.zeros([ROWS, WIDTH], tl.float32)
            begin_chunk = low // CHUNK
            end_chunk = last // CHUNK + 1
            if SPLIT:
                begin_chunk = tl.maximum(begin_chunk, tl.program_id(2))
                end_chunk = tl.minimum(end_chunk, tl.program_id(2) + 1)
            for chunk in range(begin_chunk, end_chunk):
                m = tl.full([ROWS], float("-inf"), tl.float32)
                l = tl.zeros([ROWS], tl.float32)  # noqa: E741  the literature's name
                acc = tl.zeros([ROWS, WIDTH], tl.float32)
                begin = tl.maximum(chunk * CHUNK, low // TILE * TILE)
                end = tl.minimum((chunk + 1) * CHUNK, last + 1)
                for tile in range(begin, end, TILE):
                    key = tile + tl.arange(0, TILE)
                    there = key < num_keys
                    block = tl.load(tables_ptr + s * table_stride + key // BLOCK_SIZE, mask=there, other=0)
                    place = (block.to(tl.int64) * KV_HEADS + kv_head) * BLOCK_SIZE + key % BLOCK_SIZE
                    at = place[:, None] * DIM + d[None, :]
                    loaded = there[:, None] & (d < DIM)[None, :]
                    k = tl.load(k_ptr + at, mask=loaded, other=0.0).to(q.dtype)
                    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
                    if QUANTIZED:
                        scores = scores * tl.load(k_scale_ptr + place, mask=there, other=0.0)[None, :]
                    if SOFTCAP:
                        scores = softcap * (1.0 - 2.0 / (tl.exp(2.0 * scores / softcap) + 1.0))
                    if ALIBI:
                        distance = key[None, :] - position[:, None]
                        scores = scores + slope[:, None] * distance.to(tl.float32)
                    seen = (key[None, :] <= position[:, None]) & real[:, None]
                    if WINDOW:
                        seen = seen & (key[None, :] > position[:, None] - window)
                    scores = tl.where(seen, scores, float("-inf"))
                    now = tl.maximum(m, tl.max(scores, 1))
                    safe = tl.where(now == float("-inf"), 0.0, now)
                    p = tl.exp(scores - safe[:, None])
                    shrink = tl.exp(m - safe)
                    l = tl.fma(l, shrink, tl.sum(p, 1))  # noqa: E741
                    v = tl.load(v_ptr + at, mask=loaded, other=0.0)
                    if QUANTIZED:  # the values: probabilities times small scales would leave float16's range
                        v = v.to(tl.float32) * tl.load(v_scale_ptr + place, mask=there, other=0.0)[:, None]
                    v = v.to(q.dtype)
                    acc = tl.dot(p.to(q.dtype), v, acc=acc * shrink[:, None], input_precision="ieee")
                    m = now
                if SPLIT:
                    to = ((token * HEADS + head) * num_chunks + chunk) * (WIDTH + 2)
                    tl.store(partial_ptr + to[:, None] + d[None, :], acc, mask=real[:, None])
                    tl.store(partial_ptr + to + WIDTH, m, mask=real)
                    tl.store(partial_ptr + to + WIDTH + 1, l, mask=real)
                else:
                    highest, total, result = _merged(highest, total, result, m, l, acc)
            if not SPLIT:
                to = (token * HEADS + head) * DIM
                value = (result / total[:, None]).to(q.dtype)
                tl.store(out_ptr + to[:, None] + d[None, :], value, mask=real[:, None] & (d < DIM)[None, :])


@triton.jit  # type: ignore[untyped-decorator]
def _merge(  # type: ignore[no-untyped-def]
    partial_ptr,
    starts_ptr,
    lengths_ptr,
    out_ptr,
    num_sequences,
    num_chunks,
    window,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """The chunks of one token and head, in order."""
    token = tl.program_id(0)
    head = tl.program_id(1)
    low_s = 0
    high_s = num_sequences
    while low_s < high_s:  # the sequence that the token belongs to
        middle = (low_s + high_s) // 2
        if tl.load(starts_ptr + middle + 1) <= token:
            low_s = middle + 1
        else:
            high_s = middle
    if low_s < num_sequences:
        position = tl.load(lengths_ptr + low_s) - (tl.load(starts_ptr + low_s + 1) - token)
        low = tl.maximum(position - window + 1, 0) if WINDOW else 0
        one = tl.arange(0, 1)
        d = tl.arange(0, WIDTH)
        highest = tl.full([1], float("-inf"), tl.float32)
        total = tl.zeros([1], tl.float32)
        result = tl.zeros([1, WIDTH], tl.float32)
        row = token.to(tl.int64) * HEADS + head
        for chunk in range(low // CHUNK, position // CHUNK + 1):
            at = (row * num_chunks + chunk) * (WIDTH + 2) + one
            acc = tl.load(partial_ptr + at[:, None] + d[None, :])
            m = tl.load(partial_ptr + at + WIDTH)
            l = tl.load(partial_ptr + at + WIDTH + 1)  # noqa: E741
            highest, total, result = _merged(highest, total, result, m, l, acc)
        value = (result / total[:, None]).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + row * DIM + one[:, None] + d[None, :], value, mask=(d < DIM)[None, :])


def run(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    options: AttentionOptions,
    out: Tensor,
) -> None:
    """See ``dispatch.InferenceBackend``; reads no value on the host, so that it can be captured in a graph."""
    num_tokens, num_heads, dim = q.shape
    _, num_kv_heads, block_size, _ = k_cache.shape
    num_sequences = context_lens.shape[0]
    group = num_heads // num_kv_heads
    num_chunks = max(triton.cdiv(block_tables.shape[1] * block_size, CHUNK), 1)
    programs = num_tokens * group // ROWS + num_sequences
    split = num_chunks > 1 and programs * num_kv_heads < _ENOUGH_PROGRAMS
    width = max(triton.next_power_of_2(dim), 16)
    partial = out  # not looked at
    if split:
        partial = torch.empty(num_tokens * num_heads * num_chunks * (width + 2), device=q.device)
    shared: dict[str, Any] = {"HEADS": num_heads, "DIM": dim, "WIDTH": width, "CHUNK": CHUNK}
    shared["WINDOW"] = options.window > 0
    _attend[(programs, num_kv_heads, num_chunks if split else 1)](
        q,
        k_cache,
        v_cache,
        out if options.k_scale is None else options.k_scale,
        out if options.v_scale is None else options.v_scale,
        out if options.alibi_slopes is None else options.alibi_slopes,
        block_tables,
        query_starts,
        context_lens,
        out,
        partial,
        q.stride(0),
        q.stride(1),
        block_tables.stride(0),
        num_sequences,
        num_chunks,
        options.scale,
        options.window,
        options.softcap,
        KV_HEADS=num_kv_heads,
        BLOCK_SIZE=block_size,
        ROWS=ROWS,
        TILE=TILE,
        QUANTIZED=options.k_scale is not None,
        ALIBI=options.alibi_slopes is not None,
        SOFTCAP=options.softcap > 0,
        SPLIT=split,
        num_warps=4,
        **shared,
    )
    if split:
        _merge[(num_tokens, num_heads)](
            partial, query_starts, context_lens, out, num_sequences, num_chunks, options.window, **shared
        )

"""With the C++ kernels a row's bits do not depend on its batch, its chunk, its blocks or the number of threads."""

from __future__ import annotations

from typing import Any

import accel_kernels as ak
import pytest
import torch
from inference_lab import with_way
from test_paged_attention import RULES, make_batch

pytestmark = pytest.mark.skipif(not ak.available_cpu_isas(), reason="the C++ back end is not built")
ISAS = ak.available_cpu_isas()
DTYPES = (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [96, 640, 1000])
def test_products(isa: str, dtype: torch.dtype, k: int, run_threads: Any) -> None:
    x, weight = torch.randn(181, k).to(dtype), torch.randn(150, k).to(dtype)
    bias = torch.randn(150).to(dtype)
    quantized, scale = ak.quantize_int8(weight)
    ops = [
        lambda rows: ak.linear(rows, weight, bias),
        lambda rows: ak.linear_int8(rows, quantized, scale, bias),
    ]
    if k % 32 == 0:
        packed, scale4, zero = ak.quantize_int4(weight, 32)
        ops.append(lambda rows: ak.linear_int4(rows, packed, scale4, zero, bias, group_size=32))
    with with_way(("cpu", isa), dtype):
        for op in ops:
            with run_threads(1):
                whole = op(x)
            for threads in (2, 3, 5):
                with run_threads(threads):
                    assert torch.equal(op(x), whole)
            for rows in (1, 2, 3, 5, 6, 15, 16, 17, 81):
                assert torch.equal(op(x[7 : 7 + rows]), whole[7 : 7 + rows])
            assert not torch.equal(whole[0], whole[1])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("int8", [False, True])
def test_attention(isa: str, dtype: torch.dtype, rule: str, int8: bool, run_threads: Any) -> None:
    lengths = [(60, 130), (1, 90), (90, 90), (3, 1100), (1, 2050)]
    batch = make_batch(lengths, dtype=dtype, int8=int8, dim=40, **RULES[rule])
    q, k_cache, v_cache, tables, starts, _ = batch.tensors
    with with_way(("cpu", isa), dtype):
        with run_threads(1):
            whole = batch.run()
        for threads in (2, 5):
            with run_threads(threads):
                assert torch.equal(batch.run(), whole)
        for s, (queries, keys) in enumerate(lengths):
            first = int(starts[s])
            for begin, end in (
                (0, queries),
                (0, 1),
                (queries - 1, queries),
                (queries // 3, queries - queries // 4),
            ):
                if begin == end:
                    continue
                alone = (
                    q[first + begin : first + end],
                    *(k_cache, v_cache, tables[s : s + 1]),
                    torch.tensor([0, end - begin], dtype=torch.int32),
                    torch.tensor(
                        [keys - queries + end], dtype=torch.int32
                    ),  # as if the rest were yet to come
                )
                got = ak.paged_attention(*alone, **batch.options)
                assert torch.equal(got, whole[first + begin : first + end])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_of_moved_blocks(isa: str, dtype: torch.dtype) -> None:
    batch = make_batch([(5, 77), (1, 33)], dtype=dtype)
    q, k_cache, v_cache, tables, starts, context = batch.tensors
    order = torch.randperm(k_cache.shape[0])  # new place of each block
    moved = [torch.empty_like(cache) for cache in (k_cache, v_cache)]
    for to, cache in zip(moved, (k_cache, v_cache), strict=True):
        to[order] = cache
    new_tables = torch.where(tables >= 0, order[tables.long()].to(torch.int32), -1)
    with with_way(("cpu", isa), dtype):
        got = ak.paged_attention(q, *moved, new_tables, starts, context, **batch.options)
        assert torch.equal(got, batch.run())


@pytest.mark.parametrize("isa", ISAS)
def test_small_ops(isa: str, run_threads: Any) -> None:
    x, weight = torch.randn(300, 512), torch.randn(512)
    with with_way(("cpu", isa), torch.float32):
        for op in (lambda rows: ak.rms_norm(rows, weight, 1e-5), ak.silu_mul, ak.gelu_mul):
            with run_threads(1):
                whole = op(x)
            with run_threads(3):
                assert torch.equal(op(x), whole)
            assert torch.equal(op(x[5:6]), whole[5:6])

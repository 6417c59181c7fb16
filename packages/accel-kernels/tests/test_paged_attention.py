"""Paged attention: every back end agrees with the reference, over ragged batches, cache layouts and score rules."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import accel_kernels as ak
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from inference_lab import FLOATS, Way, agree, ways, with_way
from torch.nn import functional as F


@dataclass
class Batch:
    """Arguments of one call; what was never written to the cache is NaN, and must not be looked at."""

    tensors: tuple[torch.Tensor, ...]
    options: dict[str, Any] = field(default_factory=dict)
    keys: list[torch.Tensor] = field(default_factory=list)
    values: list[torch.Tensor] = field(default_factory=list)

    def run(self, backend: str | None = None, **options: Any) -> torch.Tensor:
        return ak.paged_attention(*self.tensors, backend=backend, **{**self.options, **options})


def make_batch(
    lengths: list[tuple[int, int]],
    *,
    dtype: torch.dtype = torch.float32,
    heads: tuple[int, int] = (4, 2),
    dim: int = 32,
    block_size: int = 16,
    int8: bool = False,
    seed: int = 0,
    **options: Any,
) -> Batch:
    """``lengths``: (queries, keys) of each sequence; blocks in random order, queries a slice of something wider."""
    generator = torch.Generator().manual_seed(seed)
    num_heads, num_kv = heads
    width = max((-(-keys // block_size) for _, keys in lengths), default=0) + 1
    num_blocks = len(lengths) * width + 2
    tables = torch.randperm(num_blocks, generator=generator)[: len(lengths) * width]
    tables = tables.view(len(lengths), width).to(torch.int32)
    caches = [torch.full((num_blocks, num_kv, block_size, dim), float("nan")).to(dtype) for _ in range(2)]
    scales: list[torch.Tensor | None] = [None, None]
    if int8:
        caches = [torch.full((num_blocks, num_kv, block_size, dim), 99, dtype=torch.int8) for _ in range(2)]
        scales = [torch.full((num_blocks, num_kv, block_size), float("nan")) for _ in range(2)]
    batch = Batch(())
    for s, (_, num_keys) in enumerate(lengths):
        k, v = (torch.randn(num_keys, num_kv, dim, generator=generator).to(dtype) for _ in range(2))
        position = torch.arange(num_keys)
        slots = tables[s].long()[position // block_size] * block_size + position % block_size
        ak.write_kv(k, v, *caches, slots, k_scale=scales[0], v_scale=scales[1], backend="reference")
        batch.keys.append(k)
        batch.values.append(v)
        tables[s, -(-num_keys // block_size) :] = -1  # past the end
    starts = torch.tensor([0, *(queries for queries, _ in lengths)]).cumsum(0).to(torch.int32)
    q = torch.randn(int(starts[-1]), num_heads + 2, dim, generator=generator).to(dtype)[:, 1:-1]
    context = torch.tensor([keys for _, keys in lengths], dtype=torch.int32)
    batch.tensors = (q, *caches, tables, starts, context)
    batch.options = {"scale": dim**-0.5, "k_scale": scales[0], "v_scale": scales[1], **options}
    return batch


RULES: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": 9},
    "wide window": {"window": 150},
    "softcap": {"softcap": 3.0},
    "alibi": {"alibi_slopes": torch.tensor([0.5, 0.1, 0.02, 1.0])},
    "all": {"window": 70, "softcap": 5.0, "alibi_slopes": torch.tensor([0.5, 0.1, 0.02, 1.0])},
}
SHAPES: dict[str, list[tuple[int, int]]] = {
    "decode": [(1, 1), (1, 17), (1, 64), (1, 65), (1, 200)],
    "prefill": [(1, 1), (63, 63), (130, 130)],
    "mixed": [(1, 40), (0, 5), (20, 33), (1, 100), (70, 300)],
    "chunks": [(3, 2100), (1, 1025)],
}


@pytest.mark.parametrize("way", ways())
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_agrees(way: Way, rule: str, shape: str, dtype: torch.dtype) -> None:
    for int8 in (False, True):
        batch = make_batch(SHAPES[shape], dtype=dtype, int8=int8, **RULES[rule])
        with with_way(way, dtype) as backend:
            agree(batch.run(backend), batch.run("reference"), units=4.0, num_terms=300, at_least=1.0)


@pytest.mark.parametrize("way", ways())
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_random_batches(way: Way, data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(FLOATS))
    keys = st.one_of(st.integers(1, 40), st.integers(1, 160))
    lengths = [
        (data.draw(st.one_of(st.just(1), st.integers(0, count))), count)
        for count in data.draw(st.lists(keys, max_size=4))
    ]
    num_kv = data.draw(st.integers(1, 3))
    batch = make_batch(
        lengths,
        dtype=dtype,
        heads=(num_kv * data.draw(st.sampled_from([1, 2, 5])), num_kv),
        dim=data.draw(st.sampled_from([1, 8, 15, 32, 40, 64, 80, 96, 130])),
        block_size=data.draw(st.sampled_from([1, 4, 7, 16, 32, 100])),
        int8=data.draw(st.booleans()),
        seed=data.draw(st.integers(0, 99)),
        window=data.draw(st.sampled_from([0, 0, 1, 13])),
        softcap=data.draw(st.sampled_from([0.0, 0.0, 2.0])),
    )
    with with_way(way, dtype) as backend:
        agree(batch.run(backend), batch.run("reference"), units=4.0, num_terms=300, at_least=1.0)


def test_reference_is_attention() -> None:
    batch = make_batch([(7, 50)], heads=(6, 2))
    q, k, v = batch.tensors[0].transpose(0, 1), batch.keys[0], batch.values[0]
    k, v = (each.transpose(0, 1).repeat_interleave(3, dim=0) for each in (k, v))
    mask = torch.ones(7, 50, dtype=torch.bool).tril(diagonal=43)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(batch.run("reference"), expected.transpose(0, 1), rtol=1e-5, atol=1e-6)


def test_int8_cache_is_close_to_the_exact_one() -> None:
    exact = make_batch([(4, 90)], dim=64).run("reference")
    coarse = make_batch([(4, 90)], dim=64, int8=True).run("reference")
    assert 0 < float((coarse - exact).abs().max()) < 0.03


@pytest.mark.parametrize("way", ways())
def test_writes_into_out(way: Way) -> None:
    batch = make_batch([(3, 20)])
    out = torch.full(batch.tensors[0].shape, float("nan"))
    with with_way(way, torch.float32) as backend:
        assert batch.run(backend, out=out) is out
        assert torch.equal(out, batch.run(backend))


@pytest.mark.parametrize("way", ways())
def test_large_scores_do_not_overflow(way: Way) -> None:
    batch = make_batch([(5, 70)])
    with with_way(way, torch.float32) as backend:
        got = batch.run(backend, scale=300.0)
    agree(got, batch.run("reference", scale=300.0), num_terms=100_000)  # softmax of scores in the thousands
    assert got.isfinite().all()


@pytest.mark.parametrize("way", ways())
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_of_nan_stays_its_own_and_nan(way: Way, dtype: torch.dtype, int8: bool, value: float) -> None:
    # Several sequences, so that memory holds another one's result; few of many keys, so that chunks are shared out.
    for lengths in ([(1, 40), (2, 40), (1, 70)], [(1, 3000)], [(90, 90), (3, 2100)]):
        batch = make_batch(lengths, dtype=dtype, int8=int8)
        batch.tensors[0][-1] = value
        with with_way(way, dtype) as backend:
            for _ in range(3):
                got = batch.run(backend)
                assert got[-1].isnan().all()
                agree(got[:-1], batch.run("reference")[:-1], units=4.0, num_terms=300, at_least=1.0)


@pytest.mark.parametrize("way", ways())
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 17, 39])
def test_a_key_that_is_not_finite_is_nan_in_an_int8_cache(
    way: Way, dtype: torch.dtype, value: float, place: int
) -> None:
    k = torch.randn(3, 2, 40).to(dtype)
    k[1, 1, place] = value
    found = []
    for backend in (None, "reference"):
        caches = [torch.full((2, 2, 16, 40), 99, dtype=torch.int8) for _ in range(2)]
        scales = [torch.ones(2, 2, 16) for _ in range(2)]
        with with_way(way, dtype) as chosen:
            ak.write_kv(
                *(k, k, *caches, torch.tensor([3, 20, -1])), k_scale=scales[0], v_scale=scales[1],
                backend=backend or chosen,
            )  # fmt: skip
        assert scales[0][1, 1, 4].isnan()
        assert not caches[0][1, 1, 4].any()
        assert int(scales[0].isnan().sum()) == 1
        found.append((*caches, *scales))
    assert all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(*found, strict=True))

"""The inference ops: a clear error that names op and argument, before anything is read or written out of bounds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import accel_kernels as ak
import pytest
import torch

X = torch.zeros(3, 64)
W = torch.zeros(5, 64)
PACKED = torch.zeros(5, 32, dtype=torch.uint8)
BACKENDS = [*(["cpu"] if ak.available_cpu_isas() else []), "portable", "reference"]
CACHE = torch.zeros(4, 2, 16, 8)


def attend(**changes: Any) -> torch.Tensor:
    given: dict[str, Any] = {
        "q": torch.zeros(3, 4, 8),
        "k_cache": CACHE,
        "v_cache": CACHE,
        "block_tables": torch.tensor([[0, 1], [2, 3]], dtype=torch.int32),
        "query_starts": torch.tensor([0, 1, 3], dtype=torch.int32),
        "context_lens": torch.tensor([20, 32], dtype=torch.int32),
        "scale": 1.0,
        **changes,
    }
    return ak.paged_attention(**given)


def int32(*values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def released() -> torch.Tensor:
    weight = torch.zeros(5, 64)
    weight.untyped_storage().resize_(0)
    return weight


CASES: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "linear, not a tensor": (
        lambda: ak.linear([1.0], W),
        TypeError,
        "linear: x: expected a torch.Tensor, got list",
    ),
    "linear, dtype": (lambda: ak.linear(X.double(), W), TypeError, "linear: x: expected torch.float32 or"),
    "linear, dtypes differ": (
        lambda: ak.linear(X, W.bfloat16()),
        TypeError,
        "linear: weight: expected torch.float32, got torch.bfloat16",
    ),
    "linear, shape": (
        lambda: ak.linear(X, W[:, :32]),
        ValueError,
        r"linear: weight: expected shape \(\*, 64\), got \(5, 32\)",
    ),
    "linear, transposed": (
        lambda: ak.linear(X, torch.zeros(64, 5).T),
        ValueError,
        r"weight: .*pass weight.contiguous",
    ),
    "linear, gaps": (
        lambda: ak.linear(X, torch.zeros(5, 65)[:, :64]),
        ValueError,
        "weight: expected a contiguous",
    ),
    "linear, bias": (lambda: ak.linear(X, W, torch.zeros(4)), ValueError, r"bias: expected shape \(5\)"),
    "linear, out": (
        lambda: ak.linear(X, W, out=torch.zeros(3, 4)),
        ValueError,
        r"out: expected shape \(3, 5\)",
    ),
    "linear, device": (
        lambda: ak.linear(X, W.to("meta")),
        ValueError,
        "weight: expected a tensor on cpu, got meta",
    ),
    "linear, backend": (
        lambda: ak.linear(X, W, backend="quick"),
        ValueError,
        "backend: expected None or one of",
    ),
    "linear, cuda": (
        lambda: ak.linear(X, W, backend="cuda"),
        ak.BackendUnavailableError,
        "works on cuda tensors, got cpu ones",
    ),
    "int8, dtype": (
        lambda: ak.linear_int8(X, W, torch.ones(5)),
        TypeError,
        "linear_int8: weight: expected torch.int8",
    ),
    "int4, group": (
        lambda: ak.linear_int4(X, PACKED, torch.ones(5, 2), group_size=48),
        ValueError,
        "group_size: expected a multiple of 32 that divides K = 64, got 48",
    ),
    "int4, scale": (
        lambda: ak.linear_int4(X, PACKED, torch.ones(5, 1), group_size=32),
        ValueError,
        r"scale: expected shape \(5, 2\)",
    ),
    "quantize, group": (lambda: ak.quantize_int4(W, 128), ValueError, "quantize_int4: group_size"),
    "norm, weight": (
        lambda: ak.rms_norm(X, torch.ones(63), 1e-6),
        ValueError,
        r"weight: expected shape \(64\)",
    ),
    "norm, residual": (
        lambda: ak.rms_norm(X, torch.ones(64), 1e-6, residual=X.half()),
        TypeError,
        "residual: expected torch.float32",
    ),
    "rotary, width": (
        lambda: ak.rotary(X.view(3, 2, 32), None, torch.ones(9, 17), torch.ones(9, 17), torch.arange(3)),
        ValueError,
        "cos: expected at most 16 columns, got 17",
    ),
    "rotary, positions' dtype": (
        lambda: ak.rotary(X.view(3, 2, 32), None, torch.ones(9, 8), torch.ones(9, 8), int32(0, 1, 2)),
        TypeError,
        "positions: expected torch.int64",
    ),
    "gated, odd": (
        lambda: ak.silu_mul(X[:, :5]),
        ValueError,
        "gate_up: expected an even number of columns, got 5",
    ),
    "write, shape": (
        lambda: ak.write_kv(torch.zeros(1, 2, 8), torch.zeros(1, 3, 8), CACHE, CACHE, torch.zeros(1).long()),
        ValueError,
        r"write_kv: v: expected shape \(1, 2, 8\)",
    ),
    "write, int8 without scales": (
        lambda: ak.write_kv(
            *(torch.zeros(1, 2, 8), torch.zeros(1, 2, 8), CACHE.to(torch.int8), CACHE.to(torch.int8)),
            torch.zeros(1).long(),
        ),
        TypeError,
        "k_cache: expected torch.float32, got torch.int8",
    ),
    "attention, heads": (
        lambda: attend(q=torch.zeros(3, 3, 8)),
        ValueError,
        "q: expected a multiple of 2 heads",
    ),
    "attention, head dim": (lambda: attend(q=torch.zeros(3, 4, 9)), ValueError, "k_cache: expected shape"),
    "attention, tables": (
        lambda: attend(block_tables=torch.zeros(2, 2).long()),
        TypeError,
        "block_tables: expected torch.int32",
    ),
    "attention, one scale": (
        lambda: attend(v_scale=torch.ones(4, 2, 16)),
        ValueError,
        "expected k_scale and v_scale, or neither",
    ),
    "attention, no key heads": (
        lambda: attend(k_cache=CACHE[:, :0], v_cache=CACHE[:, :0]),
        ValueError,
        r"k_cache: expected heads and blocks of at least one key, got shape \(4, 0, 16, 8\)",
    ),
    "attention, empty blocks": (
        lambda: attend(
            k_cache=CACHE[:, :, :0],
            v_cache=CACHE[:, :, :0],
            query_starts=int32(0, 0, 3),
            context_lens=int32(0, 3),
        ),
        ValueError,
        "k_cache: expected heads and blocks of at least one key",
    ),
    "attention, out": (
        lambda: attend(q=(q := torch.zeros(3, 4, 8)), out=q),
        ValueError,
        "paged_attention: out: expected memory of its own, shares q's",
    ),
    "linear, in place": (
        lambda: ak.linear(x := torch.zeros(64, 64), torch.zeros(64, 64), out=x),
        ValueError,
        "linear: out: expected memory of its own, shares x's",
    ),
    "linear, onto the weight": (
        lambda: ak.linear(torch.zeros(5, 64), w := torch.zeros(64, 64), out=w[:5]),
        ValueError,
        "linear: out: expected memory of its own, shares the weight's",
    ),
    "rotary, expanded": (
        lambda: ak.rotary(
            X.view(3, 2, 32),
            torch.zeros(3, 1, 32).expand(-1, 8, -1),
            *(torch.ones(9, 16), torch.ones(9, 16), torch.arange(3)),
        ),
        ValueError,
        "rotary: k: expected memory for every element, got an expanded tensor",
    ),
    "norm, expanded residual": (
        lambda: ak.rms_norm(X, torch.ones(64), 1e-6, residual=torch.zeros(1, 64).expand(3, -1)),
        ValueError,
        "rms_norm: residual: expected memory for every element",
    ),
    "gated, expanded out": (
        lambda: ak.silu_mul(X, out=torch.zeros(1, 32).expand(3, -1)),
        ValueError,
        "silu_mul: out: expected memory for every element",
    ),
    "linear, without memory": (
        lambda: ak.linear(X, released()),
        TypeError,
        r"linear: weight: expected a tensor with memory, got a Tensor of shape \(5, 64\) that has none",
    ),
    "attention, window": (lambda: attend(window=-1), ValueError, "window, softcap: expected >= 0, got -1"),
}


@pytest.mark.parametrize("case", CASES)
def test_arguments(case: str) -> None:
    call, kind, message = CASES[case]
    with pytest.raises(kind, match=message) as caught:
        call()
    assert isinstance(caught.value, ak.AccelKernelsError)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"block_tables": int32([0, 1], [2, 4])},
            r"paged_attention: block_tables\[1\]: expected ids below 4, got 4",
        ),
        ({"block_tables": int32([-1, 1], [2, 3])}, r"block_tables\[0\]: expected ids below 4, got -1"),
        (
            {"context_lens": int32(20, 33)},
            r"context_lens\[1\]: expected at most what block_tables has room for, 32",
        ),
        (
            {"context_lens": int32(20, 1)},
            r"context_lens\[1\]: expected at least the sequence's 2 queries, got 1",
        ),
        ({"query_starts": int32(0, 4, 3)}, r"query_starts\[2\]: expected at least 4, got 3"),
        ({"query_starts": int32(1, 1, 3)}, r"query_starts\[0\]: expected 0, got 1"),
        ({"query_starts": int32(0, 1, 2)}, r"query_starts\[2\]: expected the number of queries, 3, got 2"),
    ],
)
def test_lengths_and_blocks_are_looked_at(
    backend: str, changes: dict[str, torch.Tensor], message: str
) -> None:
    with pytest.raises(ak.AccelValueError, match=message):
        attend(backend=backend, **changes)


@pytest.mark.parametrize("backend", BACKENDS)
def test_slots_and_positions_are_looked_at(backend: str) -> None:
    k = torch.ones(2, 2, 8)
    cache = CACHE.clone()
    with pytest.raises(ak.AccelValueError, match=r"write_kv: slots\[1\]: expected below 64, got 64"):
        ak.write_kv(k, k, cache, cache.clone(), torch.tensor([0, 64]), backend=backend)
    assert torch.equal(cache, CACHE)  # nothing was written
    angles = (torch.ones(9, 4), torch.ones(9, 4))
    for bad in (-1, 9):
        with pytest.raises(ak.AccelValueError, match=rf"rotary: positions\[1\]: expected 0 to 8, got {bad}"):
            ak.rotary(k, None, *angles, torch.tensor([0, bad]), backend=backend)
    assert (k == 1).all()

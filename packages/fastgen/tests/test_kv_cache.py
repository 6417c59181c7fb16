"""The cache has the size that the policy and the memory say, and blocks move without loss."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fastgen import kv_cache
from fastgen.config import CachePolicy
from fastgen.errors import CacheError
from fastgen.kv_cache import CacheLayout, KVCache, build_cache, free_memory

_CPU = torch.device("cpu")
_LAYOUT = CacheLayout(num_layers=3, num_kv_heads=2, head_dim=8, dtype=torch.float32)
_INT8 = CacheLayout(3, 2, 8, torch.int8)


def _bytes(cache: KVCache) -> int:
    lists = (cache.keys, cache.values, cache.key_scales, cache.value_scales)
    return sum(tensor.nbytes for each in lists for tensor in each)


@pytest.mark.parametrize("layout", [_LAYOUT, _INT8])
def test_size_by_bytes(layout: CacheLayout) -> None:
    cache = build_cache(layout, CachePolicy(block_size=4, max_bytes=20 * 4 * layout.token_bytes + 5), _CPU)
    assert cache.num_blocks == 20
    assert _bytes(cache) == 20 * 4 * layout.token_bytes
    assert cache.keys[0].shape == (20, 2, 4, 8)
    assert len(cache.key_scales) == (3 if layout is _INT8 else 0)


def test_size_by_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_cache, "free_memory", lambda device: 1_000_000)
    token_bytes = _LAYOUT.token_bytes
    policy = CachePolicy(block_size=4, fraction=0.5)
    assert build_cache(_LAYOUT, policy, _CPU).num_blocks == 500_000 // (4 * token_bytes)
    less = build_cache(_LAYOUT, policy, _CPU, activation_bytes=400_000)
    assert less.num_blocks == 300_000 // (4 * token_bytes)
    assert build_cache(_LAYOUT, policy, _CPU, max_blocks=7).num_blocks == 7
    with pytest.raises(CacheError, match="room for at least one block"):
        build_cache(_LAYOUT, policy, _CPU, activation_bytes=999_900)


def test_memory_that_is_not_there() -> None:
    with pytest.raises(CacheError, match="max_bytes"):
        build_cache(_LAYOUT, CachePolicy(max_bytes=1 << 60), _CPU)


@pytest.mark.parametrize("layout", [_LAYOUT, _INT8])
def test_copies_and_swaps(layout: CacheLayout) -> None:
    policy = CachePolicy(
        block_size=4, max_bytes=8 * 4 * layout.token_bytes, swap_bytes=3 * 4 * layout.token_bytes
    )
    cache = build_cache(layout, policy, _CPU)
    assert (cache.num_blocks, cache.num_host_blocks) == (8, 3)
    lists = (cache.keys, cache.values, cache.key_scales, cache.value_scales)
    tensors = [tensor for each in lists for tensor in each]
    for number, tensor in enumerate(tensors):
        values = torch.arange(8).view(-1, *[1] * (tensor.dim() - 1)) + number
        tensor.copy_(values.expand_as(tensor).to(tensor.dtype))

    def held() -> list[int]:
        """What block each block holds; the same in every layer."""
        seen = {
            tuple((tensor.flatten(1)[:, -1] - number).int().tolist()) for number, tensor in enumerate(tensors)
        }
        assert len(seen) == 1
        return list(next(iter(seen)))

    cache.copy_blocks([(1, 5), (1, 6)])
    assert held() == [0, 1, 2, 3, 4, 1, 1, 7]
    cache.swap_out([(2, 0), (7, 2)])
    cache.copy_blocks([(0, 2), (0, 7)])
    assert held() == [0, 1, 0, 3, 4, 1, 1, 0]
    cache.swap_in([(2, 3), (0, 7)])
    assert held() == [0, 1, 0, 7, 4, 1, 1, 2]
    cache.copy_blocks([])
    cache.swap_in([])


def test_free_memory(tmp_path: Path) -> None:
    assert 0 < free_memory(_CPU) < 1 << 50
    (tmp_path / "meminfo").write_text("MemTotal: 10 kB\nMemAvailable:   5 kB\n")
    assert kv_cache._available(tmp_path / "meminfo") == 5 * 1024
    assert kv_cache._available(tmp_path / "none") > 0
    assert kv_cache._group_headroom(tmp_path) == 1 << 62
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 600\ninactive_file 50\n")
    assert kv_cache._group_headroom(tmp_path) == 350
    (tmp_path / "memory.max").write_text("max\n")
    assert kv_cache._group_headroom(tmp_path) == 1 << 62

"""Keys and values of all layers in blocks of tokens: storage, its size, and copies between blocks and to the host.

In: the ids that `blocks` hands out (through a `StepPlan`). `attention` writes and reads the storage. A block's rows are
contiguous for each head, so that a kernel streams a head's keys.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .config import CachePolicy
from .errors import CacheError
from .parallel import TensorParallel


@dataclass(frozen=True)
class CacheLayout:
    """What a model keeps for each token.

    Attributes:
        num_layers: that attend.
        num_kv_heads: of each, on this rank.
        head_dim: of each.
        dtype: of keys and values; `torch.int8` with a float32 scale for each token and head.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def token_bytes(self) -> int:
        """Of one token in all layers."""
        scale_bytes = 4 if self.dtype is torch.int8 else 0
        return 2 * self.num_layers * self.num_kv_heads * (self.head_dim * self.dtype.itemsize + scale_bytes)


class KVCache:
    """Storage of `num_blocks` blocks, and of `num_host_blocks` more in host memory for preempted sequences.

    Attributes:
        keys: for each layer `[num_blocks, num_kv_heads, block_size, head_dim]`.
        values: likewise.
        key_scales: for each layer float32 `[num_blocks, num_kv_heads, block_size]`; empty unless the dtype is int8.
        value_scales: likewise.
    """

    def __init__(
        self,
        layout: CacheLayout,
        num_blocks: int,
        block_size: int,
        device: torch.device,
        num_host_blocks: int = 0,
    ) -> None:
        self.layout = layout
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.num_host_blocks = num_host_blocks
        shape = (layout.num_kv_heads, block_size, layout.head_dim)

        def allocate(count: int, where: torch.device, pin: bool) -> tuple[list[Tensor], ...]:
            def zeros(*size: int, dtype: torch.dtype) -> list[Tensor]:  # pages come when they are written
                return [
                    torch.zeros(count, *size, dtype=dtype, device=where, pin_memory=pin)
                    for _ in range(layout.num_layers)
                ]

            scaled = layout.dtype is torch.int8
            scales = [zeros(*shape[:2], dtype=torch.float32) if scaled else [] for _ in range(2)]
            return zeros(*shape, dtype=layout.dtype), zeros(*shape, dtype=layout.dtype), *scales

        try:
            self.keys, self.values, self.key_scales, self.value_scales = allocate(num_blocks, device, False)
            on_device = device.type == "cuda" and num_host_blocks > 0
            self._host = allocate(num_host_blocks, torch.device("cpu"), on_device)
        except (RuntimeError, MemoryError) as error:  # torch's allocators raise RuntimeError
            wanted = (num_blocks + num_host_blocks) * block_size * layout.token_bytes
            raise CacheError(
                f"KV cache: expected {wanted} bytes of memory on {device} and the host, got {error}; "
                "lower CachePolicy(max_bytes=...), fraction or swap_bytes"
            ) from error

    def _storages(self) -> list[tuple[list[Tensor], list[Tensor]]]:
        device = (self.keys, self.values, self.key_scales, self.value_scales)
        return list(zip(device, self._host, strict=True))

    def copy_blocks(self, pairs: list[tuple[int, int]]) -> None:
        """Copy blocks within the cache, (from, to); no block is both."""
        if pairs:
            for held, _ in self._storages():
                _copy(held, held, pairs)

    def swap_out(self, pairs: list[tuple[int, int]]) -> None:
        """Copy blocks to the host, (device block, host block)."""
        if pairs:
            for held, host in self._storages():
                _copy(held, host, pairs)

    def swap_in(self, pairs: list[tuple[int, int]]) -> None:
        """Copy blocks back, (host block, device block)."""
        if pairs:
            for held, host in self._storages():
                _copy(host, held, pairs)


def _copy(source: list[Tensor], target: list[Tensor], pairs: list[tuple[int, int]]) -> None:
    """The same blocks of every layer; the copies of one pair are independent of the others'."""
    if not source:
        return
    from_ids, to_ids = torch.tensor(pairs, dtype=torch.int64).unbind(1)
    from_ids, to_ids = from_ids.to(source[0].device), to_ids.to(target[0].device)
    for layer_from, layer_to in zip(source, target, strict=True):
        layer_to.index_copy_(0, to_ids, layer_from.index_select(0, from_ids).to(layer_to.device))


def build_cache(
    layout: CacheLayout,
    policy: CachePolicy,
    device: torch.device,
    *,
    activation_bytes: int = 0,
    max_blocks: int | None = None,
    beside: CacheLayout | None = None,
    parallel: TensorParallel | None = None,
) -> KVCache:
    """A cache of the size that `policy` asks for, once the weights are loaded.

    Args:
        layout: of the model.
        policy: `max_bytes`, else `fraction` of what is free.
        device: of the cache.
        activation_bytes: that a forward will need beside it.
        max_blocks: more are never needed.
        beside: of a second cache with as many blocks, for which room is left.
        parallel: ranks that share the model: each gets as many blocks as the one with the least room.

    Raises:
        CacheError: not one block fits, or the memory is not there.
    """
    block_bytes = policy.block_size * (layout.token_bytes + (beside.token_bytes if beside else 0))
    free = free_memory(device)
    budget = (
        int(policy.fraction * max(free - activation_bytes, 0))
        if policy.max_bytes is None
        else policy.max_bytes
    )
    num_blocks = budget // block_bytes
    if max_blocks is not None:
        num_blocks = min(num_blocks, max_blocks)
    if parallel is not None:
        num_blocks = int(parallel.least(num_blocks))
    if num_blocks < 1:
        raise CacheError(
            f"KV cache: expected room for at least one block of {block_bytes} bytes, got {budget} bytes "
            f"({free} free on {device}, {activation_bytes} kept for activations); "
            "raise CachePolicy(max_bytes=...) or fraction, or use a smaller model, int8 weights or an int8 cache"
        )
    return KVCache(layout, num_blocks, policy.block_size, device, policy.swap_bytes // block_bytes)


def free_memory(device: torch.device) -> int:
    """Bytes that can be had on `device` now: on the CPU what the kernel and the control group leave."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info(device)[0])
    return min(_available(Path("/proc/meminfo")), _group_headroom(Path("/sys/fs/cgroup")))


def _available(meminfo: Path) -> int:
    try:
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return _physical_memory()


def _physical_memory() -> int:
    """Where there is no /proc: half of what the machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _group_headroom(root: Path) -> int:
    """What a container's limit leaves (control groups, version 2); without a limit, no bound."""
    try:
        limit, used = (root / "memory.max").read_text().strip(), int((root / "memory.current").read_text())
        if limit == "max":
            return 1 << 62
        lines = (line.split() for line in (root / "memory.stat").read_text().splitlines())
        reclaimable = sum(int(size) for name, size in lines if name == "inactive_file")
    except (OSError, ValueError):
        return 1 << 62
    return max(int(limit) - used + reclaimable, 0)

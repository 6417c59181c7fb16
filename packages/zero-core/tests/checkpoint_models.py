"""Models whose layers take what layers take, and ways to see what a checkpoint keeps."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import zero_core as zero
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WIDTH, ROWS, LAYERS = 24, 6, 3
MATMULS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default)
POLICIES: dict[str, dict[str, Any]] = {
    "recompute": {},
    "save_ops": {"save_ops": MATMULS},
    "host": {"host": True},
    "full host": {"host": True, "host_bytes": 4096},
    "contiguous": {"contiguous_bytes": 1 << 16},
    "contiguous, save_ops": {"contiguous_bytes": 1 << 16, "save_ops": MATMULS},
}


def policy(name: str, **settings: Any) -> zero.CheckpointPolicy:
    return zero.CheckpointPolicy(**whatever_their_size(POLICIES[name] | settings))


def whatever_their_size(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of a policy, with inputs of any size kept where it says, if it says where."""
    return settings | (
        {"min_bytes": 1} if {"host", "contiguous_bytes", "partition"} & settings.keys() else {}
    )


class Layer(nn.Module):
    """An MLP with dropout, a mask by keyword, and a tuple as result, as model libraries write them."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.drop = nn.Dropout(0.3)
        self.down = nn.Linear(2 * width, width)

    def forward(
        self, x: torch.Tensor, mask: torch.Tensor | None = None, *, scale: float = 1.0, also: bool = False
    ) -> tuple[torch.Tensor, ...]:
        h = self.drop(F.gelu(self.up(x)))
        x = x + scale * self.down(h if mask is None else h * mask)
        return (x, h.mean()) if also else (x,)


class Layers(nn.Module):
    """Layers in a row; the mask is one tensor for all of them."""

    def __init__(self, count: int = LAYERS) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(count))

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = layer(x, mask=mask, scale=0.5)[0]
        return x


def gradients(
    model: nn.Module, run: Callable[[], torch.Tensor], *inputs: torch.Tensor, seed: int = 0
) -> list[torch.Tensor]:
    """Gradients of `run`'s sum of squares: of the parameters and of `inputs`; ones where there is none."""
    for tensor in (*model.parameters(), *inputs):
        tensor.grad = None
    torch.manual_seed(seed)
    run().square().sum().backward()
    return [
        torch.ones(()) if tensor.grad is None else tensor.grad.clone()
        for tensor in (*model.parameters(), *inputs)
    ]


def same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    """Whether all are equal, bit for bit, and the comparison is of something."""
    assert any(bool(tensor.abs().sum() > 0) for tensor in expected)
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


class LiveBytes(TorchDispatchMode):
    """Counts ops, and the bytes of storages that they made while it is on and that still live, whoever holds them."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.ops: Counter[Any] = Counter()
        self._seen: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {
            t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)
        }
        self.ops[func] += 1
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket is torch.ops.aten.set_:
            return out  # another name for memory that is there
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in before and storage._cdata not in self._seen:
                    self._seen[storage._cdata] = storage.nbytes()
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._dead, storage._cdata)
        self.peak = max(self.peak, self.now)
        return out

    def _dead(self, address: int) -> None:
        self.now -= self._seen.pop(address)

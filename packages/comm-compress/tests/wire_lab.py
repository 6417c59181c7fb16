"""Bytes that this rank hands to torch.distributed, counted at its own entry points."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

SENDING = ("isend", "send", "broadcast", "all_to_all_single", "all_to_all", "all_reduce", "all_gather",
           "all_gather_into_tensor", "reduce_scatter", "reduce_scatter_tensor", "batch_isend_irecv")  # fmt: skip


@contextmanager
def counted() -> Iterator[list[int]]:
    """The size of every message sent inside, in order."""
    sizes: list[int] = []
    before = {name: getattr(dist, name) for name in SENDING}

    def counting(call: Callable[..., Any]) -> Callable[..., Any]:
        def counted_call(tensor: Any, *args: Any, **kwargs: Any) -> Any:
            sizes.append(tensor.numel() * tensor.element_size())
            return call(tensor, *args, **kwargs)

        return counted_call

    for name, call in before.items():
        setattr(dist, name, counting(call))
    try:
        yield sizes
    finally:
        for name, call in before.items():
            setattr(dist, name, call)

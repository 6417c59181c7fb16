"""Before anything travels: all ranks of a group were told the same.

In: this rank's settings. Out: nothing, or the same error on every rank, which names ranks and values.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
import zero_core as zero

from .errors import CompressConfigError
from .hops import Hop
from .traffic import Entry

_BYTES = 1024
_TAG = 0x636F6D70  # nothing of a model is under way when a group is made


def agree(hop: Hop, what: str, settings: Mapping[str, Any]) -> None:
    """Compare settings; every rank of the hop's group must call it.

    Args:
        hop: the ranks.
        what: for the message.
        settings: plain values, as JSON at most 1 KiB.

    Raises:
        CompressConfigError: a rank was given others than the first one; on every rank.
    """
    if hop.group is None or hop.size == 1:
        return
    text = json.dumps(dict(settings), sort_keys=True).encode().ljust(_BYTES)
    assert len(text) == _BYTES
    has_cpu = torch.device("cpu") in hop.group._device_types
    device = torch.device("cpu") if has_cpu else hop.group._device_types[0]
    own = torch.tensor(list(text), dtype=torch.uint8, device=device)
    heard: list[dict[str, Any]] = []

    def hear(parts: Sequence[torch.Tensor]) -> None:
        heard.extend(json.loads(bytes(part.tolist())) for part in parts)

    hop.gather(own, _TAG, hear, Entry("settings")).wait()
    for rank, told in enumerate(heard):
        differing = [name for name in told if told[name] != heard[0].get(name)]
        if differing or told.keys() != heard[0].keys():
            shown = ", ".join(f"{name}={told[name]!r} (rank 0: {heard[0].get(name)!r})" for name in differing)
            raise CompressConfigError(
                f"{what}: ranks were given different settings: rank {rank} of {hop.size} has {shown or told}; "
                "give all ranks the same"
            )


def take_name(wire: zero.Wire, what: str, settings: str) -> None:
    """Give a wire's messages a name of their own (`Wire.salt`), once all ranks say the same; every rank calls it.

    Args:
        wire: the ranks.
        what: for the message.
        settings: this rank's, as text of any length.

    Raises:
        CompressConfigError: a rank was given others than the first one; on every rank.
    """
    told = wire.broadcast_text(f"name and settings of {what}", f"{secrets.token_hex(4)} {settings}")
    wire.salt, _, first = told.partition(" ")
    differs = torch.tensor([first != settings], dtype=torch.uint8, device=wire.device)
    wire.all_reduce(f"agreement on {what}", differs, dist.ReduceOp.MAX).wait()
    if bool(differs):
        own = f"on rank {wire.group.rank()}: {settings}" if first != settings else "on another rank others"
        raise CompressConfigError(
            f"{what}: expected the same settings on every rank, got on rank 0: {first}; {own}"
        )

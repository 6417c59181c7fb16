"""Before anything travels: all ranks of a group were told the same.

In: this rank's settings. Out: nothing, or the same error on every rank, which names ranks and values.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch

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

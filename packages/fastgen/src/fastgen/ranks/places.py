"""Which rank runs where: its device, its share of the memory and of the cores, and how it meets the others."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist

from ..config import EngineConfig
from ..errors import ConfigError

# For a rank that stands still; one that has ended is noticed at once.
_TIMEOUT = timedelta(minutes=10)


@dataclass(frozen=True, kw_only=True)
class Place:
    """One rank's.

    Attributes:
        rank: 0 to `ranks` - 1.
        ranks: that share the model.
        store: a file through which they meet; no other group may have used it.
        processes: of this machine that run engines.
    """

    rank: int
    ranks: int
    store: str
    processes: int

    def join(self, device: torch.device) -> dist.ProcessGroup:
        """Meet the other ranks; returns their group."""
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            init_method=f"file://{self.store}",
            rank=self.rank,
            world_size=self.ranks,
            timeout=_TIMEOUT,
        )
        if device.type == "cuda":  # NCCL meets at its first collective, when the file may be gone
            dist.all_reduce(torch.zeros(1, device=device))
        group = dist.group.WORLD
        assert group is not None
        return group


def shares(config: EngineConfig, ranks: int, *, processes: int | None = None) -> list[EngineConfig]:
    """The configuration of each rank: with a device of its own, or with its part of the host's memory.

    Args:
        config: of all.
        ranks: that share a model.
        processes: of this machine that run engines; None: these ranks alone.

    Raises:
        ConfigError: there are not so many devices, or one was named for several ranks.
    """
    device = config.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type != "cuda":
        cache = replace(config.cache, fraction=config.cache.fraction / (processes or ranks))
        return [replace(config, device=device, cache=cache)] * ranks
    check_devices(device, ranks)
    return [replace(config, device=torch.device("cuda", rank)) for rank in range(ranks)]


def check_devices(device: torch.device, processes: int) -> None:
    """Refuse more processes than there are GPUs.

    Raises:
        ConfigError: there are fewer, or one was named.
    """
    if device.index is not None:
        raise ConfigError(
            f"device: expected 'cuda' for {processes} processes, which take a GPU each, got {str(device)!r}"
        )
    found = torch.cuda.device_count()
    if found < processes:
        raise ConfigError(
            f"expected a GPU for each of {processes} processes, got {found}; start fewer, or give the device 'cpu'"
        )


def narrow(first: int, count: int) -> None:
    """Let this process see `count` GPUs only, from the `first` of those it sees; before it has used any."""
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    ids = seen.split(",") if seen else [str(number) for number in range(first + count)]
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(ids[first : first + count])


def share_cores(processes: int) -> None:
    """Leave the other processes their cores, unless the user has said how many threads there are to be."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // processes))

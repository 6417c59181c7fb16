"""The papers' equations for all ranks in one process, in plain torch: what the package is held against.

Nothing here imports the package. Every vector is fp32 and whole; `chunks` are the runs that share a scale.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch


def cut(numel: int, world: int) -> list[slice]:
    """`numel` elements in `world` runs of sizes that differ by one, the longer ones first."""
    sizes = [numel // world + (rank < numel % world) for rank in range(world)]
    edges = [sum(sizes[:rank]) for rank in range(world + 1)]
    return [slice(a, b) for a, b in zip(edges, edges[1:], strict=False)]


def signs(c: torch.Tensor, norm: str = "l2") -> torch.Tensor:
    """C(c) = scale sign(c), with sign(0) = 1 (1-bit Adam, section 3.3)."""
    if not c.numel():
        return c.clone()
    wide = c.double()
    scale = wide.norm() / math.sqrt(c.numel()) if norm == "l2" else wide.abs().mean()
    return torch.where(c >= 0, scale.float(), -scale.float())


@dataclass
class TwoPhases:
    """The compressed all-reduce (1-bit Adam, algorithm 1, lines 7 to 13) with every rank's residuals."""

    numel: int
    world: int
    norm: str = "l2"
    workers: list[torch.Tensor] = field(init=False)
    server: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.workers = [torch.zeros(self.numel) for _ in range(self.world)]
        self.server = torch.zeros(self.numel)

    def mean(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """The same approximation of the mean of `parts` for all."""
        arrived = torch.zeros(self.numel)
        for rank, part in enumerate(parts):
            c = part.float() + self.workers[rank]
            sent = self._all_signs(c)
            self.workers[rank] = c - sent
            arrived += sent
        c = arrived * (1.0 / self.world) + self.server
        sent = self._all_signs(c)
        self.server = c - sent
        return sent

    def _all_signs(self, c: torch.Tensor) -> torch.Tensor:
        return torch.cat([signs(c[run], self.norm) for run in cut(self.numel, self.world)])

"""The papers' equations for all ranks in one process, in plain torch: what the package is held against.

Nothing here imports the package. Every vector is fp32 and whole; `chunks` are the runs that share a scale.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field

import torch


def cut(numel: int, world: int) -> list[slice]:
    """`numel` elements in `world` runs of sizes that differ by one, the longer ones first."""
    sizes = [numel // world + (rank < numel % world) for rank in range(world)]
    edges = [sum(sizes[:rank]) for rank in range(world + 1)]
    return [slice(a, b) for a, b in itertools.pairwise(edges)]


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


@dataclass(frozen=True)
class Options:
    """Hyperparameters of the optimizers below; all rates may change from step to step."""

    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0
    decoupled: bool = True
    bias_correction: bool = True
    floor: float = 0.0
    scale_layers: bool = False
    # LAMB
    max_coeff: float = 10.0
    min_coeff: float = 0.01
    coeff_beta: float = 0.9
    factor_max: float = 4.0
    factor_min: float = 0.5
    factor_threshold: float = 0.1

    def corrections(self, step: int) -> tuple[float, float]:
        if not self.bias_correction:
            return 1.0, 1.0
        return 1 - self.betas[0] ** step, 1 - self.betas[1] ** step


@dataclass
class Simulation:
    """All ranks of a run: one fp32 vector, cut into layers, layers into buckets.

    Attributes:
        layers, buckets: slices of the vector.
    """

    x: torch.Tensor
    world: int
    layers: list[slice]
    buckets: list[slice]
    options: Options = field(default_factory=Options)

    def __post_init__(self) -> None:
        self.m = torch.zeros_like(self.x)
        self.v = torch.zeros_like(self.x)
        self.t = 0
        self.wire = [TwoPhases(b.stop - b.start, self.world) for b in self.buckets]
        self.s = torch.ones_like(self.x)
        self.d = torch.zeros_like(self.x)

    def compressed_mean(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """Each bucket through the wire, layers brought to one size before."""
        out = torch.empty_like(self.x)
        for bucket, wire in zip(self.buckets, self.wire, strict=True):
            sent = [part[bucket] * self.s[bucket] for part in parts]
            out[bucket] = wire.mean(sent) / self.s[bucket]
        return out

    def roots(self, updates: int) -> torch.Tensor:
        """Roots of the bias-corrected variance, floored."""
        roots = (self.v / self.options.corrections(updates)[1]).sqrt()
        for layer in self.layers:
            size = roots[layer].square().mean().sqrt()
            floored = roots[layer].clamp(min=float(self.options.floor * size))
            roots[layer] = torch.where(roots[layer] == 0, size, floored)
        return roots

    def scale_layers(self) -> None:
        if not self.options.scale_layers:
            return
        for bucket in self.buckets:
            inside = [layer for layer in self.layers if bucket.start <= layer.start < bucket.stop]
            sizes = [float(self.m[layer].double().square().mean().sqrt()) for layer in inside]
            for layer, size in zip(inside, sizes, strict=True):
                self.s[layer] = sum(sizes) / len(sizes) / size

    def momenta(self, grads: list[torch.Tensor], momenta: list[torch.Tensor], xs: list[torch.Tensor]) -> None:
        """m_i = beta1 m_i + (1 - beta1) g_i, in place."""
        beta1, o = self.options.betas[0], self.options
        for m, g, x in zip(momenta, grads, xs, strict=True):
            m.mul_(beta1).add_(g if o.decoupled else g + o.weight_decay * x, alpha=1 - beta1)


class PaperOneBitAdam(Simulation):
    """1-bit Adam, algorithm 1."""

    def step(self, grads: list[torch.Tensor], lr: float, freeze_step: int) -> None:
        o, (beta1, beta2) = self.options, self.options.betas
        self.t += 1
        if self.t <= freeze_step:
            g = torch.stack(grads).mean(0)
            g = g if o.decoupled else g + o.weight_decay * self.x
            self.m.mul_(beta1).add_(g, alpha=1 - beta1)
            self.v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
            divisor = (self.v / o.corrections(self.t)[1]).sqrt() + o.eps
        else:
            own = [self.m.clone() for _ in grads]
            self.momenta(grads, own, [self.x] * len(grads))
            self.m = self.compressed_mean(own)
            divisor = self.d
        if o.decoupled:
            self.x.mul_(1 - lr * o.weight_decay)
        self.x.sub_(lr / o.corrections(self.t)[0] * self.m / divisor)
        if self.t == freeze_step:
            self.d = self.roots(self.t) + o.eps
            self.scale_layers()


class PaperOneBitLamb(Simulation):
    """1-bit LAMB, algorithm 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.c = [0.0] * len(self.layers)
        self.r = [1.0] * len(self.layers)

    def step(self, grads: list[torch.Tensor], lr: float, freeze_step: int) -> None:
        o, (beta1, beta2) = self.options, self.options.betas
        self.t += 1
        first, second = o.corrections(self.t)
        if self.t <= freeze_step:
            g = torch.stack(grads).mean(0)
            self.m.mul_(beta1).add_(g, alpha=1 - beta1)
            self.v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
            update = self.m / first / ((self.v / second).sqrt() + o.eps) + o.weight_decay * self.x
            for i, layer in enumerate(self.layers):
                values, size = float(self.x[layer].norm()), float(update[layer].norm())
                c = min(max(values / size, o.min_coeff), o.max_coeff) if values > 0 and size > 0 else 1.0
                self.c[i] = o.coeff_beta * self.c[i] + (1 - o.coeff_beta) * c
                self.x[layer] -= lr * c * update[layer]
            if self.t == freeze_step:
                if o.bias_correction:
                    self.c = [c / (1 - o.coeff_beta**self.t) for c in self.c]
                roots = self.roots(self.t)
                self.floors = [float(roots[layer].min()) for layer in self.layers]
                self.v = roots.square() * second
                self.d = roots + o.eps
                self.scale_layers()
            return
        own = [self.m.clone() for _ in grads]
        self.momenta(grads, own, [self.x] * len(grads))
        before, self.m = self.m, self.compressed_mean(own)
        g = (self.m - beta1 * before) / (1 - beta1)
        self.v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        for i, layer in enumerate(self.layers):
            now = (self.v[layer] / second).sqrt().clamp(min=self.floors[i]) + o.eps
            ratio = float((self.d[layer] / now).max())
            low, high = self.r[i] * (1 - o.factor_threshold), self.r[i] * (1 + o.factor_threshold)
            self.r[i] = min(max(min(max(ratio, low), high), o.factor_min), o.factor_max)
            update = self.m[layer] / first / self.d[layer] + o.weight_decay * self.x[layer]
            self.x[layer] -= lr * self.r[i] * self.c[i] * update


class PaperZeroOneAdam(Simulation):
    """0/1 Adam, algorithm 1: `xs` are the ranks' own parameters, `x` what they had in common last."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.xs = [self.x.clone() for _ in range(self.world)]
        self.ms = [self.m.clone() for _ in range(self.world)]
        self.us = [self.m.clone() for _ in range(self.world)]
        self.j, self.mass, self.decay, self.num_syncs = 0, 0.0, 1.0, 0

    def step(self, grads: list[torch.Tensor], lr: float, *, exact: bool, sync: bool) -> None:
        o, beta2 = self.options, self.options.betas[1]
        self.t += 1
        rate = lr / o.corrections(self.t)[0]
        shrink = 1 - lr * o.weight_decay if o.decoupled else 1.0
        if exact:  # T_v; all ranks have the same m and x here
            g = torch.stack(grads).mean(0)
            self.j += 1
            decayed = g if o.decoupled else g + o.weight_decay * self.x
            self.v.mul_(beta2).addcmul_(decayed, decayed, value=1 - beta2)
            self.d = self.roots(self.j) + o.eps
            self.momenta([g], [self.ms[0]], [self.x])
            self.x = self.x * shrink - rate * self.ms[0] / self.d
            self.ms = [self.ms[0].clone() for _ in range(self.world)]
            self.xs = [self.x.clone() for _ in range(self.world)]
            if not self.num_syncs:
                self.m = self.ms[0]
                self.scale_layers()
            return
        self.momenta(grads, self.ms, self.xs)
        self.us = [u * shrink + rate * m for u, m in zip(self.us, self.ms, strict=True)]
        self.mass, self.decay = self.mass * shrink + rate, self.decay * shrink
        if sync:  # T_u
            u = self.compressed_mean(self.us)
            self.num_syncs += 1
            self.x = self.x * self.decay - u / self.d
            self.ms = [u / self.mass for _ in range(self.world)]
            self.us = [torch.zeros_like(u) for _ in range(self.world)]
            self.xs = [self.x.clone() for _ in range(self.world)]
            self.mass, self.decay = 0.0, 1.0
        else:
            self.xs = [self.x * self.decay - u / self.d for u in self.us]

"""ZenFlow's equations over dense tensors in one process, written for tests alone."""

from __future__ import annotations

import math

import torch
from torch import nn


class DenseZenFlow:
    """AdamW under ZenFlow on whole parameters, with `select_strategy="step"`.

    Everything is a masked operation on whole matrices: nothing is compact, nothing is flat, nothing is late but what
    the method says is.
    """

    def __init__(
        self,
        params: dict[str, nn.Parameter],
        *,
        lr,
        ratio,
        every,
        window,
        overlap,
        betas=(0.9, 0.999),
        eps=1e-8,
        decay=0.01,
        late_step="window",
    ) -> None:
        self.params, self.lr, self.ratio, self.every, self.window = params, lr, ratio, every, window
        self.overlap, self.betas, self.eps, self.decay = overlap, betas, eps, decay
        self.late_step = late_step
        self.now, self.late, self.held, self.age = 0, 0, 0, None
        zeros = lambda: {name: torch.zeros_like(p) for name, p in params.items()}  # noqa: E731
        self.m, self.v, self.sum = zeros(), zeros(), zeros()
        self.chosen = {name: torch.full_like(p, p.dim() < 2, dtype=torch.bool) for name, p in params.items()}
        self.coming: dict[str, torch.Tensor] = {}
        self.num_changed = 0

    @torch.no_grad()
    def step(self, grads: dict[str, torch.Tensor]) -> None:
        if self.held == 0 and (self.age is None or self.age >= self.every):
            self._land()
            for name, grad in grads.items():
                if grad.dim() > 1:
                    self._choose(name, grad)
            self.age = 0
        self.now += 1
        self.age += 1
        for name, grad in grads.items():
            value, m, v = self._adam(name, grad, self.now)
            for kept, new in ((self.params[name], value), (self.m[name], m), (self.v[name], v)):
                kept.copy_(torch.where(self.chosen[name], new, kept))
            self.sum[name] += grad
        self.held += 1
        if self.held == self.window:
            self._land()
            ahead = self.held if self.late_step == "window" else 1  # how many steps this one stands for
            self.late += ahead
            for name in grads:
                value, m, v = self._adam(name, self.sum[name] / self.held, self.late, ahead)
                self.m[name] = torch.where(self.chosen[name], self.m[name], m)
                self.v[name] = torch.where(self.chosen[name], self.v[name], v)
                self.coming[name] = value
                self.sum[name].zero_()
            if not self.overlap:
                self._land()
            self.held = 0

    def _land(self) -> None:
        for name, value in self.coming.items():
            self.params[name].copy_(torch.where(self.chosen[name], self.params[name], value))
        self.coming = {}

    def _choose(self, name: str, grad: torch.Tensor) -> None:
        norms = grad.flatten(1).square().sum(1)
        count = math.ceil(self.ratio * len(norms) - 1e-9)
        rows = torch.zeros(len(norms), dtype=torch.bool)
        rows[norms.topk(count).indices] = True
        after = rows.view(-1, *[1] * (grad.dim() - 1)).expand_as(grad)
        before = self.chosen[name]
        self.num_changed += int((before != after).sum())
        for moment, beta in ((self.m[name], self.betas[0]), (self.v[name], self.betas[1])):
            if self.late:
                ahead = (1 - beta**self.now) / (1 - beta**self.late)
                moment.copy_(torch.where(after & ~before, moment * ahead, moment))
                moment.copy_(torch.where(before & ~after, moment / ahead, moment))
        self.chosen[name] = after.clone()

    def _adam(self, name: str, grad: torch.Tensor, count: int, ahead: int = 1):
        beta1, beta2 = self.betas
        m = beta1**ahead * self.m[name] + (1 - beta1**ahead) * grad
        v = beta2**ahead * self.v[name] + (1 - beta2**ahead) * grad**2
        unit = (m / (1 - beta1**count)) / ((v / (1 - beta2**count)).sqrt() + self.eps)
        shrunk = self.params[name] * (1 - ahead * self.lr * self.decay)
        return shrunk - ahead**0.75 * self.lr * unit, m, v

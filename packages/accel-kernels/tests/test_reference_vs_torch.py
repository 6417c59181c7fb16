"""The reference means what torch.optim does, over several steps, in 1e-6 relative."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import accel_kernels as ak
import pytest
import torch

STEPS = 6
N = 257


def follow(make_torch: Callable[[torch.Tensor], torch.optim.Optimizer], step: Callable[..., None]) -> None:
    """Run torch's optimizer and ours side by side on the same gradients."""
    generator = torch.Generator().manual_seed(1)
    theirs = torch.nn.Parameter(torch.randn(N, generator=generator))
    start = theirs.detach().clone()
    ours = theirs.detach().clone()
    optimizer = make_torch(theirs)
    for k in range(1, STEPS + 1):
        grad = torch.randn(N, generator=generator)
        theirs.grad = grad.clone()
        optimizer.step()
        step(ours, grad, k)
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-6, atol=1e-7)
    assert (theirs - start).abs().max() > 1e-3  # they did move


@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.4, 0.5), (0.0, 0.0)])
@pytest.mark.parametrize("fused", [True, False])
def test_adam(decoupled: bool, weight_decay: float, betas: tuple[float, float], fused: bool) -> None:
    kind: Any = torch.optim.AdamW if decoupled else torch.optim.Adam
    m, v = torch.zeros(N), torch.zeros(N)

    def step(param: torch.Tensor, grad: torch.Tensor, k: int) -> None:
        segment = ak.AdamSegment(
            start=0,
            stop=N,
            lr=0.01,
            beta1=betas[0],
            beta2=betas[1],
            weight_decay=weight_decay,
            step=k,
            decoupled=decoupled,
        )
        ak.reference.adam_step(param, grad, m, v, [segment])

    follow(lambda p: kind([p], lr=0.01, betas=betas, weight_decay=weight_decay, fused=fused), step)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("lr_decay", [0.0, 0.3])
def test_adagrad(weight_decay: float, lr_decay: float) -> None:
    total = torch.zeros(N)

    def step(param: torch.Tensor, grad: torch.Tensor, k: int) -> None:
        segment = ak.AdagradSegment(
            start=0, stop=N, lr=0.05, lr_decay=lr_decay, weight_decay=weight_decay, step=k
        )
        ak.reference.adagrad_step(param, grad, total, [segment])

    follow(lambda p: torch.optim.Adagrad([p], lr=0.05, lr_decay=lr_decay, weight_decay=weight_decay), step)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize(
    ("momentum", "dampening", "nesterov"),
    [(0.0, 0.0, False), (0.9, 0.0, False), (0.9, 0.3, False), (0.9, 0.0, True)],
)
def test_sgd(weight_decay: float, momentum: float, dampening: float, nesterov: bool) -> None:
    options = {
        "momentum": momentum,
        "dampening": dampening,
        "weight_decay": weight_decay,
        "nesterov": nesterov,
    }
    buffer = torch.full((N,), float("nan")) if momentum else None  # the first step must not look at it

    def step(param: torch.Tensor, grad: torch.Tensor, k: int) -> None:
        segment = ak.SgdSegment(start=0, stop=N, lr=0.05, first_step=k == 1, **options)  # type: ignore[arg-type]
        ak.reference.sgd_step(param, grad, buffer, [segment])

    follow(lambda p: torch.optim.SGD([p], lr=0.05, **options), step)  # type: ignore[arg-type]


def test_lion_follows_the_paper() -> None:
    """Program 1 of arXiv:2302.06675, in fp64."""
    generator = torch.Generator().manual_seed(2)
    ours = torch.randn(N, generator=generator)
    p, m64, m = ours.double(), torch.zeros(N, dtype=torch.float64), torch.zeros(N)
    lr, beta1, beta2, decay = 0.01, 0.9, 0.99, 0.1
    for _ in range(STEPS):
        grad = torch.randn(N, generator=generator)
        update = torch.sign(beta1 * m64 + (1 - beta1) * grad.double())
        m64 = beta2 * m64 + (1 - beta2) * grad.double()
        p = p - lr * (update + decay * p)
        ak.reference.lion_step(ours, grad, m, [ak.LionSegment(start=0, stop=N, lr=lr, weight_decay=decay)])
    torch.testing.assert_close(ours.double(), p, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(m.double(), m64, rtol=1e-6, atol=1e-7)


def test_grad_scale_is_a_multiplied_gradient() -> None:
    generator = torch.Generator().manual_seed(3)
    grad = torch.randn(N, generator=generator)
    segments = [ak.AdamSegment(start=0, stop=N, lr=0.01, step=1)]
    outcomes = []
    for scale, given in ((0.25, grad), (1.0, grad * 0.25), (torch.tensor(0.25), grad)):
        tensors = [torch.ones(N), torch.zeros(N), torch.zeros(N)]
        ak.adam_step(tensors[0], given, tensors[1], tensors[2], segments, grad_scale=scale)
        outcomes.append(tensors)
    for other in outcomes[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outcomes[0], other, strict=True))

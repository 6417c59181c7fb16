"""Shared by this package's tests: random problems for each optimizer, and ways to run them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import accel_kernels as ak
import pytest
import torch

HALVES = (torch.bfloat16, torch.float16)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().view(torch.int16 if tensor.element_size() == 2 else torch.int32)


@dataclass
class Problem:
    """Tensors of one optimizer call; ``run`` works on copies and returns them."""

    optimizer: str
    param: torch.Tensor
    grad: torch.Tensor
    states: list[torch.Tensor]
    low: torch.Tensor | None
    segments: list[Any]
    grad_scale: float = 1.0
    offset: int = 0  # elements cut off the front: makes addresses unaligned

    def run(
        self, backend: str | None = None, isa: str | None = None, device: str = "cpu"
    ) -> list[torch.Tensor]:
        def fresh(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.clone().to(device)[self.offset :]

        step: Callable[..., None] = getattr(ak, f"{self.optimizer}_step")
        param, grad = fresh(self.param), fresh(self.grad)
        states = [fresh(state) for state in self.states]
        low = None if self.low is None else fresh(self.low)
        given = states if self.states or self.optimizer != "sgd" else [None]
        with ak.set_cpu_isa(isa) if isa else contextlib.nullcontext():
            step(
                param,
                grad,
                *given,
                self.segments,
                grad_scale=self.grad_scale,
                low_precision=low,
                backend=backend,
            )
        return [tensor.cpu() for tensor in (param, grad, *states, *([] if low is None else [low]))]


def make_segments(optimizer: str, spans: list[tuple[int, int]]) -> list[Any]:
    """Segments with hyper-parameters that vary from one to the next, all variants among them."""
    made: list[Any] = []
    for k, (start, stop) in enumerate(spans):
        decay = 0.1 * (k % 3)
        if optimizer == "adam":
            made.append(
                ak.AdamSegment(
                    start=start,
                    stop=stop,
                    lr=1e-3 * k,
                    weight_decay=decay,
                    step=1 + 7 * k,
                    decoupled=k % 2 == 0,
                )
            )
        elif optimizer == "lion":
            made.append(ak.LionSegment(start=start, stop=stop, lr=1e-3 * k, weight_decay=decay))
        elif optimizer == "adagrad":
            made.append(
                ak.AdagradSegment(
                    start=start, stop=stop, lr=1e-2 * k, lr_decay=0.01, weight_decay=decay, step=1 + k
                )
            )
        else:
            made.append(
                ak.SgdSegment(
                    start=start,
                    stop=stop,
                    lr=1e-2 * k,
                    momentum=0.9 * (k % 4 > 0),
                    dampening=0.1 * (k % 4 == 1),
                    weight_decay=decay,
                    nesterov=k % 4 == 2,
                    first_step=k % 4 == 3,
                )
            )
    return made


NUM_STATES = {"adam": 2, "lion": 1, "adagrad": 1, "sgd": 1}


def make_problem(
    optimizer: str,
    numel: int,
    *,
    spans: list[tuple[int, int]] | None = None,
    grad_dtype: torch.dtype = torch.float32,
    low_dtype: torch.dtype | None = None,
    offset: int = 0,
    grad_scale: float = 1.0,
    seed: int = 0,
) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    n = numel + offset
    return Problem(
        optimizer,
        torch.randn(n, generator=generator),
        torch.randn(n, generator=generator).to(grad_dtype),
        [torch.rand(n, generator=generator) for _ in range(NUM_STATES[optimizer])],
        None if low_dtype is None else torch.full((n,), -7.0, dtype=low_dtype),
        make_segments(optimizer, [(0, 0), (0, numel)] if spans is None else spans),
        grad_scale,
        offset,
    )


@pytest.fixture(scope="session")
def problem() -> Callable[..., Problem]:
    return make_problem


@pytest.fixture(scope="session")
def assert_same_bits() -> Callable[[list[torch.Tensor], list[torch.Tensor]], None]:
    def check(got: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
        assert len(got) == len(expected)
        for k, (one, other) in enumerate(zip(got, expected, strict=True)):
            assert one.dtype == other.dtype
            different = bits(one) != bits(other)
            assert not different.any(), f"tensor {k}: {int(different.sum())} of {one.numel()} elements differ"

    return check


def runners() -> list[tuple[str, str | None]]:
    """Every way to run a training op on the CPU here, apart from the reference.

    Their kernels for AVX-512 are also those beside AMX, which only inference knows.
    """
    isas = [isa for isa in ak.available_cpu_isas() if isa != "amx"]
    return [*(("cpu", isa) for isa in isas), ("portable", None)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "runner" in metafunc.fixturenames:
        ways = runners()
        metafunc.parametrize("runner", ways, ids=[isa or backend for backend, isa in ways])


@pytest.fixture
def run_threads() -> Any:
    """``with run_threads(n):`` torch, and so the kernels, use n threads."""

    @contextlib.contextmanager
    def use(n: int) -> Any:
        before = torch.get_num_threads()
        torch.set_num_threads(n)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    return use

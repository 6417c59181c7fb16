"""The kernels leave the GIL to others, survive a fork, and can be called from several threads at once."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import accel_kernels as ak
import pytest
import torch

pytestmark = pytest.mark.skipif(not ak.available_cpu_isas(), reason="the C++ back end is not built")


def step(numel: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    param, grad, m, v = (torch.rand(numel, generator=generator) for _ in range(4))
    for k in range(1, 4):
        ak.adam_step(param, grad, m, v, [ak.AdamSegment(start=0, stop=numel, lr=0.1, step=k)])
    return param


def test_gil_is_released() -> None:
    """While a long call runs, another Python thread gets ahead."""
    src, dst = torch.rand(60_000_000), torch.empty(60_000_000, dtype=torch.float16)
    running = threading.Event()
    ticks = 0

    def count() -> None:
        nonlocal ticks
        while running.is_set():
            ticks += 1
            time.sleep(0.0005)

    running.set()
    counter = threading.Thread(target=count)
    counter.start()
    time.sleep(0.01)
    before = ticks
    with ak.set_cpu_isa("baseline"):
        ak.cast_copy(src, dst, stochastic=True, seed=0)  # a tenth of a second and more
    during = ticks - before
    running.clear()
    counter.join()
    assert during > 10


def test_concurrent_callers() -> None:
    expected = step(200_000)
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(result, expected) for result in pool.map(lambda _: step(200_000), range(8)))


def test_isa_choice_is_per_thread() -> None:
    with ak.set_cpu_isa("baseline"), ThreadPoolExecutor(1) as pool:
        best = ak.available_cpu_isas()[0]
        assert "baseline" in ak.report()["linear"]["cpu"].why
        assert f"{best}," in pool.submit(lambda: ak.report()["linear"]["cpu"].why).result()


def _child(queue: Any) -> None:
    torch.set_num_threads(1)  # like data loaders: a forked child must not enter its parent's thread pool
    queue.put(float(step(200_000).double().sum()))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_forked_child() -> None:
    expected = float(step(200_000).double().sum())  # the parent's pool exists now
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_child, args=(queue,))
    child.start()
    try:
        assert queue.get(timeout=60) == expected
    finally:
        child.join(timeout=10)
        child.kill()

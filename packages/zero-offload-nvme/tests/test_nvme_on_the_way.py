"""What is still on its way to a drive: copied from memory where that will do, and in nobody else's way where not."""

from __future__ import annotations

import threading
from pathlib import Path

import accel_kernels as ak
import pytest
import torch
from zero_offload_nvme import NvmeStore

PATIENCE_S = 20.0


class _Held:
    """A transfer that ends when it may."""

    def __init__(self, inner: ak.Transfer, may_end: threading.Event) -> None:
        self._inner, self._may_end = inner, may_end
        self.nbytes = inner.nbytes

    def wait(self) -> None:
        assert self._may_end.wait(PATIENCE_S), "waited for a write that is held back"
        self._inner.wait()

    @property
    def memory(self):
        return self._inner.memory

    def is_done(self) -> bool:
        return self._may_end.is_set() and self._inner.is_done()


class HoldingEngine(ak.TransferEngine):
    """Writes seem to be on their way until `may_end`."""

    def __init__(self) -> None:
        super().__init__()
        self.may_end = threading.Event()

    def write(self, file, offset, data):
        return _Held(super().write(file, offset, data), self.may_end)


@pytest.fixture
def engine():
    made = HoldingEngine()
    yield made
    made.may_end.set()
    made.close()


@pytest.fixture
def store(engine: HoldingEngine, tmp_path: Path):
    made = NvmeStore(tmp_path, engine=engine)
    yield made
    engine.may_end.set()
    made.close()


@pytest.mark.parametrize(("start", "stop"), [(0, 100), (0, 40), (17, 100), (50, 51)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_copied_from_memory(store: NvmeStore, start: int, stop: int, dtype: torch.dtype) -> None:
    values = torch.randn(100)
    store.put("a", values)
    out = torch.empty(stop - start, dtype=dtype)
    store.fetch("a", out, start).wait()
    assert torch.equal(out, values[start:stop].to(dtype))


def test_memory_that_was_used_again_is_not_believed(store: NvmeStore, engine: HoldingEngine) -> None:
    values = torch.randn(100)
    kept = values.clone()
    transfer = store.put("a", values)
    engine.may_end.set()
    transfer.wait()
    values.zero_()  # ours again
    out = torch.empty(100)
    store.fetch("a", out).wait()
    assert torch.equal(out, kept)


def test_who_waits_is_in_nobodys_way(store: NvmeStore, engine: HoldingEngine) -> None:
    store.reserve("a", 100, torch.float32)
    first, other = torch.randn(60), torch.randn(100)
    store.put("a", first)
    out = torch.full((100,), -1.0)
    reader = threading.Thread(target=lambda: store.fetch("a", out).wait())
    reader.start()
    store.put("b", other)  # would wait for the reader if that waited inside the store
    mine = torch.empty(100)
    store.fetch("b", mine).wait()
    assert torch.equal(mine, other)
    assert reader.is_alive()
    engine.may_end.set()
    reader.join(PATIENCE_S)
    assert torch.equal(out, torch.cat([first, torch.zeros(40)]))

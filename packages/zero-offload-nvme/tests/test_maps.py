"""Maps and pinned memory: no descriptor for each, nothing left behind, undone in the right order."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from zero_offload_nvme import HostStore, NvmeStore, OffloadMemoryError, maps


def num_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_views_of_a_drive_take_no_descriptors(tmp_path: Path) -> None:
    with NvmeStore(tmp_path) as store:
        before = num_descriptors()
        views = []
        for number in range(200):
            store.put(f"t{number}", torch.full((5000,), float(number))).wait()
            views.append(store.view(f"t{number}"))
        assert num_descriptors() == before
        views[7][:10] = -1.0
        out = torch.empty(5000)
        store.fetch("t7", out).wait()
        assert out[:11].tolist() == [-1.0] * 10 + [7.0]
    assert all(float(view[20]) == number for number, view in enumerate(views))  # they outlive the store


def test_a_store_that_is_dropped_gives_the_drive_back(tmp_path: Path) -> None:
    def free() -> int:
        at = os.statvfs(tmp_path)
        return at.f_bfree * at.f_frsize

    gc.collect()
    before, free_before = num_descriptors(), free()
    store = NvmeStore(tmp_path)
    store.reserve("large", 64 << 20, torch.uint8)
    view = store.view("large")
    assert free_before - free() > 32 << 20
    del store
    gc.collect()
    assert num_descriptors() == before
    view[:3] = torch.tensor([1, 2, 3], dtype=torch.uint8)
    assert view[:4].tolist() == [1, 2, 3, 0]
    del view
    gc.collect()
    assert free_before - free() < 32 << 20


class FakeRuntime:
    """CUDA's runtime, as far as pinned memory goes."""

    def __init__(self, code: int = 0) -> None:
        self.code = code
        self.locked: dict[int, int] = {}
        self.log: list[str] = []

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        self.log.append("lock")
        if not self.code:
            self.locked[address] = nbytes
        return self.code

    def cudaHostUnregister(self, address: int) -> int:
        torch.frombuffer((maps.ctypes.c_char * 1).from_address(address), dtype=torch.uint8)[0]  # still mapped
        self.locked.pop(address)
        self.log.append("unlock")
        return 0


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> FakeRuntime:
    fake = FakeRuntime()
    monkeypatch.setattr(
        torch,
        "cuda",
        SimpleNamespace(
            is_available=lambda: True,
            current_device=lambda: 3,
            cudart=lambda: fake,
            synchronize=lambda device: fake.log.append(f"sync {device}"),
        ),
    )
    return fake


def test_pinned_to_the_byte_and_unlocked_before_it_is_unmapped(runtime: FakeRuntime) -> None:
    tensor = maps.pinned_empty(1_000_003, torch.float32)
    assert runtime.locked == {tensor.data_ptr(): 4_000_012}
    tensor.fill_(2.0)
    part = tensor[5:10]
    del tensor
    assert len(runtime.locked) == 1
    assert part.tolist() == [2.0] * 5
    del part
    assert runtime.log == ["lock", "sync 3", "unlock"]


def test_memory_that_cannot_be_pinned_is_an_error_of_the_store(runtime: FakeRuntime) -> None:
    runtime.code = 2
    with HostStore(pin=True) as store, pytest.raises(OffloadMemoryError, match="cannot be pinned"):
        store.reserve("a", 100, torch.float32)
    assert "unlock" not in runtime.log
    runtime.code = 0
    store = HostStore(pin=True)
    store.reserve("a", 100, torch.float32)
    assert sum(runtime.locked.values()) == store.used_bytes == 400
    store.release("a")
    store.reserve("b", 100, torch.float32)  # the same memory
    assert runtime.log.count("lock") == 2
    store.close()
    del store
    gc.collect()
    assert not runtime.locked

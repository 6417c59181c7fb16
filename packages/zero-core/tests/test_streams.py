"""What goes on beside compute comes after what was queued before it, and compute after it when that is waited for."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import pytest
import torch
from zero_core import streams
from zero_core.streams import Beside

CPU = torch.device("cpu")
DEVICE = torch.device("cuda", 0)


class FakeDevice:
    """Notes what each stream is given, and what each waits for."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.compute = FakeStream(self, "compute")
        self._now = self.compute

    def Stream(self, device: torch.device) -> FakeStream:  # as in torch
        return FakeStream(self, "side")

    def current_stream(self, device: torch.device) -> FakeStream:
        return self._now

    @contextmanager
    def stream(self, stream: FakeStream) -> Any:
        self._now = stream
        try:
            yield
        finally:
            self._now = self.compute

    def work(self, what: str) -> None:
        self.said.append(f"{self._now.name}: {what}")


class FakeStream:
    def __init__(self, device: FakeDevice, name: str) -> None:
        self.device, self.name = device, name

    def wait_stream(self, other: FakeStream) -> None:
        self.device.said.append(f"{self.name} after {other.name}")

    def record_event(self) -> str:
        self.device.said.append(f"{self.name}: event")
        return f"event of {self.name}"

    def wait_event(self, event: str) -> None:
        self.device.said.append(f"{self.name} after {event}")


@pytest.fixture
def device(monkeypatch) -> FakeDevice:
    made = FakeDevice()
    monkeypatch.setattr(streams.torch, "get_device_module", lambda device: made)
    return made


def test_compute_waits_when_the_handle_does(device) -> None:
    beside = Beside()
    for number in range(2):
        device.work(f"layer {number}")
        with beside.compute(DEVICE) as queued:
            device.work(f"copy {number}")
        device.work(f"layer {number} goes on")
        queued.wait()
    assert device.said == [
        line
        for number in range(2)
        for line in (
            f"compute: layer {number}",
            "side after compute",
            f"side: copy {number}",
            "side: event",
            f"compute: layer {number} goes on",
            "compute after event of side",
        )
    ]


def test_compute_comes_after_what_failed(device) -> None:
    def fail() -> None:
        device.work("half a copy")
        raise OSError("drive")

    with pytest.raises(OSError, match="drive"), Beside().compute(DEVICE):
        fail()
    device.work("something else, in the same memory")
    assert device.said[-2:] == ["compute after side", "compute: something else, in the same memory"]


def test_on_the_processor_work_is_done_at_once() -> None:
    with Beside().compute(CPU) as queued:
        total = torch.ones(3).sum()
    queued.wait()
    assert total == 3

"""A store whose engine has the settings that were measured on its drive."""

from __future__ import annotations

from dataclasses import replace

import accel_kernels as ak
import pytest
import torch
from zero_offload_nvme import NvmeStore, OffloadConfigError, OffloadDiskError


def test_what_was_measured_is_used(tmp_path, monkeypatch) -> None:
    asked: list[tuple[str, float]] = []
    found = replace(ak.tune(tmp_path, seconds=0.1), block_bytes=64 << 10, queue_depth=3)

    def tune(folder: str, *, seconds: float) -> ak.TransferSettings:
        asked.append((folder, seconds))
        return found

    monkeypatch.setattr(ak, "tune", tune)
    with NvmeStore(tmp_path, tune_s=1.5) as store:
        assert (store.engine.block_bytes, store.engine.queue_depth) == (64 << 10, 3)
    assert asked == [(str(tmp_path), 1.5)]


def test_it_keeps_tensors_and_leaves_no_file(tmp_path) -> None:
    with NvmeStore(tmp_path / "new", tune_s=0.2) as store:
        store.put("a", torch.arange(1000.0))
        out = torch.empty(1000)
        store.fetch("a", out).wait()
        assert torch.equal(out, torch.arange(1000.0))
    assert [each.name for each in tmp_path.rglob("*")] == ["new"]


def test_what_cannot_be_tuned(tmp_path) -> None:
    with ak.TransferEngine() as engine, pytest.raises(OffloadConfigError, match="leave one of the two out"):
        NvmeStore(tmp_path, engine=engine, tune_s=0.2)
    (tmp_path / "file").touch()
    with pytest.raises(OffloadDiskError, match="choose a directory"):
        NvmeStore(tmp_path / "file" / "in it", tune_s=0.2)

"""Whatever is put, fetched, prefetched, forgotten, written through a view, released: a store is a dict of tensors."""

from __future__ import annotations

import os
import shutil
import tempfile

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test
from zero_offload_nvme import NvmeStore

FOLDERS = {"direct": os.environ.get("TMPDIR", "/var/tmp"), "tmpfs": "/dev/shm"}
NAMES = st.sampled_from("abc")
SIZES = st.sampled_from([0, 1, 7, 1023, 1024, 4097, 70_000])
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.uint8])


class Store(RuleBasedStateMachine):
    """The store beside a dict; views are kept and must go on agreeing."""

    parent = ""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.mkdtemp(dir=self.parent)
        self.store = NvmeStore(self.folder, cache_bytes=200_000)
        self.model: dict[str, torch.Tensor] = {}
        self.views: dict[str, torch.Tensor] = {}
        self.count = 0

    def teardown(self) -> None:
        for name, values in self.model.items():
            assert torch.equal(self.store.view(name), values)
        self.store.close()
        shutil.rmtree(self.folder)

    def fresh(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        self.count += 1
        return ((torch.arange(numel) * 7 + self.count * 13) % 251).to(dtype)

    @rule(name=NAMES, numel=SIZES, dtype=DTYPES)
    def put(self, name: str, numel: int, dtype: torch.dtype) -> None:
        if name in self.model:
            numel, dtype = self.model[name].numel(), self.model[name].dtype
        values = self.fresh(numel, dtype)
        self.store.put(name, values)
        self.model[name] = values.clone()

    @rule(name=NAMES, numel=SIZES, dtype=DTYPES)
    def reserve(self, name: str, numel: int, dtype: torch.dtype) -> None:
        if name not in self.model:
            self.store.reserve(name, numel, dtype)
            self.model[name] = torch.zeros(numel, dtype=dtype)

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def put_range(self, data: st.DataObject) -> None:
        name, start, stop = self.part(data)
        values = self.fresh(stop - start, self.model[name].dtype)
        self.store.put(name, values, start)
        self.model[name][start:stop] = values

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def fetch_range(self, data: st.DataObject) -> None:
        name, start, stop = self.part(data)
        out = torch.empty(stop - start, dtype=self.model[name].dtype)
        self.store.fetch(name, out, start).wait()
        assert torch.equal(out, self.model[name][start:stop])

    @precondition(lambda self: self.model)
    @rule(data=st.data(), how=st.sampled_from(["prefetch", "forget", "fetch", "view"]))
    def whole(self, data: st.DataObject, how: str) -> None:
        name = data.draw(st.sampled_from(sorted(self.model)))
        if how in ("prefetch", "forget"):
            getattr(self.store, how)(name)
        elif how == "fetch":
            out = torch.empty_like(self.model[name])
            self.store.fetch(name, out).wait()
            assert torch.equal(out, self.model[name])
        else:
            self.views[name] = self.store.view(name)
            assert torch.equal(self.views[name], self.model[name])

    @precondition(lambda self: self.views)
    @rule(data=st.data())
    def write_to_view(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.views)))
        self.store.forget(name)
        self.store.flush()  # a view shows what has arrived
        values = self.fresh(self.model[name].numel(), self.model[name].dtype)
        self.views[name].copy_(values)
        self.model[name] = values

    @precondition(lambda self: self.views)
    @rule(data=st.data())
    def read_view(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.views)))
        self.store.flush()
        assert torch.equal(self.views[name], self.model[name])

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.model)))
        self.store.release(name)
        self.model.pop(name)
        self.views.pop(name, None)

    def part(self, data: st.DataObject) -> tuple[str, int, int]:
        name = data.draw(st.sampled_from(sorted(self.model)))
        ends = [data.draw(st.integers(0, self.model[name].numel())) for _ in range(2)]
        return name, min(ends), max(ends)


@pytest.mark.parametrize("where", FOLDERS)
def test_is_a_dict_of_tensors(where: str) -> None:
    if not os.path.isdir(FOLDERS[where]):
        pytest.skip(f"no {FOLDERS[where]} here")
    machine = type("Store", (Store,), {"parent": FOLDERS[where]})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=40, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )

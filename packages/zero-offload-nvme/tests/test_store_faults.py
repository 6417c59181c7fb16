"""Drives fill up, fail and vanish: an error that says where, nothing that hangs, nothing half new in silence."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import accel_kernels as ak
import pytest
import torch
import zero_core as zero
from store_faults import MIB, FaultyEngine, mounted, remount
from stored_models import Net, batch, build, loss_of, stores, train
from torch.distributed.device_mesh import init_device_mesh
from zero_core.testing import run_ranks
from zero_offload_nvme import (
    HostStore,
    NvmeStore,
    OffloadDiskError,
    OffloadedOptimizer,
    OffloadError,
    OffloadMemoryError,
    OffloadStateError,
)
from zero_offload_nvme.maps import host_zeros

saves = pytest.mark.skipif(find_spec("ckpt_universal") is None, reason="ckpt-universal is not installed")

# -- stores alone ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("act", ["put", "reserve"])
def test_a_full_disk_names_bytes_wanted_and_free_and_changes_nothing(tmp_path, act: str) -> None:
    with mounted(tmp_path / "disk", 2 * MIB) as folder, NvmeStore(folder) as store:
        kept = torch.rand(MIB // 4)
        store.put("kept", kept).wait()
        large = torch.rand(MIB // 2)
        with pytest.raises(
            OffloadDiskError, match=rf"'large' needs {2 * MIB} bytes, and {MIB} are free"
        ) as caught:
            store.put("large", large) if act == "put" else store.reserve("large", large.numel(), large.dtype)
        assert caught.value.errno == errno.ENOSPC
        assert str(folder) in str(caught.value)
        assert store.used_bytes == MIB
        assert os.statvfs(folder).f_bavail * 4096 == MIB, "what was set aside has been given back"
        store.put("small", kept).wait()  # what fits still does
        out = torch.empty_like(kept)
        store.fetch("kept", out).wait()
        assert torch.equal(out, kept)


def test_the_next_drive_takes_what_one_has_no_room_for(tmp_path) -> None:
    with (
        mounted(tmp_path / "small", MIB) as small,
        NvmeStore([small, tmp_path / "large"]) as store,
    ):
        values = torch.rand(MIB)
        store.put("values", values).wait()
        assert torch.equal(store.view("values"), values)


def test_a_path_that_cannot_be_written(tmp_path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    for path in (file, file / "below"):
        with pytest.raises(OffloadDiskError, match=re.escape(str(path)) + ".*choose a directory"):
            NvmeStore(path)
    assert os.listdir(tmp_path) == ["file"]
    with mounted(tmp_path / "disk", MIB) as folder:
        remount(folder, "ro")
        with pytest.raises(OffloadDiskError, match="Read-only file system; choose a directory") as caught:
            NvmeStore(folder)
        assert caught.value.errno == errno.EROFS


def test_a_file_system_that_fills_up_meanwhile_keeps_what_was_set_aside(tmp_path) -> None:
    with mounted(tmp_path / "disk", 4 * MIB) as folder, NvmeStore(folder) as store:
        store.reserve("room", MIB // 4, torch.float32)
        (folder / "other").write_bytes(bytes(3 * MIB))
        assert os.statvfs(folder).f_bavail == 0
        values = torch.rand(MIB // 4)
        store.put("room", values).wait()
        assert torch.equal(store.view("room"), values)
        with pytest.raises(OffloadDiskError, match="and 0 are free"):
            store.put("more", values)


def test_limits(tmp_path) -> None:
    with NvmeStore(tmp_path, limit_bytes=8192) as store:
        store.put("a", torch.ones(1024)).wait()
        with pytest.raises(
            OffloadDiskError, match="'b' needs 8192 bytes in one piece, and of 8192 bytes 4096"
        ):
            store.put("b", torch.ones(2048))
        store.release("a")
        store.put("b", torch.ones(2048)).wait()
    with HostStore(limit_bytes=8192) as host:
        host.put("a", torch.ones(1024))
        with pytest.raises(OffloadMemoryError, match=r"'b' needs 8192 bytes.*4096 of 8192 are free"):
            host.put("b", torch.ones(2048))
        host.release("a")
        host.put("b", torch.ones(2048))
        assert not any(host._free.values()), "memory of other sizes counts too"
    with pytest.raises(
        OffloadMemoryError, match=rf"'everything': the system gives no {1 << 60} bytes .* and \d+ are free"
    ):
        HostStore().reserve("everything", 1 << 60, torch.uint8)
    with pytest.raises(OffloadMemoryError, match=rf"the system gives no {1 << 60} bytes"):
        host_zeros(1 << 58, torch.float32, pin=False)


def test_a_drive_is_used_again_and_never_past_its_limit(tmp_path) -> None:
    pages = 16
    with NvmeStore(tmp_path, limit_bytes=pages * 4096) as store:
        drive = store._files._drives[0]

        def put(name: str, size: int) -> None:
            store.put(name, torch.full((size * 1024,), float(size))).wait()

        for size in range(1, pages + 1):  # of growing sizes, none of which fits where one was before
            put("a", size)
            assert drive.end <= pages * 4096
            store.release("a")
        for name in "abcd":
            put(name, 4)
        store.release("b")
        store.release("d")
        with pytest.raises(
            OffloadDiskError, match="'e' needs 24576 bytes in one piece, and of 65536 bytes 32768 are free"
        ):
            put("e", 6)  # there are two pieces of 4
        store.release("c")
        put("e", 9)  # three that lie beside each other are one
        put("f", 3)
        for name, size in (("a", 4), ("e", 9), ("f", 3)):
            assert torch.equal(store.view(name), torch.full((size * 1024,), float(size)))
        assert store.used_bytes == drive.end == os.fstat(drive.descriptor).st_size == pages * 4096


@pytest.mark.parametrize("make", [lambda path: HostStore(), NvmeStore])
def test_closed_stores_and_wrong_ranges(tmp_path, make) -> None:
    store = make(tmp_path)
    store.put("a", torch.arange(5.0)).wait()
    seen = store.view("a")
    for wrong in (lambda: store.put("a", torch.ones(2), 4), lambda: store.put("a", torch.ones(2).half())):
        with pytest.raises(OffloadStateError, match=r"'a' has 5 elements of torch\.float32; got 2"):
            wrong()
    with pytest.raises(OffloadStateError, match="nothing is kept under 'b'"):
        store.put("b", torch.ones(2), 1)
    with pytest.raises(OffloadStateError, match="'a' is there already"):
        store.reserve("a", 5, torch.float32)
    store.close()
    store.close()
    assert seen.tolist() == [0, 1, 2, 3, 4], "views outlive the store"
    for call in (
        lambda: store.put("a", torch.ones(5)),
        lambda: store.fetch("a", torch.ones(5)),
        lambda: store.reserve("b", 5, torch.float32),
        lambda: store.view("a"),
    ):
        with pytest.raises(OffloadStateError, match="is closed"):
            call()
    store.release("a")
    store.forget("a")


def test_a_write_that_failed_is_told_until_its_range_is_written_anew(tmp_path) -> None:
    engine = FaultyEngine()
    with NvmeStore(tmp_path, engine=engine) as store:
        old, new, out = torch.zeros(4096), torch.ones(4096), torch.empty(4096)
        store.put("a", old).wait()
        engine.arm("write")
        going = store.put("a", new)  # nobody waits for it
        while not going.is_done():  # until then its memory is as good as the drive
            time.sleep(1e-3)
        for _ in range(2):
            with pytest.raises(ak.TransferError, match=r"write 16384 bytes at offset 0: Input/output"):
                store.fetch("a", out).wait()
            with pytest.raises(ak.TransferError):
                store.view("a")
        with pytest.raises(ak.TransferError):
            store.put("a", new[:1])  # does not replace all of it
        store.put("a", new).wait()
        store.fetch("a", out).wait()
        assert torch.equal(out, new)
        assert engine.hits == 1
    engine.close()


def test_a_read_that_failed(tmp_path) -> None:
    engine = FaultyEngine()
    with NvmeStore(tmp_path, engine=engine) as store:
        values, out = torch.rand(4096), torch.empty(4096)
        store.put("a", values).wait()
        engine.arm("read")
        store.prefetch("a")
        store.forget("a")  # nobody wanted it
        engine.arm("read")
        store.prefetch("a")
        with pytest.raises(ak.TransferError, match="read 16384 bytes at offset 0"):
            store.fetch("a", out).wait()
        store.fetch("a", out).wait()
        assert torch.equal(out, values)
    engine.close()


def test_later_writes_of_a_range_win(tmp_path) -> None:
    with NvmeStore(tmp_path) as store:
        values = [torch.full((MIB,), float(number)) for number in range(8)]
        for each in values:
            store.put("a", each)  # the engine would end them in any order
        out = torch.empty(MIB)
        store.fetch("a", out).wait()
        assert torch.equal(out, values[-1])


# -- a step ---------------------------------------------------------------------------------------------------


def _snapshot(model, opt):
    state = {name: shard.local.clone() for name, shard in zero.sharded_state(model, opt).items()}
    return state, zero.optimizer_scalars(opt)


def full_at_step(rank: int, folder: str) -> None:
    """No room for the moments: nothing has moved, and the step can be had later."""
    with NvmeStore(folder) as store:
        model, opt = build(zero.Stores(optimizer=store), 3, world=1)
        loss_of(model, batch(0, rank)).backward()
        before = _snapshot(model, opt)
        ballast = Path(folder, "ballast")
        free = os.statvfs(folder).f_bavail * 4096
        ballast.write_bytes(bytes(free - 3 * 4096))
        with pytest.raises(OffloadDiskError, match=r"needs \d+ bytes, and \d+ are free"):
            opt.step()
        after = _snapshot(model, opt)
        assert after[1] == before[1]
        assert before[0].keys() == after[0].keys()
        assert all(torch.equal(after[0][name], before[0][name]) for name in before[0])
        ballast.unlink()
        opt.step()
        got = zero.full_state_dict(model)
    model, opt = build(None, 3, world=1)
    loss_of(model, batch(0, rank)).backward()
    opt.step()
    expected = zero.full_state_dict(model)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_a_disk_that_is_full_at_the_first_step_changes_nothing(tmp_path) -> None:
    with mounted(tmp_path / "disk", 8 * MIB) as folder:
        run_ranks(full_at_step, 1, str(folder))


def full_at_shard(rank: int, folder: str) -> str:
    overlap = zero.Overlap(timeout_s=5)
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("dp",))
    store = NvmeStore(folder, limit_bytes=16384 if rank == 0 else None)
    try:
        model = zero.shard(Net(), mesh, stage=3, store=store, overlap=overlap)
        loss_of(model, batch(0, rank)).backward()
    except (OffloadError, zero.CollectiveError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing happened"


def test_a_rank_without_room_ends_the_others_in_bounded_time(tmp_path) -> None:
    began = time.monotonic()
    first, second = run_ranks(full_at_shard, 2, str(tmp_path), timeout_s=60, tolerate=(0, 1))
    assert first.startswith("OffloadDiskError")
    assert second.startswith("CollectiveError")
    assert time.monotonic() - began < 45


def fails_in_step(rank: int, folder: str, path: str, what: str) -> str:
    """An error of one rank's drive in its step."""
    import ckpt_universal as ckpt

    engine = FaultyEngine()
    model, opt = build(NvmeStore(folder, engine=engine), 3, torch.bfloat16)
    train(model, opt, 0, range(2), clip=None)
    ckpt.save(path, _tree(model, opt), step=2)
    loss_of(model, batch(2, 0)).backward()
    if rank == 0:
        engine.arm(what, 9)
    try:
        opt.step()
    except ak.TransferError as error:
        return str(error)
    return "nothing happened"


@saves
@pytest.mark.parametrize("what", ["read", "write"])
def test_an_error_of_the_drive_in_a_step_and_on_from_the_checkpoint(tmp_path, what: str) -> None:
    saved = str(tmp_path / "saved")
    messages = run_ranks(fails_in_step, 2, str(tmp_path), saved, what)
    assert re.match(rf"{tmp_path}/\S+: {what} \d+ bytes at offset \d+: Input/output error", messages[0])
    assert messages[1] == "nothing happened"
    got = run_ranks(resume_run, 2, 2, "nvme", str(tmp_path), saved)[0]
    expected = run_ranks(whole_run, 2, 2)[0]
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def fails_and_dies(rank: int, folder: str, what: str) -> tuple[str, float]:
    overlap = zero.Overlap(timeout_s=5)
    engine = FaultyEngine()
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("dp",))
    model = zero.shard(Net(), mesh, stage=3, store=NvmeStore(folder, engine=engine), overlap=overlap)
    opt = OffloadedOptimizer(model, torch.optim.AdamW(model.parameters(), lr=1e-2), window_bytes=1 << 16)
    train(model, opt, rank, range(1))
    loss_of(model, batch(1, rank)).backward()
    if rank == 0:
        engine.arm(what, 5)
    began = time.monotonic()
    try:
        opt.step()
        train(model, opt, rank, range(2, 4))
    except ak.TransferError:
        os._exit(3)
    except zero.CollectiveError as error:
        return str(error), time.monotonic() - began
    return "nothing happened", 0.0


@pytest.mark.parametrize("what", ["read", "write"])
def test_a_rank_that_ends_with_its_drive_ends_the_others(tmp_path, what: str) -> None:
    results = run_ranks(fails_and_dies, 2, str(tmp_path), what, timeout_s=90, tolerate=(0, 1))
    assert "exit code 3" in results[0]
    message, seconds = results[1]
    assert "rank 1 of 2" in message
    assert seconds < 30


# -- processes ------------------------------------------------------------------------------------------------

RUN = """
import sys, torch, zero_core as zero
sys.path[:0] = {paths!r}
import torch.distributed as dist
from stored_models import build, train
from zero_offload_nvme import NvmeStore
folder, steps = sys.argv[1], int(sys.argv[2])
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
model, opt = build(NvmeStore(folder), 3, world=1)
print("ready", flush=True)
for step in range(steps):
    train(model, opt, 0, range(step, step + 1))
print(sum(float(v.double().abs().sum()) for v in zero.full_state_dict(model).values()), flush=True)
"""


def _start(folder: Path, steps: int) -> subprocess.Popen[str]:
    code = textwrap.dedent(RUN).format(paths=[str(Path(__file__).parent)])
    command = [sys.executable, "-c", code, str(folder), str(steps)]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environ)


def test_killed_in_a_step_leaves_no_file_and_the_next_run_works(tmp_path) -> None:
    one, other = _start(tmp_path, 10**6), _start(tmp_path, 3)  # two runs share the folder
    assert one.stdout is not None
    assert one.stdout.readline() == "ready\n"
    shared = other.communicate(timeout=60)[0].split()[1]
    assert one.poll() is None
    one.send_signal(signal.SIGKILL)
    one.wait()
    assert os.listdir(tmp_path) == []
    alone = _start(tmp_path, 3).communicate(timeout=60)[0].split()[1]
    assert shared == alone
    assert os.listdir(tmp_path) == []


# -- checkpoints ----------------------------------------------------------------------------------------------


def _tree(model, opt):
    return {"state": zero.sharded_state(model, opt), "scalars": zero.optimizer_scalars(opt)}


def save_run(rank: int, kind: str, folder: str, path: str) -> None:
    import ckpt_universal as ckpt

    model, opt = build(stores(kind, "all", 3, folder), 3, torch.bfloat16, world=2)
    train(
        model, opt, 0, range(2), clip=None
    )  # all ranks the same batches: any number of them has the same mean
    ckpt.save(path, _tree(model, opt), step=2)


def resume_run(rank: int, world: int, kind: str, folder: str, path: str):
    import ckpt_universal as ckpt

    model, opt = build(stores(kind, "all", 3, folder), 3, torch.bfloat16, world=world)
    described = zero.sharded_state(model, None)
    found = ckpt.describe(path)
    wanted = {}
    for name, (shape, dtype) in found.tensors.items():
        name = name.removeprefix("state.")
        own = described.get(name) or described.get(name.removeprefix("optimizer.").rpartition(".")[0])
        if own is None:  # other ranks have all of it
            continue
        wanted[name] = zero.Shard(shape, dtype, own.offsets, torch.empty(own.local.numel(), dtype=dtype))
    ckpt.load(found.path, into={"state": wanted}, strict=False, only="state*")
    zero.load_sharded_state(model, opt, {name: shard.local for name, shard in wanted.items()}, strict=False)
    zero.load_optimizer_scalars(opt, found.values["scalars"])
    train(model, opt, 0, range(2, 4), clip=None)
    return zero.full_state_dict(model)


def whole_run(rank: int, world: int):
    model, opt = build(None, 3, torch.bfloat16, world=world)
    train(model, opt, 0, range(4), clip=None)
    return zero.full_state_dict(model)


@saves
@pytest.mark.parametrize(
    ("before", "after"), [("nvme", "nvme"), ("nvme", "host"), ("host", "nvme"), ("none", "nvme")]
)
def test_a_checkpoint_of_states_in_a_store_goes_on_anywhere(tmp_path, before: str, after: str) -> None:
    run_ranks(save_run, 2, before, str(tmp_path), str(tmp_path / "saved"))
    got = run_ranks(resume_run, 1, 1, after, str(tmp_path), str(tmp_path / "saved"))[0]
    expected = run_ranks(whole_run, 1, 1)[0]
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_several_threads_use_one_store(tmp_path) -> None:
    with NvmeStore(tmp_path, cache_bytes=1 << 16) as store:

        def work(number: int) -> None:
            name, rng = f"t{number}", torch.Generator().manual_seed(number)
            for _ in range(40):
                values = torch.randn(3000, generator=rng)
                store.put(name, values.clone())
                store.prefetch(name)
                out = torch.empty(3000)
                store.fetch(name, out).wait()
                assert torch.equal(out, values)
                assert torch.equal(store.view(name), values)

        with ThreadPoolExecutor(4) as threads:
            list(threads.map(work, range(4)))

"""What is planned is what is held; what does not fit is refused before anything is there; what is forecast adds up."""

from __future__ import annotations

import dataclasses

import accel_kernels as ak
import pytest
import torch
import zero_core as zero
import zero_offload_nvme as off
from hypothesis import given
from hypothesis import strategies as st
from stored_models import Net, batch, loss_of
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from zero_core.testing import run_ranks
from zero_offload_nvme.free_bytes import address_space_free, drive_free, host_free
from zero_offload_nvme.speeds import both_speed, measure_speeds
from zero_offload_nvme.tiers import KINDS, TIERS

SPEEDS = off.Speeds(memory=20, drive_read=2, drive_write=4, link=10)
tiers_of = st.sampled_from(TIERS)
DTYPES = [torch.float32, torch.bfloat16]


def planned(n, **options):
    options = {"stage": 3, "world": 2, "measure": False, "device": "cpu", "free": off.Free()} | options
    return off.preflight(n, **options)


# -- pure -----------------------------------------------------------------------------------------------------


@given(
    n=st.integers(1, 10**12),
    world=st.integers(1, 64),
    stage=st.integers(0, 3),
    kind=st.sampled_from(["adam", "adamw", "adagrad", "sgd", "sgd-momentum"]),
    compute=st.sampled_from([*DTYPES, torch.float16]),
)
def test_on_the_device_alone_it_is_zero_cores_plan(n, world, stage, kind, compute) -> None:
    precision = zero.Precision(compute=compute)
    plan = planned(n, stage=stage, world=world, optimizer_kind=kind, precision=precision).plan
    known = zero.plan_memory(n, stage=stage, world=world, optimizer=kind, precision=precision)
    held = plan.nbytes["device"]
    assert {kind: held[kind] for kind in KINDS[:5]} == {kind: getattr(known, kind) for kind in KINDS[:5]}
    assert plan.total("host") == plan.total("nvme") == 0
    assert plan.host_bytes == known.total


@given(
    n=st.integers(10**6, 10**12),
    world=st.integers(1, 64),
    params=tiers_of,
    grads=tiers_of,
    optimizer=tiers_of,
    ratio=st.floats(0, 1),
    compute=st.sampled_from(DTYPES),
)
def test_tiers_move_bytes_and_lose_none(n, world, params, grads, optimizer, ratio, compute) -> None:
    options = {"stage": 3, "world": world, "precision": zero.Precision(compute=compute)}
    here = planned(n, **options).plan
    part = {} if optimizer == "device" else {"optimizer_ratio": ratio}
    there = planned(n, params=params, grads=grads, optimizer=optimizer, **part, **options).plan
    for kind in ("params", "grads", "master", "optimizer"):
        sums = [sum(plan.nbytes[tier][kind] for tier in TIERS) for plan in (here, there)]
        assert abs(sums[1] - sums[0]) <= 4 * 4096, kind
    moved = there.traffic
    assert moved.drive_read >= 0
    if (params, grads, optimizer, ratio) == ("nvme", "nvme", "nvme", 1.0):
        per_element = {torch.float32: (16, 12), torch.bfloat16: (14, 14)}[compute]
        share = -(-n // world)
        assert (moved.drive_read, moved.drive_written) == (per_element[0] * share, per_element[1] * share)
        assert moved.memory == 28 * share
    if "nvme" not in (params, grads, optimizer):
        assert moved.drive_read == moved.drive_written == moved.params_read == there.total("nvme") == 0


@given(
    drive=st.floats(0.1, 10), memory=st.floats(1, 200), ranks=st.integers(1, 8), accumulate=st.integers(1, 8)
)
def test_a_forecast_adds_up(drive, memory, ranks, accumulate) -> None:
    plan = planned(10**9, world=8, params="nvme", grads="nvme", optimizer="nvme").plan
    speeds = off.Speeds(memory=memory, drive_read=drive, drive_write=drive)
    found = off.forecast(plan, speeds, ranks=ranks, accumulate=accumulate, compute_s=1.0)
    alone = [found.drive_s, found.memory_s]
    assert max(alone) <= found.optimizer_s <= sum(alone) + 1e-9
    assert found.step_s >= accumulate * 1.0 + found.optimizer_s - 1e-9
    faster = off.forecast(plan, dataclasses.replace(speeds, drive_read=2 * drive), ranks=ranks)
    assert faster.drive_s < found.drive_s
    more = off.forecast(plan, speeds, ranks=ranks + 1)
    assert more.drive_s > found.drive_s
    assert found.step_s is not None
    assert more.step_s is None


@given(both=st.floats(0.1, 10))
def test_a_drive_that_reads_and_writes_at_once_has_a_speed_of_its_own(both) -> None:
    plan = planned(10**9, world=8, params="nvme", grads="nvme", optimizer="nvme").plan
    read, written = plan.traffic.drive_read, plan.traffic.drive_written
    found = off.forecast(plan, dataclasses.replace(SPEEDS, drive_both=both), ranks=2)
    expected = 2 * (2 * written / both + (read - written) / SPEEDS.drive_read) / 1e9
    assert found.drive_s == pytest.approx(expected)
    both = 2 / (1 / SPEEDS.drive_read + 1 / SPEEDS.drive_write)  # that of one after the other
    found = off.forecast(plan, dataclasses.replace(SPEEDS, drive_both=both), ranks=2)
    assert found.drive_s == pytest.approx(off.forecast(plan, SPEEDS, ranks=2).drive_s)


def test_both_directions_are_measured(tmp_path) -> None:
    assert 0.001 < both_speed(str(tmp_path), 2, 0.1) < 1000
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(off.OffloadDiskError, match="cannot be measured"):
        both_speed(str(tmp_path / "nowhere"), 2, 0.1)


def test_a_step_in_one_direction_asks_for_no_speed_of_both(tmp_path) -> None:
    traffic = off.Traffic(drive_read=1 << 20, blocks=1)
    found = measure_speeds([str(tmp_path)], ranks=1, device="cpu", numel=1, traffic=traffic, seconds=0.1)
    assert found.drive_both is None
    assert found.drive_read > 0


def test_a_link_is_used_where_the_device_is_not_the_host() -> None:
    plan = planned(10**9, optimizer="host", device="cuda").plan
    assert plan.traffic.link == (2 + 2) * 10**9 // 2  # a gradient down, a value up
    assert plan.host_bytes == plan.total("host") < plan.total("device") * 10
    assert off.forecast(plan, SPEEDS, ranks=2).link_s == pytest.approx(4e9 / 10e9)
    with pytest.raises(off.OffloadConfigError, match="a speed that was not measured"):
        off.forecast(plan, off.Speeds(memory=1), ranks=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"params": "disk"}, "params: expected one of device, host, nvme, got 'disk'"),
        ({"stage": 2, "params": "nvme"}, "at stage 2 every rank holds all of them"),
        ({"optimizer": "host", "optimizer_kind": "adam-amsgrad"}, "optimizer: expected one of adam, adamw"),
        ({"optimizer_ratio": 2}, "expected 0 to 1"),
        ({"params": "nvme", "optimizer_ratio": 0.5}, "optimizer is None"),
        ({"ranks": 3}, "ranks: expected 1 to 2"),
        ({"window_bytes": -1}, "window_bytes: expected bytes"),
        ({"accumulate": 0, "speeds": SPEEDS}, "expected ranks and accumulate of 1 or more"),
        ({"optimizer": "nvme", "measure": True}, "path: expected the folder of an NvmeStore"),
    ],
)
def test_bad_arguments(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        planned(10**6, **options)


# -- what is free ---------------------------------------------------------------------------------------------


def test_host_memory_is_what_a_cgroup_leaves(tmp_path) -> None:
    proc, cgroups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:    8000 kB\n")
    assert host_free(proc, cgroups) == 8_192_000
    # Version 2: a limit of a group above counts; files that can be dropped do not count as used.
    (proc / "self" / "cgroup").write_text("0::/job/step\n")
    (cgroups / "job" / "step").mkdir(parents=True)
    (cgroups / "job" / "step" / "memory.max").write_text("max\n")
    (cgroups / "job" / "step" / "memory.current").write_text("10\n")
    (cgroups / "job" / "memory.max").write_text("1000000\n")
    (cgroups / "job" / "memory.current").write_text("400000\n")
    (cgroups / "job" / "memory.stat").write_text("anon 1\ninactive_file 50000\n")
    assert host_free(proc, cgroups) == 650_000
    # Version 1 of a container: the path is the host's, the root is the container's.
    (proc / "self" / "cgroup").write_text("4:memory:/docker/1234\n3:cpuset:/x\n0::/\n")
    (cgroups / "memory").mkdir()
    (cgroups / "memory" / "memory.limit_in_bytes").write_text("500000\n")
    (cgroups / "memory" / "memory.usage_in_bytes").write_text("600000\n")
    (cgroups / "memory" / "memory.stat").write_text("inactive_file 9\ntotal_inactive_file 150000\n")
    assert host_free(proc, cgroups) == 50_000
    assert host_free(tmp_path / "nothing", cgroups) is None


def under_a_limit(rank: int) -> None:
    import resource

    assert address_space_free() is None
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(open("/proc/self/statm").read().split()[0]) * 4096  # noqa: SIM115
    resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), hard))
    try:
        free = address_space_free()
        assert free is not None
        assert 0 < free <= 64 << 20
        found = off.preflight(10**8, stage=3, world=2, optimizer="nvme", measure=False, device="cpu")
        with pytest.raises(
            off.OffloadMemoryError, match=r"address space: 1 rank\(s\) need \d+ bytes, and \d+ are"
        ):
            found.check()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def test_address_space_is_what_a_limit_leaves() -> None:
    run_ranks(under_a_limit, 1)


def test_one_drive_counts_once(tmp_path) -> None:
    one = drive_free([str(tmp_path)])
    assert one > 0
    both = drive_free([str(tmp_path), str(tmp_path / "not" / "there")])
    assert abs(both - one) < one / 2
    assert not (tmp_path / "not").exists()


# -- refusals -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("free", "error", "message"),
    [
        (
            off.Free(host=10**6),
            off.OffloadMemoryError,
            r"host memory: 2 rank\(s\) need \d+ bytes, and 1000000 are",
        ),
        (
            off.Free(drive=10**6),
            off.OffloadDiskError,
            r"/nvme.*2 rank\(s\) need \d+ bytes on the drive, and 1000000",
        ),
        (
            off.Free(address_space=10**6),
            off.OffloadMemoryError,
            "address space: 1 rank.*and 1000000 are free",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_measured(tmp_path, free, error, message) -> None:
    tiers = {"params": "nvme", "grads": "host", "optimizer": "nvme"}
    path = tmp_path / "nvme"
    with pytest.raises(error, match=message):
        off.preflight(10**7, stage=3, world=2, path=path, free=free, strict=True, **tiers)
    assert list(tmp_path.iterdir()) == []


def test_a_tensor_lies_on_one_drive(tmp_path) -> None:
    model, tiers = nn.Sequential(*[nn.Linear(500, 500) for _ in range(3)]), {"optimizer": "nvme"}
    plan = off.preflight(model, stage=3, world=1, path=tmp_path, free=off.Free(), measure=False, **tiers).plan
    needed, largest = plan.total("nvme"), plan.largest_on_drive
    assert largest == -(-4 * 250_500 // 4096) * 4096
    assert needed == 6 * largest

    def check(free: int, num_drives: int) -> None:
        found = off.Free(drive=free, num_drives=num_drives)
        off.preflight(model, stage=3, world=1, path=tmp_path, free=found, measure=False, strict=True, **tiers)

    check(needed, 1)
    check(needed + 2 * largest, 3)
    with pytest.raises(
        off.OffloadDiskError, match=rf"need {needed} bytes in pieces of up to {largest} on the drive"
    ):
        check(needed + 2 * largest - 1, 3)
    # As the store itself has it: two drives with room for two and a half each, and nothing fits a sixth time.
    with pytest.raises(off.OffloadDiskError):
        check(5 * largest, 2)


def test_the_settings_that_were_measured_make_a_store(tmp_path) -> None:
    speeds = measure_speeds([str(tmp_path)], ranks=1, device="cpu", numel=1, seconds=0.1)
    assert speeds.settings is not None
    engine = ak.TransferEngine(**speeds.settings.arguments())
    with engine, off.NvmeStore(tmp_path, engine=engine) as store:
        store.put("a", torch.arange(1000.0))
        store.flush()
        out = torch.empty(1000)
        store.fetch("a", out).wait()
        assert torch.equal(out, torch.arange(1000.0))
    plan = planned(10**6, optimizer="nvme", path=tmp_path).plan
    found = off.Preflight(
        plan=plan, ranks=2, free=off.Free(), speeds=speeds, forecast=off.forecast(plan, speeds, ranks=2)
    )
    assert f"drive at its best with {speeds.settings.engine}, blocks of" in str(found)


def test_ranks_of_one_machine_share(tmp_path) -> None:
    options = {
        "stage": 3,
        "world": 4,
        "optimizer": "host",
        "device": "cuda",
        "measure": False,
        "strict": True,
    }
    need = planned(10**8, world=4, optimizer="host", device="cuda").plan.host_bytes
    off.preflight(10**8, ranks=2, free=off.Free(host=2 * need), **options)
    with pytest.raises(off.OffloadMemoryError, match="4 rank"):
        off.preflight(10**8, free=off.Free(host=2 * need), **options)
    with pytest.raises(off.OffloadMemoryError, match="device memory"):
        off.preflight(10**8, free=off.Free(device=10**6), **options)
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(off.OffloadDiskError, match="is not a folder"):
        off.preflight(10**8, stage=3, world=2, path=file, params="nvme", measure=False)


def test_reads_as_a_table(tmp_path) -> None:
    text = str(
        off.preflight(
            7e9, stage=3, world=8, path=tmp_path, params="nvme", grads="host", optimizer="nvme", device="cuda",
            speeds=SPEEDS, compute_s=2.0, free=off.Free(host=64 * 10**9, device=24 * 10**9),
        )
    )  # fmt: skip
    lines = {line.split()[0]: line for line in text.splitlines()}
    assert "params" in lines["per"]
    assert lines["nvme"].split()[-1] == "?"
    assert "98 GB" in lines["nvme"]
    assert lines["host"].endswith("64 GB")
    assert {"speeds:", "optimizer", "whole", "drive"} <= set(lines)


# -- beside what a run holds ----------------------------------------------------------------------------------

CASES = [
    (stage, tiers, ratio, dtype)
    for dtype in DTYPES
    for stage, tiers, ratio in (
        (1, ("device", "device", "nvme"), 1.0),
        (2, ("device", "nvme", "host"), 1.0),
        (3, ("nvme", "nvme", "nvme"), 1.0),
        (3, ("host", "nvme", "nvme"), 1.0),
        (3, ("nvme", "device", "host"), 0.5),
        (3, ("device", "host", "nvme"), 0.3),
    )
]


def held(rank: int, folder: str):
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("dp",))
    found = []
    for stage, tiers, ratio, dtype in CASES:
        with off.HostStore() as host, off.NvmeStore(folder) as nvme:
            by_name = {"device": None, "host": host, "nvme": nvme}
            kinds = dict(
                zip(("params", "grads", "optimizer"), (by_name[tier] for tier in tiers), strict=True)
            )
            model = zero.shard(
                Net(), mesh, stage=stage, precision=zero.Precision(compute=dtype),
                store=zero.Stores(**kinds, optimizer_ratio=ratio),
            )  # fmt: skip
            opt = off.OffloadedOptimizer(model, torch.optim.AdamW(model.parameters()))
            loss_of(model, batch(0, rank)).backward()
            opt.step()
            found.append((host.used_bytes, nvme.used_bytes))
    return found


def test_stores_hold_what_was_planned_to_the_byte(tmp_path) -> None:
    for ranks in run_ranks(held, 2, str(tmp_path)):
        for (stage, tiers, ratio, dtype), bytes_held in zip(CASES, ranks, strict=True):
            kinds = dict(zip(("params", "grads", "optimizer"), tiers, strict=True))
            precision = zero.Precision(compute=dtype)
            with torch.device("meta"):
                plan = planned(Net(), stage=stage, optimizer_ratio=ratio, precision=precision, **kinds).plan
            beside = ("window", "in_flight")
            host = sum(nbytes for kind, nbytes in plan.nbytes["host"].items() if kind not in beside)
            assert (host, plan.total("nvme")) == bytes_held, (stage, tiers, ratio, dtype)


def memory(rank: int, folder: str):
    """Bytes of the window's buffers; the most that was held of gradients on their way to a drive."""
    mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("dp",))
    with off.NvmeStore(folder) as store:
        net = torch.nn.Sequential(*[torch.nn.Linear(64, 64) for _ in range(3)])
        model = zero.shard(net, mesh, stage=3, store=zero.Stores(params=store), units=[torch.nn.Linear])
        opt = off.OffloadedOptimizer(model, torch.optim.AdamW(model.parameters()), window_bytes=1 << 16)
        model(torch.ones(2, 64)).sum().backward()
        opt.step()
        window = opt._in_thread.exact._window
        return sum(buffer.nbytes for room in window._rooms for buffer in room._buffers.values())


def test_parameters_that_rest_alone_pass_through_a_window_too(tmp_path) -> None:
    (made,) = run_ranks(memory, 1, str(tmp_path))
    with torch.device("meta"):
        net = torch.nn.Sequential(*[torch.nn.Linear(64, 64) for _ in range(3)])
    tiers = off.Tiers(params="nvme", window_bytes=1 << 16)
    plan = off.plan_tiers(net, stage=3, world=1, tiers=tiers, units=[torch.nn.Linear])
    assert 0 < made <= plan.nbytes["host"]["window"]


def test_gradients_on_their_way_and_what_waits_under_zenflow_are_counted() -> None:
    def host(**options):
        tiers = off.Tiers(params="nvme", **options)
        return off.plan_tiers(1e6, stage=3, world=1, tiers=tiers).nbytes["host"]["in_flight"]

    rests = host(optimizer="host")
    pages = -(-2_000_000 // 4096) * 4096  # of bf16 gradients
    assert host(optimizer="host", grads="nvme") - rests == pages
    assert host(optimizer="host", grads="nvme", cache_bytes=1 << 20) == 2 << 20
    assert host(optimizer="host", zenflow=off.ZenFlow(overlap_step=False)) - rests == 4e6
    assert host(optimizer="host", zenflow=off.ZenFlow()) - rests == 10e6
    with pytest.raises(off.OffloadConfigError, match="speculative, zenflow: a step has one overlap"):
        off.Tiers(speculative=True, zenflow=off.ZenFlow())

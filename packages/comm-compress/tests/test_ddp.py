"""Hooks for torch's DDP: the mean of gradients, as the equations have it, on every rank alike."""

from __future__ import annotations

import os
import time

import comm_compress as cc
import pytest
import torch
import torch.distributed as dist
from comm_compress.topology import Grid
from comm_compress.traffic import Stopwatch
from comm_compress.wire import BlockFormat
from compress_lab import batch, build, loss_of, simulated_reduce, through
from torch.nn.parallel import DistributedDataParallel
from zero_core.testing import run_ranks

STEPS = 4


def grads_of(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([param.grad.flatten() for param in model.parameters()])


def buckets(
    rank: int, world: int, kind: str, node_size: int | None, dtype: torch.dtype, megabytes: float
) -> int:
    """What DDP hands to the hook, and what comes back: exactly what the codec makes of the ranks' buckets."""
    ddp = DistributedDataParallel(build().to(dtype), bucket_cap_mb=megabytes)
    hook, seen = cc.ddp_hook(kind, node_size=node_size, min_bytes=0), []

    def spy(state: object, bucket):
        given = bucket.buffer().clone()
        future = hook(state, bucket)
        seen.append((given, future.then(lambda done: done.value().clone())))
        return future

    ddp.register_comm_hook(None, spy)
    for step in range(2):
        ddp.zero_grad()
        loss_of(ddp, batch(rank, step)).backward()
    form, grid = BlockFormat({"int8": 8, "int4": 4}[kind]), Grid(world, node_size or 1)
    for given, future in seen:
        told = [torch.empty_like(given, dtype=torch.float32) for _ in range(world)]
        dist.all_gather(told, given.float())
        part = -(-given.numel() // world)
        padded = [torch.nn.functional.pad(each.to(dtype), (0, part * world - given.numel())) for each in told]
        expected = padded[0]
        if world > 1:
            means = [mean.to(dtype) for mean in simulated_reduce(padded, grid, form)]
            expected = torch.cat([through(mean, form, dtype) for mean in means])
        found, expected = future.value().float(), expected[: given.numel()].float()
        assert float((found - expected).abs().max()) <= 1e-6 * float(expected.abs().max())
        dist.all_gather(told, found)
        assert all(torch.equal(each, told[0]) for each in told), "ranks differ"
    return len(seen)


@pytest.mark.parametrize(
    ("world", "node_size", "kind", "dtype"),
    [
        (1, None, "int8", torch.float32),
        (2, None, "int8", torch.float32),
        (2, None, "int4", torch.bfloat16),
        (3, None, "int4", torch.float32),
        (4, 2, "int8", torch.float32),
    ],
)
def test_buckets_are_what_the_equations_say(world: int, node_size: int | None, kind: str, dtype) -> None:
    for megabytes in (100, 0.01):
        for num_buckets in run_ranks(buckets, world, world, kind, node_size, dtype, megabytes):
            assert num_buckets == 2 if megabytes == 100 else num_buckets > 2


def losses(rank: int, world: int, kinds: tuple[str, ...]) -> dict[str, tuple[float, bool, float, str]]:
    """Train with each hook: the last loss of a fixed batch, whether ranks agree, how much less was sent."""
    found = {}
    for kind in kinds:
        model = build()
        for block in model.blocks:  # PowerSGD knows no scalars
            block.scale = torch.nn.Parameter(torch.ones(1))
        ddp = DistributedDataParallel(model, bucket_cap_mb=0.01)
        hook = None
        if kind == "powersgd":
            hook = cc.ddp_hook("powersgd", matrix_approximation_rank=2, start_powerSGD_iter=2)
        elif kind == "int4 loco":
            hook = cc.ddp_hook("int4", loco=cc.LoCoPolicy(), min_bytes=0)
        elif kind in ("int8", "int4"):
            hook = cc.ddp_hook(kind, min_bytes=0)
        elif kind != "none":
            hook = cc.ddp_hook(kind)
        if hook is not None:
            ddp.register_comm_hook(None, hook)
        opt = torch.optim.SGD(ddp.parameters(), lr=0.2)
        for step in range(12):
            loss_of(ddp, batch(rank, step % 3)).backward()
            opt.step()
            opt.zero_grad()
        flat = torch.cat([param.detach().flatten() for param in ddp.parameters()])
        told = [torch.empty_like(flat) for _ in range(world)]
        dist.all_gather(told, flat)
        with torch.no_grad():
            last = float(loss_of(ddp.module, batch(0, 0)))
        total = None if hook is None else cc.traffic(hook).total
        codec = 0.0 if total is None else total.codec_s
        found[kind] = last, all(torch.equal(each, told[0]) for each in told), total and total.ratio, codec
    return found


def test_training_with_each_hook() -> None:
    kinds = ("none", "int8", "int4", "int4 loco", "1bit", "fp16", "bf16", "powersgd")
    for found in run_ranks(losses, 2, 2, kinds):
        plain = found["none"][0]
        for kind, (last, agree, ratio, codec_s) in found.items():
            assert agree, kind
            if kind == "none":
                continue
            assert last == pytest.approx(
                plain, rel={"1bit": 0.5, "powersgd": 0.2, "int4": 0.1}.get(kind, 0.05)
            ), kind
            low, high = {
                "int8": (3.8, 4.0), "int4": (7.3, 8), "int4 loco": (7.3, 8), "1bit": (25, 32), "fp16": (2, 2.01),
                "bf16": (2, 2.01), "powersgd": (1.1, 10),
            }[kind]  # fmt: skip
            assert low <= ratio <= high, (kind, ratio)
            if kind in ("fp16", "bf16", "powersgd"):
                assert codec_s is None  # torch's hooks do not tell
            else:
                assert codec_s > 0


def owed(rank: int, world: int) -> tuple[float, float]:
    """Error feedback: over many reductions of one gradient nothing is lost."""
    errors = []
    for loco in (None, cc.LoCoPolicy(beta=0.0, reset_steps=0)):
        ddp = DistributedDataParallel(build())
        ddp.register_comm_hook(None, cc.ddp_hook("int4", loco=loco, min_bytes=0))
        total = torch.zeros_like(torch.cat([param.detach().flatten() for param in ddp.parameters()]))
        exact = torch.zeros_like(total)
        for step in range(21):
            ddp.zero_grad()
            loss_of(ddp, batch(rank, 0)).backward()
            if step:  # the first comes before DDP deals parameters out
                total += grads_of(ddp.module)
                ddp.zero_grad()
                with ddp.no_sync():
                    loss_of(ddp, batch(rank, 0)).backward()
                mine = grads_of(ddp.module)
                dist.all_reduce(mine)
                exact += mine / world
        errors.append(float((total - exact).norm() / exact.norm()))
    return errors[0], errors[1]


def test_what_is_lost_comes_back() -> None:
    for without, with_feedback in run_ranks(owed, 2, 2):
        assert with_feedback < without / 4
        assert with_feedback < 0.02


class Sometimes(torch.nn.Module):
    """A layer that only some inputs use."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(64, 64) for _ in range(4))
        self.last = torch.nn.Linear(64, 64)

    def forward(self, x: torch.Tensor, *, whole: bool) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.last(x) if whole else x


def unused(rank: int) -> torch.Tensor:
    """While a thread runs PowerSGD's collectives, DDP asks which parameters were used."""
    ddp = DistributedDataParallel(Sometimes(), bucket_cap_mb=0.02, find_unused_parameters=True)
    hook = cc.ddp_hook("powersgd", matrix_approximation_rank=2, start_powerSGD_iter=2)
    ddp.register_comm_hook(None, hook)
    for step in range(20):
        ddp.zero_grad()
        torch.manual_seed(10 * step + rank)
        ddp(torch.randn(4, 64), whole=(step + rank) % 2 == 0).square().mean().backward()
    return grads_of(ddp.module)


def test_powersgd_beside_collectives_of_backward() -> None:
    one, other = run_ranks(unused, 2, timeout_s=30)
    assert torch.equal(one, other)


def moving(rank: int, kind: str) -> None:
    """Parameters that lie elsewhere at every step, as after `flatten_parameters` of an LSTM, are the same ones."""
    ddp = DistributedDataParallel(build())
    options = {} if kind == "1bit" else {"loco": cc.LoCoPolicy()}
    hook = cc.ddp_hook(kind, **options)
    ddp.register_comm_hook(None, hook)
    known = []
    for step in range(6):
        loss_of(ddp, batch(rank, step)).backward()
        known.append(dict(hook.averaging.known))
        ddp.zero_grad()
        for param in ddp.parameters():
            param.data = param.data.clone()
    assert known[1:] == known[1:2] * 5, "residuals were begun anew"


@pytest.mark.parametrize("kind", ["int8", "1bit"])
def test_parameters_that_move_in_memory(kind: str) -> None:
    run_ranks(moving, 2, kind)


# -- refusals and failures --------------------------------------------------------------------------------------


@pytest.fixture
def solo():
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_options_that_do_not_belong(solo) -> None:
    for kind, options, message in (
        ("int3", {}, "kind: expected 'int8', 'int4', '1bit', 'fp16', 'bf16' or 'powersgd', got 'int3'"),
        ("int8", {"matrix_approximation_rank": 2}, "options of 'powersgd' alone"),
        ("1bit", {"node_size": 1, "min_bytes": 0}, "min_bytes, node_size: no option of this kind"),
        ("1bit", {"shared_memory": True}, "shared_memory: no option of this kind"),
        ("fp16", {"policy": "auto"}, "policy: no option of this kind"),
        ("bf16", {"block_size": -5}, "block_size: no option of this kind"),
        (
            "powersgd",
            {"timeout_s": 5.0, "shared_memory": False},
            "shared_memory, timeout_s: no option of this kind",
        ),
        ("int8", {"node_size": 3}, "node_size: expected a divisor of the group's 1 ranks (1), got 3"),
        ("powersgd", {"rank": 2}, "ddp_hook('powersgd')"),
    ):
        with pytest.raises(cc.CompressConfigError) as raised:
            cc.ddp_hook(kind, **options)
        assert message in str(raised.value)


def fail(rank: int, world: int, kind: str) -> tuple[str, float]:
    ddp = DistributedDataParallel(build())
    ddp.register_comm_hook(None, cc.ddp_hook(kind, timeout_s=2.0))
    for step in range(2):  # until DDP has dealt parameters out anew
        loss_of(ddp, batch(rank, step)).backward()
    if rank == 1:
        os._exit(17)
    start = time.monotonic()
    try:
        loss_of(ddp, batch(rank, 1)).backward()
    except RuntimeError as error:
        return str(error), time.monotonic() - start
    return "", 0.0


@pytest.mark.parametrize("kind", ["int8", "1bit"])
def test_survivors_end_with_a_name(kind: str) -> None:
    message, seconds = run_ranks(fail, 2, 2, kind, tolerate=(0, 1), timeout_s=60)[0]
    assert "average of bucket" in message
    assert "rank 0 of 2" in message
    assert "rank 1" in message
    assert seconds < 16


def two_towers(rank: int) -> None:
    """Hooks of two models on one group never take each other's messages, and say so where kinds differ."""
    hooks = [cc.ddp_hook(kind) for kind in ("1bit", "1bit", "int8", "int8")]
    salts = [hook.averaging.ways.salt for hook in hooks]
    assert len(set(salts)) == 4
    told: list[object] = [None, None]
    dist.all_gather_object(told, salts)
    assert told[0] == told[1]
    towers = [DistributedDataParallel(build()) for _ in range(2)]
    for tower, hook in zip(towers, hooks, strict=False):
        tower.register_comm_hook(None, hook)
    for step in range(3):
        sum(loss_of(tower, batch(rank, step + number)) for number, tower in enumerate(towers)).backward()
    with pytest.raises(cc.CompressConfigError, match="on rank 0: int8"):
        cc.ddp_hook("1bit" if rank else "int8", timeout_s=5.0)


def test_two_models_on_one_group() -> None:
    run_ranks(two_towers, 2)


def by_turns(rank: int, kind: str) -> None:
    """One hook for two models: refused as soon as the first one comes again."""
    towers, hook = [DistributedDataParallel(build()) for _ in range(2)], cc.ddp_hook(kind)
    for tower in towers:
        tower.register_comm_hook(None, hook)

    def take_turns() -> None:
        for step in range(4):
            for tower in towers:
                loss_of(tower, batch(rank, step)).backward()

    with pytest.raises(RuntimeError, match="two DDP models by turns"):
        take_turns()


@pytest.mark.parametrize("kind", ["int8", "1bit"])
def test_two_models_with_one_hook(kind: str) -> None:
    run_ranks(by_turns, 2, kind)


def in_fp64(rank: int) -> None:
    """fp64 travels as it is, error feedback or not; signs of it there are none."""
    for loco in (None, cc.LoCoPolicy()):
        ddp = DistributedDataParallel(build().double())
        ddp.register_comm_hook(None, cc.ddp_hook("int8", loco=loco, min_bytes=0))
        plain = DistributedDataParallel(build().double())
        for step in range(2):
            for each in (ddp, plain):
                each.zero_grad()
                loss_of(each, batch(rank, step)).backward()
            torch.testing.assert_close(grads_of(ddp), grads_of(plain), rtol=1e-14, atol=0)
    ddp = DistributedDataParallel(build().double())
    ddp.register_comm_hook(None, cc.ddp_hook("1bit"))
    with pytest.raises(RuntimeError, match=r"bucket 0 .*expected fp32, bf16 or fp16, got torch\.float64"):
        loss_of(ddp, batch(rank, 0)).backward()


def test_gradients_in_fp64() -> None:
    run_ranks(in_fp64, 2)


def late(rank: int) -> float:
    """Seconds in codecs of a rank that waits for another."""
    ddp = DistributedDataParallel(build())
    hook = cc.ddp_hook("1bit")
    ddp.register_comm_hook(None, hook)
    for step in range(3):
        loss = loss_of(ddp, batch(rank, step))
        time.sleep(0.3 * rank)
        loss.backward()
    return next(iter(hook.entries())).codec.seconds


def test_waiting_is_no_codec_time() -> None:
    assert run_ranks(late, 2)[0] < 0.3


def test_without_a_process_group() -> None:
    for call in (lambda: cc.ddp_hook("int8"), lambda: cc.allreduce_1bit(torch.ones(4))):
        with pytest.raises(cc.CompressConfigError, match="init_process_group"):
            call()


class Event:
    """Of an accelerator: a tenth of a second between any two."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def record(self) -> None: ...

    def synchronize(self) -> None: ...

    def elapsed_time(self, other: Event) -> float:
        return 100.0


def test_times_of_an_accelerator_do_not_pile_up(monkeypatch) -> None:
    monkeypatch.setattr(torch, "Event", Event)
    watch = Stopwatch()
    for _ in range(3000):
        with watch.running(torch.device("cuda")):
            pass
    assert len(watch._open) <= 1024
    assert watch.seconds == pytest.approx(300.0)

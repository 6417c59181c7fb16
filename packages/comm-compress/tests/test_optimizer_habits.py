"""The optimizers in an ordinary loop: closures, schedules, accumulation, DDP, clipping, GradScaler, odd parameters."""

from __future__ import annotations

import math
from typing import Any

import comm_compress as cc
import pytest
import torch
from comm_compress.optimizers.rounds import Travel
from optimizer_models import BUILD, SMALL, Net, batch, loss_of, same, values
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from zero_core.testing import run_ranks

STEPS = 14


def plain(rank: int, kind: str, **more: Any) -> tuple[Net, Any]:
    model = Net()
    optimizer = BUILD[kind](model.parameters(), compression=SMALL, **more)
    for step in range(1, STEPS + 1):
        loss_of(model, rank, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def loops(rank: int, kind: str) -> None:
    reference, _ = plain(rank, kind)

    model = Net()  # with a closure
    optimizer = BUILD[kind](model.parameters(), compression=SMALL)
    for step in range(1, STEPS + 1):
        seen = []

        def closure(step: int = step, seen: list[Any] = seen) -> torch.Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, rank, step)
            loss.backward()
            seen.append(loss)
            return loss

        assert optimizer.step(closure) is seen[0]
    assert same(values(model), values(reference))

    model = Net()  # under DistributedDataParallel, which is to leave gradients alone
    wrapped = DistributedDataParallel(model)
    optimizer = BUILD[kind](wrapped.parameters(), compression=SMALL)
    for step in range(1, STEPS + 1):
        with wrapped.no_sync():
            x, y = batch(rank, step)
            (wrapped(x) - y).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    assert same(values(model), values(reference))


@pytest.mark.parametrize("kind", list(BUILD))
def test_loops(kind: str) -> None:
    run_ranks(loops, 2, kind)


def accumulate(rank: int, kind: str) -> None:
    """Two backward passes before a step are one of the sum."""
    models = []
    for parts in (1, 2):
        model = Net()
        optimizer = BUILD[kind](model.parameters(), compression=SMALL)
        for step in range(1, STEPS + 1):
            if parts == 1:
                ((loss_of(model, rank, 2 * step) + loss_of(model, rank, 2 * step + 1)) / 2).backward()
            else:
                (loss_of(model, rank, 2 * step) / 2).backward()
                (loss_of(model, rank, 2 * step + 1) / 2).backward()
            optimizer.step()
            optimizer.zero_grad()
        models.append(values(model))
    for name, value in models[0].items():
        torch.testing.assert_close(models[1][name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", list(BUILD))
def test_accumulation(kind: str) -> None:
    run_ranks(accumulate, 2, kind)


def schedule(rank: int, kind: str) -> None:
    model = Net()
    optimizer = BUILD[kind](model.parameters(), compression=SMALL)
    schedules = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step >= 9 else 1.0)
    for step in range(1, STEPS + 1):
        before = values(model)
        loss_of(model, rank, step).backward()
        optimizer.step()
        schedules.step()
        optimizer.zero_grad()
        if step > 11:  # at a rate of zero nothing moves, whatever is owed
            assert same(before, values(model))
    assert all(torch.isfinite(value).all() for value in values(model).values())


@pytest.mark.parametrize("kind", list(BUILD))
def test_schedules_and_a_rate_of_zero(kind: str) -> None:
    run_ranks(schedule, 2, kind)


# -- clipping -----------------------------------------------------------------------------------------------------


def clip(rank: int, kind: str) -> list[tuple[float, float, float]]:
    """By step: what clip_grad_norm said, the norm of the mean gradient, and the root of the mean of squared norms.

    All computed from this rank's parameters: on those of ranks that step alone they are its own.
    """
    model = Net()
    optimizer = BUILD[kind](model.parameters(), compression=SMALL)
    found = []
    for step in range(1, STEPS + 1):
        losses = [loss_of(model, peer, step) for peer in range(2)]
        trained = [p for p in model.parameters() if p.numel()]
        grads = [torch.autograd.grad(loss, trained) for loss in losses]
        flats = [torch.cat([g.reshape(-1) for g in each]) for each in grads]
        loss_of(model, rank, step).backward()
        alone = optimizer.travel() is Travel.NOTHING
        apart = kind == "ZeroOneAdam" and optimizer.steps_since_sync > 0
        norm = optimizer.clip_grad_norm(0.3)
        optimizer.step()
        optimizer.zero_grad()
        own = float(flats[rank].norm())
        rms = own if alone else math.sqrt(sum(float(flat.norm()) ** 2 for flat in flats) / 2)
        if not apart or alone:
            found.append((float(norm), float((sum(flats) / 2).norm()), rms))
    return found


def estimated(exact: list[tuple[float, float]], rms: float) -> float:
    """The norm of the mean of two ranks' gradients, from exact steps' (norm of the mean, root of the mean square)."""
    shares = [min(max(2 * (of_mean / own) ** 2 - 1, 0.0), 1.0) for of_mean, own in exact]
    weights = [0.9**age for age in reversed(range(len(shares)))]
    share = sum(w * s for w, s in zip(weights, shares, strict=True)) / sum(weights)
    return rms * math.sqrt(share + (1 - share) / 2)


@pytest.mark.parametrize("kind", ["OneBitAdam", "OneBitLamb"])
def test_the_norm_is_the_means_and_later_an_estimate_of_it(kind: str) -> None:
    for found in run_ranks(clip, 2, kind):
        for norm, of_mean, _ in found[:5]:
            assert norm == pytest.approx(of_mean, rel=1e-4)
        exact = [(of_mean, rms) for _, of_mean, rms in found[:5]]
        for norm, _, rms in found[5:]:
            assert norm == pytest.approx(estimated(exact, rms), rel=1e-4)
        assert any(rms > 1.05 * norm for norm, _, rms in found[5:])  # they do differ


def test_ranks_that_step_alone_clip_alone() -> None:
    for found in run_ranks(clip, 2, "ZeroOneAdam"):
        exact: list[tuple[float, float]] = []
        num_estimates = 0
        for norm, of_mean, rms in found:
            if norm == pytest.approx(of_mean, rel=1e-3):
                exact.append((of_mean, rms))
            else:
                assert norm == pytest.approx(estimated(exact, rms), rel=1e-3)
                num_estimates += 1
        assert exact
        assert num_estimates


def clipped_is_scaled(rank: int, kind: str) -> None:
    """Clipping to norm / 2 steps as half the gradient does."""
    models = []
    for half in (False, True):
        model = Net()
        optimizer = BUILD[kind](model.parameters(), compression=SMALL)
        for step in range(1, STEPS + 1):
            (loss_of(model, rank, step) * (0.5 if half else 1.0)).backward()
            if not half:
                with torch.no_grad():
                    probe = optimizer.clip_grad_norm(1e9)  # says the norm, and clips nothing
                optimizer.clip_grad_norm(float(probe) / 2)
            optimizer.step()
            optimizer.zero_grad()
        models.append(values(model))
    for name, value in models[0].items():
        torch.testing.assert_close(models[1][name], value, rtol=1e-3, atol=1e-4)


def test_clipping_scales_the_step() -> None:
    run_ranks(clipped_is_scaled, 2, "OneBitAdam")


# -- GradScaler ---------------------------------------------------------------------------------------------------


def scaled(rank: int, kind: str) -> None:
    """A GradScaler changes nothing but what overflows; ranks skip together, though one of them alone overflows."""
    reference, _ = plain(rank, kind)
    model = Net()
    optimizer = BUILD[kind](model.parameters(), compression=SMALL)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    step, skips = 1, 0
    while step <= STEPS:
        scaler.scale(loss_of(model, rank, step)).backward()
        bad = step == 4 and skips == 0 and optimizer.travel() is not Travel.NOTHING
        if bad and rank == 1:
            with torch.no_grad():
                model.gain.grad.fill_(float("inf"))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert optimizer.last_step_skipped == bad
        skips += bad
        step += not bad
    assert skips == 1
    assert (scaler.get_scale() < 2.0**10) == (rank == 1)  # each rank's scale is its own affair
    for name, value in values(reference).items():
        torch.testing.assert_close(values(model)[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", list(BUILD))
def test_grad_scaler(kind: str) -> None:
    run_ranks(scaled, 2, kind)


def clipped_and_scaled(rank: int, kind: str) -> None:
    """Scales are ranks' own: all say that unscaling was left out; fp16 gradients are clipped with the scaler."""
    start = torch.linspace(-1, 1, 50).half()
    low, exact = nn.Parameter(start.clone()), nn.Parameter(start.float())
    optimizer, reference = (BUILD[kind]([each], weight_decay=0.0) for each in (low, exact))
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0 if rank else 2.0**10, growth_interval=1000)

    def backward(step: int) -> None:
        generator = torch.Generator().manual_seed(10 * step + rank)
        grad = torch.randn(50, generator=generator).half()
        low.grad, exact.grad = grad * scaler.get_scale(), grad.float()

    scaler.scale(torch.ones(()))
    for step in range(1, 12):
        backward(step)
        norm = optimizer.clip_grad_norm(0.5, scaler)
        assert norm == reference.clip_grad_norm(0.5)
        assert optimizer.clip_grad_norm(0.5, scaler) == norm
        scaler.step(optimizer)
        reference.step()
        scaler.update()
        optimizer.zero_grad()
    shown = optimizer._buckets[0].master if kind != "ZeroOneAdam" else low.detach().float()
    torch.testing.assert_close(shown, exact.detach(), rtol=1e-3, atol=1e-3 if kind == "ZeroOneAdam" else 1e-6)
    backward(12)
    optimizer.clip_grad_norm(0.5)
    with pytest.raises(cc.CompressStateError, match=r"clip_grad_norm\(max_norm, scaler\)"):
        scaler.step(optimizer)


@pytest.mark.parametrize("kind", list(BUILD))
def test_clipping_with_scales_of_ranks_own(kind: str) -> None:
    run_ranks(clipped_and_scaled, 2, kind)


def digits(rank: int, kind: str, dtype: torch.dtype) -> None:
    """Means of 16-bit gradients keep what fp32 has of them: those of a scaled loss, and where fp32 was asked for."""
    scale = 2.0**24 if dtype == torch.float16 else 1.0
    start = torch.linspace(-1, 1, 50).to(dtype)
    low, exact = nn.Parameter(start.clone()), nn.Parameter(start.float())
    reduce_dtype = None if dtype == torch.float16 else torch.float32
    policy = cc.Compression(reduce_dtype=reduce_dtype)
    optimizer, reference = (BUILD[kind]([each], compression=policy, eps=1e-12) for each in (low, exact))
    for step in range(1, 4):
        generator = torch.Generator().manual_seed(10 * step + rank)
        grad = (1e-9 * scale * torch.randn(50, generator=generator)).to(dtype)
        if scale != 1.0:
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(scale), torch.tensor(0.0)
        low.grad, exact.grad = grad, grad.float() / scale
        optimizer.step()
        reference.step()
        assert low.grad.dtype == dtype
    assert torch.equal(optimizer._buckets[0].master, exact.detach())
    assert not torch.equal(exact.detach(), start.float())


@pytest.mark.parametrize("kind", list(BUILD))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_means_keep_their_digits(kind: str, dtype: torch.dtype) -> None:
    run_ranks(digits, 2, kind, dtype)


def out_of_order(rank: int) -> None:
    """What would throw away a clipped step under way is refused, and may be done after it."""
    one_bit, zero_one = ((Net(), BUILD[kind]) for kind in ("OneBitAdam", "ZeroOneAdam"))
    for (model, build), steps, act in ((one_bit, 2, "freeze"), (zero_one, 9, "synchronize")):
        optimizer = build(model.parameters(), compression=SMALL)
        for step in range(1, steps + 1):
            loss_of(model, rank, step).backward()
            optimizer.step()
            optimizer.zero_grad()
        loss_of(model, rank, steps + 1).backward()
        optimizer.clip_grad_norm(1e-3)
        with pytest.raises(
            cc.CompressStateError, match=rf"{act}: a step has begun \(clip_grad_norm\); call step"
        ):
            getattr(optimizer, act)()
        optimizer.step()
        getattr(optimizer, act)()
        optimizer.zero_grad()
        loss_of(model, rank, steps + 2).backward()
        optimizer.clip_grad_norm(1e-3)
        optimizer.zero_grad()  # a step that was begun and given up
        getattr(optimizer, act)()
        loss_of(model, rank, steps + 3).backward()
        optimizer.step()
        assert optimizer.num_steps == steps + 2


def test_nothing_comes_between_clipping_and_its_step() -> None:
    run_ranks(out_of_order, 2)


def unscale_first(rank: int) -> None:
    model = Net()
    optimizer = cc.OneBitAdam(model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0 if rank else 1.0)  # each rank's own
    scaler.scale(loss_of(model, rank, 1)).backward()
    optimizer.clip_grad_norm(1.0)
    with pytest.raises(cc.CompressStateError, match=r"call scaler.unscale_\(optimizer\) before it"):
        scaler.step(optimizer)
    model = Net()
    optimizer = cc.OneBitAdam(model.parameters())
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss_of(model, rank, 1)).backward()
    scaler.unscale_(optimizer)
    assert optimizer.clip_grad_norm(1.0) < 100
    scaler.step(optimizer)
    assert optimizer.num_steps == 1


def test_clipping_wants_unscaled_gradients() -> None:
    run_ranks(unscale_first, 2)


# -- odd parameters -----------------------------------------------------------------------------------------------


def odd(rank: int, kind: str) -> None:
    """Frozen layers, ones that are frozen later, and ones whose memory is not in order."""
    model = Net().to(memory_format=torch.channels_last)
    model.conv.weight.data = model.conv.weight.data.transpose(0, 2).contiguous().transpose(0, 2)
    assert not model.conv.weight.is_contiguous()
    model.side.requires_grad_(False)
    optimizer = BUILD[kind](model.parameters(), compression=SMALL)
    start = values(model)
    for step in range(1, STEPS + 1):
        if step == 10:
            if kind == "ZeroOneAdam":
                optimizer.synchronize()
            model.last.requires_grad_(False)
            at_freeze = values(model)
        loss_of(model, rank, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    if kind == "ZeroOneAdam":
        optimizer.synchronize()
    now = values(model)
    assert torch.equal(now["side.weight"], start["side.weight"])
    assert not torch.equal(now["conv.weight"], start["conv.weight"])
    assert torch.equal(now["last.weight"], at_freeze["last.weight"])


@pytest.mark.parametrize("kind", list(BUILD))
def test_frozen_and_disordered_parameters(kind: str) -> None:
    run_ranks(odd, 2, kind)


def grow(rank: int) -> None:
    model = Net()
    trained = [p for n, p in model.named_parameters() if "side" not in n]
    optimizer = cc.OneBitAdam(trained, lr=1e-2, freeze_step=5, compression=SMALL)
    theirs_model = Net()
    theirs = torch.optim.AdamW(
        [p for n, p in theirs_model.named_parameters() if "side" not in n], lr=1e-2, weight_decay=0.0
    )
    for step in range(1, 6):
        if step == 3:
            optimizer.add_param_group({"params": list(model.side.parameters()), "lr": 1e-3})
            theirs.add_param_group({"params": list(theirs_model.side.parameters()), "lr": 1e-3})
        loss_of(model, 0, step).backward()
        loss_of(theirs_model, 0, step).backward()
        optimizer.step()
        theirs.step()
        optimizer.zero_grad()
        theirs.zero_grad()
        for name, value in values(theirs_model).items():
            torch.testing.assert_close(values(model)[name], value, rtol=1e-5, atol=1e-6)
    other = cc.OneBitAdam([nn.Parameter(torch.zeros(3))], freeze_step=5)
    other.param_groups[0]["params"][0].grad = torch.ones(3)
    other.step()
    late = nn.Parameter(torch.full((3,), float(rank)))
    late.grad = torch.ones(3)
    other.add_param_group({"params": [late]})
    with pytest.raises(
        cc.CompressStateError, match="the same parameters on every rank before the first step"
    ):
        other.step()
    extra = nn.Parameter(torch.zeros(3))
    optimizer.add_param_group({"params": [extra]})
    extra.grad = torch.ones(3)
    with pytest.raises(cc.CompressStateError, match=r"'param.\d+' began to need gradients after compression"):
        optimizer.step()


def test_groups_may_be_added_while_warm_up_lasts() -> None:
    run_ranks(grow, 2)


def come_late(rank: int, kind: str) -> None:
    """No gradient of it until momenta travel as signs; then it learns like the others. Another never has one."""
    torch.manual_seed(0)
    early, late, never = (nn.Parameter(torch.randn(40)) for _ in range(3))
    optimizer = BUILD[kind]([early, late, never], weight_decay=0.01)
    start = [param.detach().clone() for param in (early, late, never)]
    for step in range(1, 61):
        for param in (early, late) if step > 10 else (early,):
            param.grad = param.detach() - 3.0
        optimizer.step()
    if kind == "ZeroOneAdam":
        optimizer.synchronize()
    ways = [
        (param.detach() - 3.0).norm() / (begun - 3.0).norm()
        for param, begun in zip((early, late), start, strict=False)
    ]
    assert all(way < 0.95 for way in ways), ways
    assert torch.equal(never, start[2])


@pytest.mark.parametrize("kind", list(BUILD))
def test_a_first_gradient_after_warm_up(kind: str) -> None:
    run_ranks(come_late, 2, kind)


def nothing_at_all(rank: int, kind: str) -> None:
    optimizer = BUILD[kind]([nn.Parameter(torch.zeros(0)), nn.Parameter(torch.ones(2), requires_grad=False)])
    for _ in range(12):
        optimizer.clip_grad_norm(1.0)
        optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.num_steps == 12
    assert cc.traffic(optimizer).total.sent.total == 0


@pytest.mark.parametrize("kind", list(BUILD))
def test_nothing_to_step(kind: str) -> None:
    run_ranks(nothing_at_all, 2, kind)


def names(rank: int) -> None:
    model = Net()
    optimizer = cc.OneBitAdam(model.named_parameters(), freeze_step=2)
    for step in range(1, 5):
        loss_of(model, rank, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert "first.weight.exp_avg" in optimizer.sharded_state()
    assert f"conv.bias.worker_error_{rank}" in optimizer.sharded_state()
    other = cc.OneBitAdam(Net().parameters())
    assert "param.4.exp_avg" in other.sharded_state()


def test_names_of_state() -> None:
    run_ranks(names, 2)


# -- refusals -----------------------------------------------------------------------------------------------------


def sparse(rank: int) -> None:
    model = nn.Embedding(5, 3, sparse=True)
    optimizer = cc.OneBitAdam(model.parameters())
    model(torch.tensor([1])).sum().backward()
    with pytest.raises(cc.CompressStateError, match="a sparse gradient"):
        optimizer.step()
    wide = nn.Linear(2, 2).double()
    optimizer = cc.OneBitAdam(wide.named_parameters())
    wide(torch.zeros(1, 2).double()).sum().backward()
    with pytest.raises(
        cc.CompressConfigError, match=r"'weight': expected a dense float32, .*got torch.float64"
    ):
        optimizer.step()


def test_what_cannot_be_stepped_is_refused() -> None:
    run_ranks(sparse, 1)


@pytest.mark.parametrize(
    ("kind", "bad", "text"),
    [
        (cc.OneBitAdam, {"lr": -1.0}, "lr >= 0, got -1.0"),
        (cc.OneBitAdam, {"betas": (0.9, 1.0)}, "0 <= beta < 1"),
        (cc.OneBitAdam, {"eps": 0.0}, "eps > 0"),
        (cc.OneBitAdam, {"weight_decay": -0.1}, "weight_decay >= 0"),
        (cc.OneBitAdam, {"freeze_step": 0}, "freeze_step: expected a number of steps >= 1"),
        (cc.OneBitLamb, {"min_coeff": 2.0, "max_coeff": 1.0}, "0 < min_coeff <= max_coeff"),
        (cc.OneBitLamb, {"factor_min": 1.5}, "factor_min <= 1 <= factor_max"),
        (cc.OneBitLamb, {"factor_threshold": 0.0}, "0 < factor_threshold"),
        (cc.OneBitLamb, {"coeff_beta": 1.0}, "0 <= coeff_beta < 1"),
        (cc.ZeroOneAdam, {"local_step_clipper": 0}, "local_step_clipper: expected a whole number >= 1"),
    ],
)
def test_options_out_of_range(kind: Any, bad: dict[str, Any], text: str) -> None:
    with pytest.raises(cc.CompressConfigError, match=text):
        kind([nn.Parameter(torch.zeros(1))], **bad)


@pytest.mark.parametrize(
    "bad",
    [{"bucket_bytes": 3}, {"bucket_bytes": True}, {"variance_floor": 2.0}, {"reduce_dtype": torch.float64},
     {"timeout_s": 0.0}],
)  # fmt: skip
def test_policies_out_of_range(bad: dict[str, Any]) -> None:
    with pytest.raises(cc.CompressConfigError, match=f"Compression: expected .*{next(iter(bad))}"):
        cc.Compression(**bad)


def test_without_a_process_group() -> None:
    param = nn.Parameter(torch.zeros(3))
    param.grad = torch.ones(3)
    with pytest.raises(cc.CompressConfigError, match=r"expected group=, or torch\.distributed initialised"):
        cc.OneBitAdam([param]).step()


def clipped_twice(rank: int) -> None:
    """A look at the norm before clipping by it: the same step, and the same to be said of the ranks' noise."""
    found = []
    for looks in (False, True):
        model = Net()
        optimizer = cc.OneBitAdam(model.parameters(), lr=1e-2, freeze_step=5, compression=SMALL)
        norms = []
        for step in range(1, 9):
            loss_of(model, rank, step).backward()
            if looks:
                norms.append(float(optimizer.clip_grad_norm(float("inf"))))
            norms.append(float(optimizer.clip_grad_norm(0.5)))
            optimizer.step()
            optimizer.zero_grad()
        found.append((values(model), optimizer.progress()["common"], norms[-1]))
    assert same(found[0][0], found[1][0])
    assert found[0][1:] == found[1][1:]
    assert found[0][1][0] < 0.95 * found[0][1][1]  # ranks have noise, and that was seen


def test_looking_at_the_norm_changes_nothing() -> None:
    run_ranks(clipped_twice, 2)


def scaled_on_one(rank: int) -> None:
    """A rank whose loss scale has come down to 1, beside one whose has not: they speak of the same dtype."""
    model = Net(torch.float16)
    optimizer = cc.OneBitAdam(model.parameters(), compression=cc.Compression(timeout_s=10.0))
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1.0 + rank), torch.tensor(0.0)
    (loss_of(model, rank, 1) * (1 + rank)).backward()
    optimizer.step()
    assert optimizer.num_steps == 1


def test_loss_scales_of_one_and_of_two() -> None:
    run_ranks(scaled_on_one, 2)


def told_otherwise(rank: int) -> None:
    for kind, mine, theirs in (
        ("OneBitAdam", {"freeze_step": 5}, {"freeze_step": 6}),
        ("OneBitLamb", {"lr": 1e-2}, {"lr": 2e-2}),
        ("ZeroOneAdam", {"var_freeze_step": 6}, {"var_freeze_step": 7}),
        ("OneBitAdam", {"compression": SMALL}, {"compression": cc.Compression(bucket_bytes=1200)}),
    ):
        model = Net()
        optimizer = BUILD[kind](model.parameters(), **(theirs if rank else mine))
        loss_of(model, rank, 1).backward()
        with pytest.raises(cc.CompressConfigError, match="the same settings on every rank, got on rank 0"):
            optimizer.step()


def test_ranks_that_were_told_different_things_say_so_before_anything_travels() -> None:
    run_ranks(told_otherwise, 2)


def at_rest(rank: int) -> None:
    """A rate of 0 for a while: what momenta have gathered, and what is owed, is there when it rises again."""
    model = Net()
    optimizer = BUILD["ZeroOneAdam"](model.parameters(), compression=SMALL)

    def step(number: int) -> None:
        loss_of(model, rank, number).backward()
        optimizer.step()
        optimizer.zero_grad()

    for number in range(1, 13):
        step(number)
    optimizer.synchronize()
    before = values(model)
    owed = [bucket.flat["worker_error"].clone() for bucket in optimizer._buckets]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for number in range(13, 25):
        step(number)
    optimizer.synchronize()
    assert same(values(model), before)
    for bucket, error in zip(optimizer._buckets, owed, strict=True):
        assert torch.equal(bucket.flat["worker_error"], error)
        momentum = bucket.flat["exp_avg"]
        assert float(momentum.norm()) > 0
        told = [torch.empty_like(momentum) for _ in range(2)]
        torch.distributed.all_gather(told, momentum)
        assert torch.equal(told[0], told[1])


def test_momenta_survive_a_rate_of_zero() -> None:
    run_ranks(at_rest, 2)

"""torch's FSDP2 through compressed collectives: trains as the simulation says, and sends as little as is counted."""

from __future__ import annotations

import comm_compress as cc
import pytest
import torch
import torch.distributed as dist
from comm_compress import trials
from comm_compress.topology import Grid
from comm_compress.wire import BlockFormat
from compress_lab import SimulatedCollectives, batch, build, loss_of
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from zero_core.testing import run_ranks

pytestmark = pytest.mark.skipif(
    not hasattr(FSDPModule, "set_custom_all_gather"),
    reason="this torch's FSDP2 takes no collectives of others",
)


def sharded(
    world: int,
    param_dtype: torch.dtype | None,
    reduce_dtype: torch.dtype | None,
    reshard: bool | int | None = None,
):
    model = build()
    for block in model.blocks:
        block.scale = torch.nn.Parameter(torch.ones(1))  # FSDP2 shards no scalars
    mesh = init_device_mesh("cpu", (world,))
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    return model, mesh.get_group()


def losses(model, rank: int) -> list[float]:
    opt = torch.optim.SGD(model.parameters(), lr=0.3)
    found = []
    for step in range(4):
        loss = loss_of(model, batch(rank, step))
        loss.backward()
        opt.step()
        opt.zero_grad()
        found.append(float(loss))
    return found


class _Simulated(cc.QuantizedCollectives):
    """The equations in the place of the collectives."""

    def __call__(self, group):
        made = super().__call__(group)
        forms = [None if name is None else BlockFormat({"int8": 8, "int4": 4}[name])
                 for name in (self.settings.weights, self.settings.grads)]  # fmt: skip
        simulated = SimulatedCollectives(group, Grid(group.size(), self.settings.node_size or 1), *forms)
        made.gather_weights = lambda *args, **more: simulated.gather_weights(*args, trainable=True, **more)
        made.reduce_scatter = simulated.reduce_scatter
        return made


def compare(rank: int, world: int, node_size: int, param_dtype, reduce_dtype) -> None:
    options = {"node_size": node_size, "min_bytes": 0}
    told = []
    for kind in (cc.QuantizedCollectives, _Simulated, None):
        model, group = sharded(world, param_dtype, reduce_dtype)
        if kind is not None:
            made = cc.compress_fsdp(model, kind(**options), group)
        told.append(losses(model, rank))
        if kind is cc.QuantizedCollectives:
            traffic = cc.traffic(made)
    ours, expected, plain = told
    assert ours == pytest.approx(expected, rel=1e-4)
    assert ours != plain
    assert ours == pytest.approx(plain, rel=0.05)
    size = 2 if param_dtype == torch.bfloat16 else 4
    assert traffic.line("gather").ratio == pytest.approx(size, rel=0.1)
    assert traffic.line("reduce").ratio > 1.8 * size
    assert traffic.line("reduce").calls == 4 * 3


@pytest.mark.parametrize(
    ("world", "node_size", "param_dtype", "reduce_dtype"),
    [
        (2, 1, None, None),
        (2, 2, torch.bfloat16, torch.bfloat16),
        (4, 2, None, None),
    ],
)
def test_equal_to_the_simulation(world: int, node_size: int, param_dtype, reduce_dtype) -> None:
    run_ranks(compare, world, world, node_size, param_dtype, reduce_dtype)


def each_alone(rank: int) -> None:
    plain = losses(sharded(2, None, None)[0], rank)
    for weights, grads in ((None, None), ("int8", None), (None, "int8")):
        model, group = sharded(2, None, None)
        cc.compress_fsdp(model, cc.QuantizedCollectives(weights=weights, grads=grads, min_bytes=0), group)
        found = losses(model, rank)
        assert (found == pytest.approx(plain, rel=1e-7)) == (weights is None and grads is None)


def test_each_alone() -> None:
    run_ranks(each_alone, 2)


def second_shards(rank: int) -> None:
    """`reshard_after_forward=n`: backward has forward's values, from the node alone."""
    found = []
    for reshard in (True, 2):
        model, group = sharded(4, None, None, reshard)
        options = {"weights": "int4", "grads": "int8", "node_size": 2, "min_bytes": 0}
        made = cc.compress_fsdp(model, cc.QuantizedCollectives(**options), group)
        found.append((losses(model, rank), cc.traffic(made)))
    (every, far), (again, near) = found
    assert again == every
    assert far.line("gather_again").calls == 0
    assert near.line("gather_again").calls == 2 * 4  # two blocks, four steps
    assert near.line("gather_again").sent.across == 0
    assert near.line("gather").calls == far.line("gather").calls - 2 * 4


def test_second_shards_of_fsdp() -> None:
    run_ranks(second_shards, 4)


def refuse(rank: int) -> list[str]:
    model, group = sharded(2, None, None)
    found = []
    for call in (
        lambda: cc.compress_fsdp(torch.nn.Linear(2, 2), cc.QuantizedCollectives(), group),
        lambda: cc.compress_fsdp(model, cc.QuantizedCollectives(node_size=1, secondary=True), group),
        lambda: cc.compress_fsdp(model, cc.QuantizedCollectives(frozen="int4"), group),
    ):
        with pytest.raises(cc.CompressConfigError) as raised:
            call()
        found.append(str(raised.value))
    half = dist.new_group([rank], use_local_synchronization=True)
    cc.compress_fsdp(model, cc.QuantizedCollectives(), half)
    with pytest.raises(cc.CompressConfigError) as raised:
        loss_of(model, batch(rank, 0))
    found.append(str(raised.value))
    model, group = sharded(2, None, None)
    cc.compress_fsdp(model, cc.QuantizedCollectives(), group)
    model.set_gradient_divide_factor(3.0)
    with pytest.raises(cc.CompressConfigError) as raised:
        loss_of(model, batch(rank, 0)).backward()
    found.append(str(raised.value))
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.delattr(FSDPModule, "set_custom_reduce_scatter")
        with pytest.raises(cc.CompressConfigError) as raised:
            cc.compress_fsdp(model, cc.QuantizedCollectives(), group)
        found.append(str(raised.value))
    return found


def test_refusals() -> None:
    for found in run_ranks(refuse, 2):
        for message, expected in zip(
            found,
            (
                "no module of the model was sharded",
                "reshard_after_forward",
                "FSDP2 does not say what is trained",
                "FSDP2 works over ranks [0, 1], and group= has ranks",
                "expected a sum or a mean of gradients",
                "has no FSDPModule.set_custom_all_gather and set_custom_reduce_scatter",
            ),
            strict=True,
        ):
            assert expected in message


def feedback_and_auto(rank: int) -> tuple[int, str]:
    """Residuals of as many messages as there are, found again at each step; and a decision, once."""
    model, group = sharded(2, None, None)
    made = cc.compress_fsdp(model, cc.QuantizedCollectives(min_bytes=0, loco=cc.LoCoPolicy()), group)
    found = losses(model, rank)
    feedback = made.collectives.reductions.feedback
    assert feedback is not None
    num_owed = len(feedback.state_dict()["owed"])
    assert all(torch.isfinite(torch.tensor(found)))
    model, group = sharded(2, None, None)
    made = cc.compress_fsdp(model, cc.QuantizedCollectives(min_bytes=0, policy="auto"), group)
    for _ in range(4):
        losses(model, rank)
    return num_owed, str(cc.traffic(made))


def ways(rank: int, reshard: bool) -> list[set[bool]]:
    """By step, while it is measured: whether gathers went compressed."""
    model, group = sharded(2, None, None, reshard)
    made = cc.compress_fsdp(model, cc.QuantizedCollectives(min_bytes=0, policy="auto"), group)
    gathers, seen = made.collectives.gathers, []
    run = gathers.run

    def spy(*args, form, **more):
        seen[-1].add(form is not None)
        return run(*args, form=form, **more)

    gathers.run = spy
    for step in range(trials.NUM_PASSES):
        seen.append(set())
        loss_of(model, batch(rank, step)).backward()
    return seen


@pytest.mark.parametrize("reshard", [True, False])
def test_auto_measures_whole_steps(reshard: bool) -> None:
    for seen in run_ranks(ways, 2, reshard):
        assert seen == [{True}, {False}] * (trials.NUM_PASSES // 2)


def test_loco_and_auto_know_messages_again() -> None:
    for num_owed, table in run_ranks(feedback_and_auto, 2):
        assert num_owed == 3  # two blocks and the rest
        assert table.count("a pass pays") == 2

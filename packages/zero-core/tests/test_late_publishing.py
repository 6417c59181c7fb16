"""`Overlap(publish_late=True)`: the same bits, a step that waits for nobody, nobody sees a value that is not here."""

from __future__ import annotations

import copy
import io
import os
import pickle
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
import zero_core as zero
from torch import nn
from zero_core.params import ArrivingParameter
from zero_core.testing import run_ranks
from zero_core_models import Net, Untied, batches, dp_mesh, loss_of, relative_error, seeded

LATE = zero.Overlap(publish_late=True)


def over_messages(group: dist.ProcessGroup) -> zero.PlainCollectives:
    return zero.PlainCollectives(group, shared_memory=False)


def arriving(model: nn.Module) -> list[str]:
    return [name for name, param in model.named_parameters() if isinstance(param, ArrivingParameter)]


def train(
    rank: int, world_size: int, late: bool, stage: int, dtype: torch.dtype, messages: bool, accumulate: int
):
    placement = zero.Placement(whole_bytes=8000) if stage == 3 else None
    model = zero.shard(
        seeded(lambda: Net(unused=True)),
        dp_mesh(world_size),
        stage=stage,
        placement=placement,
        precision=zero.Precision(compute=dtype),
        collectives=over_messages if messages else None,
        overlap=LATE if late else None,
    )
    opt = zero.ShardedOptimizer(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    left = 0
    for step, ids in enumerate(batches(rank, 5 * accumulate)):
        loss_of(model, ids).backward()
        if step % accumulate == accumulate - 1:
            zero.clip_grad_norm(opt, 0.5)
            opt.step()
            opt.zero_grad()
            left += len(arriving(model))
            if step % 3 == rank:  # some ranks look between steps, others do not
                assert float(model.norm.weight.sum()) != 0
    return zero.full_state_dict(model), left


@pytest.mark.parametrize("messages", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("stage", "accumulate"), [(1, 1), (2, 2), (3, 1)])
def test_the_same_bits(stage: int, accumulate: int, dtype: torch.dtype, messages: bool) -> None:
    late, early = (run_ranks(train, 3, 3, late, stage, dtype, messages, accumulate) for late in (True, False))
    for (state, left), (expected, none_left) in zip(late, early, strict=True):
        assert relative_error(state, expected) == 0.0
        assert left > 0
        assert none_left == 0


def stepped(rank: int, stage: int = 2) -> tuple[nn.Module, zero.ShardedOptimizer, dict[str, torch.Tensor]]:
    """A model right after a step, and what its parameters should be then."""
    expected = {}
    for late in (False, True):
        overlap = LATE if late else None
        model = zero.shard(seeded(Net), dp_mesh(2), stage=stage, collectives=over_messages, overlap=overlap)
        opt = zero.ShardedOptimizer(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
        loss_of(model, next(iter(batches(rank, 1)))).backward()
        opt.step()
        if not late:
            expected = zero.full_state_dict(model)
    return model, opt, expected


def pickled(param: nn.Parameter) -> torch.Tensor:
    buffer = io.BytesIO()
    torch.save(param, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


LOOKS: dict[str, Callable[[nn.Parameter], Any]] = {
    "data": lambda param: param.data.clone(),
    "detach": lambda param: param.detach().clone(),
    "function": lambda param: torch.add(param, 0),
    "list": lambda param: torch.stack([param, param])[1],
    "foreach": lambda param: torch._foreach_mul([param], 1.0)[0],
    "operator": lambda param: param * 1,
    "numpy": lambda param: torch.from_numpy(param.detach().numpy().copy()),
    "deepcopy": lambda param: copy.deepcopy(param),
    "pickle": lambda param: pickle.loads(pickle.dumps(param)),
    "save": pickled,
    "index": lambda param: torch.stack([param[i] for i in range(len(param))]),
    "into another": lambda param: torch.empty_like(param).copy_(param),
    "in place": lambda param: param.mul_(1.0),
    "list of values": lambda param: torch.tensor(param.tolist()),
    "storage": lambda param: torch.empty(0).set_(
        param.untyped_storage(), param.storage_offset(), param.size(), param.stride()
    ).clone(),
    "dlpack": lambda param: torch.from_dlpack(param.detach()).clone(),
}  # fmt: skip


@torch.no_grad()
def look(rank: int) -> None:
    for what, see in LOOKS.items():
        with torch.enable_grad():
            model, opt, expected = stepped(rank)
        names = arriving(model)
        assert set(names) == dict(model.named_parameters()).keys()
        name = names[rank % 2 + 3]  # ranks look at different units
        param = model.get_parameter(name)
        assert param.shape == expected[name].shape
        assert param.requires_grad
        assert arriving(model) == names, "asking for the shape waits"
        assert torch.equal(see(param), expected[name]), what
        assert name not in arriving(model), what
        assert arriving(model), what
        opt.zero_grad()
        assert relative_error(model.state_dict(), expected) == 0.0


def test_whoever_looks_sees_the_new_values() -> None:
    run_ranks(look, 2)


def use(rank: int) -> None:
    """The package's own ways to values."""
    model, _, expected = stepped(rank)
    assert "Parameter containing" in repr(model.norm.weight)
    assert relative_error(zero.full_state_dict(model), expected) == 0.0

    model, opt, expected = stepped(rank)
    assert torch.equal(zero.get_full(model, "blocks.1.up.weight"), expected["blocks.1.up.weight"])
    zero.set_full(model, "blocks.0.up.weight", torch.full_like(expected["blocks.0.up.weight"], 0.5))
    expected["blocks.0.up.weight"].fill_(0.5)
    assert relative_error(model.state_dict(), expected) == 0.0

    model, opt, expected = stepped(rank)
    with zero.materialized(model, write=True), torch.no_grad():
        model.norm.bias.fill_(0.25)
    assert bool((model.norm.bias == 0.25).all())

    model, opt, expected = stepped(rank)
    kept = {name: shard.local.clone() for name, shard in zero.sharded_state(model, opt).items()}
    loss_of(model, next(iter(batches(rank, 1)))).backward()
    opt.step()
    zero.load_sharded_state(model, opt, kept)
    assert relative_error(model.state_dict(), expected) == 0.0

    model, opt, expected = stepped(rank)
    kept = copy.deepcopy(opt.state_dict())
    loss_of(model, next(iter(batches(rank, 1)))).backward()
    opt.step()
    opt.load_state_dict(kept)
    assert relative_error(model.state_dict(), expected) == 0.0

    model, opt, expected = stepped(rank)
    zero.load_full_state_dict(model, {name: torch.ones_like(value) for name, value in expected.items()})
    assert all(bool((param == 1).all()) for param in model.parameters())

    model, opt, expected = stepped(rank)
    opt.step()  # twice, with nothing between
    zero.sharded(model).close()
    assert all(bool(param.isfinite().all()) for param in model.parameters())


def test_the_package_itself_waits() -> None:
    run_ranks(use, 2)


class Slow(zero.PlainCollectives):
    """Counts the waits for gathers."""

    waits = 0

    def all_gather(self, shard: torch.Tensor, out: torch.Tensor, *, tag: int) -> Any:
        handle = super().all_gather(shard, out, tag=tag)
        wait = handle.wait

        def counted() -> None:
            Slow.waits += 1
            wait()

        handle.wait = counted
        return handle


def order_of_waits(rank: int) -> tuple[int, list[int]]:
    model = zero.shard(
        seeded(Untied),
        dp_mesh(2),
        stage=2,
        overlap=LATE,
        collectives=lambda group: Slow(group, shared_memory=False),
    )
    opt = zero.ShardedOptimizer(model, torch.optim.SGD(model.parameters(), lr=0.1))
    ids = next(iter(batches(rank, 1)))
    loss_of(model, ids).backward()
    Slow.waits = 0
    opt.step()
    in_step, at = Slow.waits, []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda *_: at.append(Slow.waits))
    loss_of(model, ids)
    return in_step, at


def test_a_step_waits_for_no_gather_and_a_block_for_its_own() -> None:
    for in_step, at in run_ranks(order_of_waits, 2):
        assert in_step == 0
        assert [later - earlier for earlier, later in pairwise(at)] == [1] * (len(at) - 1)


def replaced(rank: int) -> str:
    model, _opt, _ = stepped(rank)
    model.double()
    try:
        loss_of(model, next(iter(batches(rank, 1))))
    except zero.ZeroStateError as error:
        return str(error)
    return ""


def test_data_that_was_replaced_is_noticed() -> None:
    assert all("no longer lies in its unit's buffer" in message for message in run_ranks(replaced, 2))


def dies(rank: int) -> tuple[str, float]:
    model = zero.shard(
        seeded(Net), dp_mesh(2), stage=2, collectives=over_messages,
        overlap=zero.Overlap(publish_late=True, timeout_s=5),
    )  # fmt: skip
    opt = zero.ShardedOptimizer(model, torch.optim.SGD(model.parameters(), lr=0.1))
    told, publish = torch.distributed.distributed_c10d._get_default_store(), opt._publisher.publish

    def publish_or_die(*args: object, **options: object) -> None:
        opt._publisher.finish()  # the agreement before: no other message of the rank that dies shall be missed
        if rank == 1:
            told.wait(["rank 0 publishes"])
            os._exit(1)
        told.set("rank 0 publishes", "yes")
        publish(*args, **options)

    opt._publisher.publish = publish_or_die
    loss_of(model, next(iter(batches(rank, 1)))).backward()
    begun = time.monotonic()
    message = ""
    try:
        opt.step()
        float(model.norm.weight.sum())
    except zero.CollectiveError as error:
        message = str(error)
    try:
        float(model.norm.weight.sum())
    except zero.CollectiveError:
        return message, time.monotonic() - begun
    return "values that never came", 0.0


def test_a_dead_rank_is_named_where_its_values_are_missed() -> None:
    message, seconds = run_ranks(dies, 2, tolerate=(1,))[0]
    assert "gather of unit" in message
    assert seconds < 20


def compiled(rank: int, what: str) -> tuple[float, list[int], int, int]:
    states = []
    for late in (False, True):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        model = zero.shard(seeded(Net), dp_mesh(2), stage=2, overlap=LATE if late else None)
        for part in [model] if what == "model" else model.blocks:
            part.compile(backend="aot_eager")
        opt = zero.ShardedOptimizer(model, torch.optim.SGD(model.parameters(), lr=0.1))
        graphs = []
        for ids in batches(rank, 5):
            loss_of(model, ids).backward()
            opt.step()
            opt.zero_grad()
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        states.append(zero.full_state_dict(model))
    breaks = sum(torch._dynamo.utils.counters["graph_break"].values())
    return relative_error(states[1], states[0]), graphs, breaks, len(zero.sharded(model).units)


@pytest.mark.parametrize("what", ["model", "blocks"])
def test_compiled(what: str) -> None:
    for error, graphs, breaks, units in run_ranks(compiled, 2, what, timeout_s=240):
        assert error <= 1e-6
        assert graphs[1:] == graphs[1:2] * 4, "compiled again"
        assert breaks <= units


def test_without_overlap_nothing_is_late() -> None:
    with pytest.raises(zero.ZeroConfigError, match="publish_late"):
        zero.Overlap(enabled=False, publish_late=True)
    with pytest.raises(zero.ZeroConfigError, match="publish_late"):
        zero.Overlap(publish_late=1)  # type: ignore[arg-type]

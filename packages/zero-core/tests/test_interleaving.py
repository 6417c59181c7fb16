"""Train, evaluate, generate, fail, and use several models and optimizers, in any order: nothing changes the numbers."""

from __future__ import annotations

import pytest
import torch
import zero_core as zero
from torch import nn
from zero_core.params import Residency
from zero_core.testing import run_ranks
from zero_core_models import Block, Net, batches, dp_mesh, loss_of, plain_copy, relative_error, seeded


def pair(stage: int, mesh, build=Net, **kwargs):
    """The same model twice: sharded with its optimizer, and plain, to be trained on every rank's batches at once."""
    start = seeded(build)
    plain = plain_copy(start)
    model = zero.shard(start, mesh, stage=stage, **kwargs)
    opt = zero.ShardedOptimizer(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    return model, opt, plain, torch.optim.AdamW(plain.parameters(), lr=1e-3)


def plain_step(plain, inner, world_size: int, index: int) -> None:
    """What data parallelism computes, on one process: the mean of all ranks' losses."""
    for rank in range(world_size):
        ids = list(batches(rank, index + 1))[index]
        (loss_of(plain, ids) / world_size).backward()
    inner.step()
    inner.zero_grad()


def idle(model: nn.Module) -> None:
    """Between passes of stage 3 every unit rests as shards."""
    state = zero.sharded(model)
    assert state.stage < 3 or all(unit.residency is Residency.SHARDED for unit in state.units)


class MidwayError(Exception):
    pass


def train_between_everything_else(rank: int, world_size: int, stage: int) -> float:
    model, opt, plain, inner = pair(stage, dp_mesh(world_size))
    data = list(batches(rank, 6))
    fail_in = {"forward": False, "backward": False}

    def fail_forward(*_):
        if fail_in["forward"]:
            raise MidwayError

    def fail_backward(grad):
        if fail_in["backward"]:
            raise MidwayError

    model.blocks[1].down.register_forward_pre_hook(fail_forward)

    def hook_output(module, args, out) -> None:
        if out.requires_grad:
            out.register_hook(fail_backward)

    model.blocks[1].register_forward_hook(hook_output)
    for index, ids in enumerate(data):
        model.eval()
        with torch.no_grad():
            model(ids)
            logits = model(ids[:, :3])  # another shape, as when generating
        idle(model)
        assert logits.shape[1] == 3
        for place in fail_in:
            fail_in[place] = True
            with pytest.raises(MidwayError):
                loss_of(model, ids).backward()
            fail_in[place] = False
            opt.zero_grad()
        model.train()
        loss_of(model, ids)  # a graph that is dropped
        loss = loss_of(model, ids)
        with torch.inference_mode():
            model(ids)
        loss.backward() if stage < 3 else loss_of(model, ids).backward()
        opt.step()
        model.zero_grad() if index % 2 else opt.zero_grad()
        idle(model)
        plain_step(plain, inner, world_size, index)
    return relative_error(zero.full_state_dict(model), plain.state_dict())


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_any_order_of_use(stage: int) -> None:
    assert max(run_ranks(train_between_everything_else, 2, 2, stage)) <= 2e-6


def gan(rank: int, world_size: int, stage: int) -> tuple[float, float]:
    """Two models, two optimizers, gradients of one flowing through the other."""
    mesh = dp_mesh(world_size)

    def mlp() -> nn.Module:
        return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))

    gen, gen_opt, gen_plain, gen_inner = pair(stage, mesh, mlp)
    disc, disc_opt, disc_plain, disc_inner = pair(3 - stage, mesh, mlp)

    def step(g, g_opt, d, d_opt, inputs: list[torch.Tensor]) -> None:
        for x in inputs:
            (-d(g(x).detach()).mean() / len(inputs)).backward()
        d_opt.step()
        d_opt.zero_grad()
        for x in inputs:
            (d(g(x)).square().mean() / len(inputs)).backward()
        g_opt.step()
        g_opt.zero_grad()
        d_opt.zero_grad()

    for index in range(4):
        torch.manual_seed(index)
        inputs = list(torch.randn(world_size, 4, 8))
        step(gen, gen_opt, disc, disc_opt, [inputs[rank]])
        step(gen_plain, gen_inner, disc_plain, disc_inner, inputs)
    return (
        relative_error(zero.full_state_dict(gen), gen_plain.state_dict()),
        relative_error(zero.full_state_dict(disc), disc_plain.state_dict()),
    )


@pytest.mark.parametrize("stage", [0, 3])
def test_two_models_two_optimizers(stage: int) -> None:
    for errors in run_ranks(gan, 2, 2, stage):
        assert max(errors) <= 2e-6


def two_optimizers_of_one_model(rank: int, world_size: int, stage: int) -> float:
    start = seeded(Net)
    plain = plain_copy(start)
    model = zero.shard(start, dp_mesh(world_size), stage=stage)

    def build(m):
        matrices = [p for p in m.parameters() if p.dim() > 1]
        rest = [p for p in m.parameters() if p.dim() <= 1]
        return torch.optim.SGD(matrices, lr=0.05, momentum=0.9), torch.optim.AdamW(rest, lr=1e-3)

    opts = [zero.ShardedOptimizer(model, inner) for inner in build(model)]
    plains = build(plain)
    for index, ids in enumerate(batches(rank, 4)):
        loss_of(model, ids).backward()
        for r in range(world_size):
            (loss_of(plain, list(batches(r, index + 1))[index]) / world_size).backward()
        which = index % 2  # only one steps and forgets; the other's gradients go on accumulating
        norm = zero.clip_grad_norm(opts[which], 0.3)
        expected = torch.nn.utils.clip_grad_norm_(
            [p for g in plains[which].param_groups for p in g["params"]], 0.3
        )
        assert norm.item() == pytest.approx(expected.item(), rel=1e-5)
        assert norm.item() > 0.3, "nothing was clipped"
        opts[which].step()
        opts[which].zero_grad()
        plains[which].step()
        plains[which].zero_grad()
    return relative_error(zero.full_state_dict(model), plain.state_dict())


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_optimizers_share_a_model(stage: int) -> None:
    assert max(run_ranks(two_optimizers_of_one_model, 2, 2, stage)) <= 2e-6


class Nested(nn.Module):
    """Returns tensors inside an object of a class nobody registered."""

    class Result:
        __slots__ = ("hidden",)

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x):
        result = Nested.Result()
        result.hidden = self.inner(x if isinstance(x, torch.Tensor) else x.hidden)
        return result


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Nested() for _ in range(3))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return {"deep": [x.hidden]}


def opaque_outputs(rank: int, world_size: int) -> float:
    model, opt, plain, inner = pair(3, dp_mesh(world_size), Chain)
    for index in range(3):
        torch.manual_seed(index)
        x = torch.randn(world_size, 5, 8)
        model(x[rank])["deep"][0].square().mean().backward()
        idle(model)
        opt.step()
        opt.zero_grad()
        for part in x:
            (plain(part)["deep"][0].square().mean() / world_size).backward()
        inner.step()
        inner.zero_grad()
    return relative_error(zero.full_state_dict(model), plain.state_dict())


def test_outputs_in_unknown_containers() -> None:
    assert max(run_ranks(opaque_outputs, 2, 2)) <= 2e-6


def recompute(rank: int, world_size: int, stage: int, reentrant: bool) -> float:
    from torch.utils.checkpoint import checkpoint

    class Recomputed(Net):
        def forward(self, ids):
            x = self.embed(ids)
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=reentrant)
            return self.head(self.norm(x)) + self.bias

    model, opt, plain, inner = pair(stage, dp_mesh(world_size), Recomputed)
    for index, ids in enumerate(batches(rank, 3)):
        loss_of(model, ids).backward()
        idle(model)
        opt.step()
        opt.zero_grad()
        plain_step(plain, inner, world_size, index)
    return relative_error(zero.full_state_dict(model), plain.state_dict())


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("stage", [2, 3])
def test_torch_checkpoint_around_units(stage: int, reentrant: bool) -> None:
    assert max(run_ranks(recompute, 2, 2, stage, reentrant)) <= 2e-6


def frozen_base(rank: int, world_size: int, stage: int) -> tuple[float, int]:
    """Adapters on frozen blocks: gradients flow through weights that have none."""

    class Adapter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = Block().requires_grad_(False)
            self.a = nn.Parameter(torch.randn(19, 2) / 4)
            self.b = nn.Parameter(torch.zeros(2, 19))

        def forward(self, x):
            return self.base(x) + x @ self.a @ self.b

    class Frozen(Net):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(
                [Block().requires_grad_(False), Adapter(), Adapter(), Block().requires_grad_(False)]
            )

    start = seeded(Frozen)
    plain = plain_copy(start)
    model = zero.shard(start, dp_mesh(world_size), stage=stage, units=(Block, Adapter))
    opt = zero.ShardedOptimizer(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    inner = torch.optim.AdamW([p for p in plain.parameters() if p.requires_grad], lr=1e-3)
    for index, ids in enumerate(batches(rank, 3)):
        loss_of(model, ids).backward()
        idle(model)
        opt.step()
        opt.zero_grad()
        plain_step(plain, inner, world_size, index)
    frozen_state = sum(1 for name in zero.sharded_state(model, opt) if "optimizer" in name and "base" in name)
    return relative_error(zero.full_state_dict(model), plain.state_dict()), frozen_state


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_frozen_base_with_adapters(stage: int) -> None:
    for error, frozen_state in run_ranks(frozen_base, 2, 2, stage):
        assert error <= 2e-6
        assert frozen_state == 0


def unfreeze_later(rank: int, world_size: int, stage: int, optimizer: str, added: bool) -> float:
    """Layers wake one by one, in groups of their own or known to the optimizer from the start; one sleeps again."""

    def frozen() -> Net:
        model = seeded(Net)
        model.blocks[0].requires_grad_(False)
        model.norm.requires_grad_(False)
        model.blocks[2].up.requires_grad_(False)
        return model

    build = {
        "adamw": lambda params: torch.optim.AdamW(params, lr=1e-3),
        "rprop": lambda params: torch.optim.Rprop(params, lr=1e-3),
        "whole adamw": lambda params: torch.optim.AdamW(params, lr=1e-3),
    }[optimizer]
    model, plain = frozen(), plain_copy(frozen())
    model = zero.shard(model, dp_mesh(world_size), stage=stage)
    chosen = [[p for p in each.parameters() if p.requires_grad or not added] for each in (model, plain)]
    opt = zero.ShardedOptimizer(model, build(chosen[0]), whole_tensors="whole" in optimizer)
    inner = build(chosen[1])
    at_the_end: list[int] = []
    for index, ids in enumerate(batches(rank, 8)):
        for each, steps in ((model, opt), (plain, inner)):
            if index in (2, 3, 4):
                layer = {2: each.norm, 3: each.blocks[0].down, 4: each.blocks[0]}[index]
                layer.requires_grad_(True)
                if added:
                    new = [p for name, p in layer.named_parameters() if index != 4 or "down" not in name]
                    steps.add_param_group({"params": new, "lr": 1e-2})
            if index == 5:
                each.blocks[1].requires_grad_(False)
        if index == 7:
            model.embed.weight.register_post_accumulate_grad_hook(
                lambda _: at_the_end.append(len(zero.sharded(model).reducer._launched))
            )
        loss_of(model, ids).backward()
        opt.step()
        opt.zero_grad()
        plain_step(plain, inner, world_size, index)
    assert at_the_end[0] >= len(zero.sharded(model).reducer.lanes) - 1, (
        "what is frozen again holds others back"
    )
    return relative_error(zero.full_state_dict(model), plain.state_dict())


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize(
    ("stage", "optimizer"),
    [(0, "adamw"), (1, "rprop"), (2, "adamw"), (2, "whole adamw"), (3, "adamw"), (3, "whole adamw")],
)
def test_layers_may_be_unfrozen_and_frozen_on_the_way(stage: int, optimizer: str, added: bool) -> None:
    assert max(run_ranks(unfreeze_later, 2, 2, stage, optimizer, added)) <= 5e-6


def first_pass_after_an_unfreeze(rank: int, world_size: int, stage: int) -> None:
    """Its gradients count at once, in the norm, in a clip and in `zero_grad`."""

    def built():
        model = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(3)))
        model[0].requires_grad_(False)
        return model

    model, x = zero.shard(seeded(built), dp_mesh(world_size), stage=stage), torch.ones(1, 8)
    plain = seeded(built)
    opt = zero.ShardedOptimizer(model, torch.optim.SGD(model.parameters(), lr=1.0))
    inner = torch.optim.SGD(plain.parameters(), lr=1.0)
    for each in (model, plain):
        each(x).sum().backward()
    zero.grad_norm(opt)
    for each, steps in ((model, opt), (plain, inner)):
        steps.zero_grad()
        each[0].requires_grad_(True)
        each(x).square().sum().backward()
        steps.zero_grad()  # the next pass alone counts
        each(x).square().sum().backward()
    expected = nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
    assert zero.clip_grad_norm(opt, 0.1).item() == pytest.approx(expected.item(), rel=1e-5)
    for steps in (opt, inner):
        steps.step()
    assert relative_error(zero.full_state_dict(model), plain.state_dict()) < 1e-6


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_gradients_of_unfrozen_layers_count_from_their_first_pass(stage: int) -> None:
    run_ranks(first_pass_after_an_unfreeze, 2, 2, stage)

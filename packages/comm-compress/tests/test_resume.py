"""A run goes on where it was saved: bit for bit on as many ranks, with everything that is owed on any other number."""

from __future__ import annotations

import io
from typing import Any

import comm_compress as cc
import pytest
import torch
from optimizer_models import BUILD, SMALL, Net, loss_of, same, values
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from zero_core.testing import run_ranks

# In warm-up; at the freeze (or the last update of the variance); compressed (0/1 Adam: between synchronizations).
SAVED_AT = (3, 6, 14)
LAST = 18


def make(kind: str, **more: Any) -> tuple[Net, Any]:
    model = Net(more.pop("dtype", torch.float32))
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "lr": 3e-3}]
    return model, BUILD[kind](groups, **{"compression": SMALL, **more})


def steps(model: Net, optimizer: Any, rank: int, first: int, last: int) -> None:
    for step in range(first, last + 1):
        loss_of(model, rank, step, side=step % 5 != 0).backward()
        optimizer.step()
        optimizer.zero_grad()


def through_a_file(value: Any) -> Any:
    """What a program would save and load; nothing but plain values and tensors."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def go_on(rank: int, kind: str, more: dict[str, Any]) -> None:
    model, optimizer = make(kind, **more)
    saved = {}
    for step in range(1, LAST + 1):
        steps(model, optimizer, rank, step, step)
        if step in SAVED_AT:
            saved[step] = through_a_file((values(model), optimizer.state_dict()))
    for step, (parameters, state) in saved.items():
        other, resumed = make(kind, **more)
        other.load_state_dict(parameters)
        resumed.load_state_dict(state)
        assert same(values(other), parameters)
        steps(other, resumed, rank, step + 1, LAST)
        assert same(values(other), values(model)), step
        assert resumed.num_steps == optimizer.num_steps
        assert resumed.progress() == optimizer.progress()


@pytest.mark.parametrize("kind", list(BUILD))
@pytest.mark.parametrize("world", [1, 2, 3])
def test_bit_for_bit_on_as_many_ranks(kind: str, world: int) -> None:
    run_ranks(go_on, world, kind, {})


@pytest.mark.parametrize("kind", list(BUILD))
def test_bit_for_bit_with_masters_or_shards(kind: str) -> None:
    run_ranks(go_on, 2, kind, {"dtype": torch.bfloat16})
    if kind != "ZeroOneAdam":
        run_ranks(go_on, 3, kind, {"shard": True})
        run_ranks(go_on, 2, kind, {"shard": True, "dtype": torch.float16})


def automatic(rank: int) -> None:
    """What a variance has been is part of the state."""
    more: dict[str, Any] = {"freeze_step": None, "betas": (0.9, 0.8), "freeze_threshold": 0.7, "lr": 1e-3}
    model, optimizer = make("OneBitAdam", **more)
    steps(model, optimizer, rank, 1, 4)
    saved = through_a_file((values(model), optimizer.state_dict()))
    steps(model, optimizer, rank, 5, 30)
    assert optimizer.phase.value == "compressed"
    other, resumed = make("OneBitAdam", **more)
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    steps(other, resumed, rank, 5, 30)
    assert same(values(other), values(model))


def test_an_automatic_freeze_is_resumed() -> None:
    run_ranks(automatic, 2)


# -- another number of ranks --------------------------------------------------------------------------------------


def save(rank: int, kind: str, more: dict[str, Any]) -> dict[int, Any]:
    model, optimizer = make(kind, **more)
    saved = {}
    for step in range(1, max(SAVED_AT) + 1):
        steps(model, optimizer, rank, step, step)
        if step in SAVED_AT:
            shards = {
                name: (shard.global_shape, shard.offsets[0], shard.local.clone())
                for name, shard in optimizer.sharded_state().items()
            }
            saved[step] = through_a_file((values(model), optimizer.state_dict(), shards, optimizer.scalars()))
    return saved


def whole_state(saved: list[Any]) -> dict[str, torch.Tensor]:
    """Every logical tensor, put together from the ranges of all ranks."""
    found: dict[str, torch.Tensor] = {}
    for _, _, shards, _ in saved:
        for name, (shape, start, local) in shards.items():
            flat = found.setdefault(name, torch.full((torch.Size(shape).numel(),), float("nan")))
            flat[start : start + local.numel()] = local
    assert all(torch.isfinite(flat).all() for flat in found.values())  # no range is missing
    return found


def load(rank: int, kind: str, more: dict[str, Any], saved: list[Any], way: str) -> dict[str, Any]:
    """On this number of ranks: the state after loading, and how training goes on."""
    model, optimizer = make(kind, **more)
    model.load_state_dict(saved[0][0])
    if way == "merged":
        optimizer.load_state_dict(through_a_file(cc.merge_states([state for _, state, _, _ in saved])))
    else:
        stored, scalars = whole_state(saved), saved[0][3]
        room = optimizer.sharded_room(scalars)
        for name, shard in room.items():
            start = shard.offsets[0]
            shard.local.copy_(stored[name][start : start + shard.local.numel()])
        optimizer.load_sharded_state(scalars, room)
    loaded = {
        name: (shard.global_shape, shard.offsets[0], shard.local.clone())
        for name, shard in optimizer.sharded_state().items()
    }
    steps(model, optimizer, rank, 15, 22)
    if kind == "ZeroOneAdam":
        optimizer.synchronize()
    return {"saved": (None, None, loaded, None), "values": values(model), "progress": optimizer.progress()}


def load_all(rank: int, kind: str, more: dict[str, Any], by_rank: list[dict[int, Any]]) -> dict[Any, Any]:
    return {
        (at, way): load(rank, kind, more, [each[at] for each in by_rank], way)
        for at in SAVED_AT
        for way in ("merged", "ranges")
    }


def means_of_own(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors by name; of those that ranks have their own of, the mean."""
    own: dict[str, list[torch.Tensor]] = {}
    for name, flat in state.items():
        base, _, last = name.rpartition("_")
        own.setdefault(base if last.isdigit() else name, []).append(flat)
    return {name: torch.stack(flats).mean(0) for name, flats in own.items()}


@pytest.mark.parametrize("kind", list(BUILD))
@pytest.mark.parametrize(("old", "new"), [(1, 2), (2, 3), (4, 2)])
def test_redealt_to_another_number_of_ranks(kind: str, old: int, new: int) -> None:
    more = {"shard": True} if kind != "ZeroOneAdam" and old == 2 else {}
    by_rank = run_ranks(save, old, kind, more)
    loaded = run_ranks(load_all, new, kind, more, by_rank)
    for at, way in loaded[0]:
        before = means_of_own(whole_state([rank[at] for rank in by_rank]))
        ranks = [rank[at, way] for rank in loaded]
        after = means_of_own(whole_state([rank["saved"] for rank in ranks]))
        assert after.keys() == before.keys()
        for name, tensor in before.items():
            torch.testing.assert_close(after[name], tensor, rtol=1e-6, atol=1e-7)
        assert all(same(rank["values"], ranks[0]["values"]) for rank in ranks)
        assert all(rank["progress"] == ranks[0]["progress"] for rank in ranks)
        assert all(torch.isfinite(value).all() for value in ranks[0]["values"].values())
    names = {name.rsplit(".", 1)[1] for name in before}
    assert {"exp_avg", "worker_error", "server_error"} <= names  # the last was compressed
    if kind == "ZeroOneAdam":
        assert "drift" in names  # and between synchronizations


def refuse(rank: int) -> None:
    model, optimizer = make("OneBitAdam")
    steps(model, optimizer, rank, 1, 8)
    state = optimizer.state_dict()
    _, lamb = make("OneBitLamb")
    with pytest.raises(cc.CompressStateError, match=r"state of OneBitLamb, got that of OneBitAdam"):
        lamb.load_state_dict(state)
    moved = {**state, "compression": {**state["compression"], "rank": 5, "world": 6}}
    _, other = make("OneBitAdam")
    with pytest.raises(cc.CompressStateError, match=r"rank \d of 2, got that of rank 5 of 6; .*merge_states"):
        other.load_state_dict(moved)
    _, rebucketed = make("OneBitAdam", compression=cc.Compression(bucket_bytes=1 << 20))
    if rank == 1:  # the first rank's chunk of a larger bucket happens to begin alike
        with pytest.raises(cc.CompressStateError, match=r"server_error.*merge_states"):
            rebucketed.load_state_dict(state)
    assert other.num_steps == 0
    with pytest.raises(
        cc.CompressStateError, match=r"expected the state of OneBitAdam, got one without 'compression'"
    ):
        other.load_state_dict(torch.optim.AdamW(model.parameters()).state_dict())
    with pytest.raises(ValueError, match="parameter group"):
        other.load_state_dict({**state, "param_groups": []})
    with pytest.raises(
        cc.CompressStateError, match=r"'param.0' \(\): expected 1 elements, got 12; .* another model"
    ):
        cc.OneBitAdam(model.parameters()).load_state_dict(state)
    with pytest.raises(cc.CompressStateError, match=r"every rank once, of one run, got ranks \[0, 0\]"):
        cc.merge_states([{**state, "compression": {**state["compression"], "rank": 0}}] * 2)


def test_states_of_others_are_refused() -> None:
    run_ranks(refuse, 2)


def by_torchs_numbers(rank: int) -> None:
    """State dicts have torch's numbers of parameters; torch's checkpoint, which would take a step first, is refused."""
    model = torch.nn.ModuleDict({"frozen": torch.nn.Linear(2, 2, bias=False), "live": torch.nn.Linear(3, 5)})
    model["frozen"].requires_grad_(False)
    torch.manual_seed(0)
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(torch.randn(param.shape))
    optimizer = cc.OneBitAdam(model.parameters(), freeze_step=2)
    for _ in range(3):
        model["live"](torch.ones(1, 3)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    saved = through_a_file(optimizer.state_dict())
    assert {key: each["exp_avg"].shape for key, each in saved["state"].items()} == {1: (5, 3), 2: (5,)}
    optimizer.load_state_dict(saved)
    momenta = {key: each["exp_avg"].clone() for key, each in saved["state"].items()}
    for ask in (
        lambda: get_optimizer_state_dict(model, optimizer),
        lambda: set_optimizer_state_dict(model, optimizer, saved),
    ):
        with pytest.raises(cc.CompressStateError, match=r"save optimizer\.state_dict\(\) of every rank"):
            ask()
    assert optimizer.num_steps == 3
    assert all(param.grad is None for param in model.parameters())
    now = optimizer.state_dict()["state"]
    assert all(torch.equal(now[key]["exp_avg"], momentum) for key, momentum in momenta.items())


def test_torchs_numbers_and_torchs_checkpoint() -> None:
    run_ranks(by_torchs_numbers, 2)


# -- with other parameters, or other options --------------------------------------------------------------------


def unfrozen_later(rank: int, kind: str) -> None:
    """The order in which parameters came to need gradients is not that of the run which goes on."""

    def pair() -> torch.nn.Module:
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.Tanh(), torch.nn.Linear(6, 6))

    def train(model: torch.nn.Module, optimizer: Any, steps: range) -> None:
        for step in steps:
            x = torch.randn(4, 6, generator=torch.Generator().manual_seed(10 * step + rank))
            (model(x) - x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    model = pair()
    model[0].requires_grad_(False)
    optimizer = BUILD[kind](model.parameters(), **({} if kind == "ZeroOneAdam" else {"freeze_step": 6}))
    train(model, optimizer, range(2))
    if kind != "ZeroOneAdam":
        model[0].requires_grad_(True)
    train(model, optimizer, range(2, 4))
    parameters, state = through_a_file((model.state_dict(), optimizer.state_dict()))
    other = pair()
    if kind == "ZeroOneAdam":
        other[0].requires_grad_(False)
    other.load_state_dict(parameters)
    resumed = BUILD[kind](other.parameters(), **({} if kind == "ZeroOneAdam" else {"freeze_step": 6}))
    resumed.load_state_dict(state)
    for each, named in ((model, optimizer), (other, resumed)):
        train(each, named, range(4, 6))
    mine, theirs = dict(model.named_parameters()), dict(other.named_parameters())
    # Buckets are dealt out otherwise, so that sums may round otherwise: exact steps do not.
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    larger = BUILD[kind](torch.nn.Sequential(*pair(), torch.nn.Linear(6, 6)).parameters())
    with pytest.raises(cc.CompressStateError, match="expected '"):
        larger.load_state_dict(state)


@pytest.mark.parametrize("kind", list(BUILD))
def test_parameters_are_known_by_name(kind: str) -> None:
    run_ranks(unfrozen_later, 2, kind)


def without_gradients(rank: int) -> None:
    """0/1 Adam, alone: what moves by its momentum lands with the others, what is frozen stays; resumed bit for bit."""

    def make() -> tuple[list[torch.nn.Parameter], cc.ZeroOneAdam]:
        params = [torch.nn.Parameter(torch.ones(4)) for _ in range(4)]
        intervals = {"var_freeze_step": 3, "local_step_scaler": 1, "local_step_clipper": 4}
        return params, cc.ZeroOneAdam(params, lr=1e-2, weight_decay=0.1, **intervals)

    def train(params: list[torch.nn.Parameter], optimizer: cc.ZeroOneAdam, step: int) -> None:
        always, paused, frozen, late = params
        frozen.requires_grad_(step < 6)
        for param, has in (
            (always, True),
            (paused, step < 6),
            (frozen, step < 6),
            (late, step == 8 and rank == 1),
        ):
            param.grad = torch.full((4,), 1.0 + rank) if has else None
        optimizer.step()

    params, optimizer = make()
    saved = {}
    seen = []
    for step in range(1, 16):
        train(params, optimizer, step)
        seen.append([float(param.detach()[0]) for param in params])
        saved[step] = through_a_file(([param.detach() for param in params], optimizer.state_dict()))
        assert (optimizer.steps_since_sync == 0) == (step in (1, 2, 3, 7, 11, 15))
    _, paused, frozen, late = (torch.tensor(each) for each in zip(*seen, strict=True))
    synchronized = [2, 6, 10, 14]
    assert (paused[synchronized].diff() < 0).all()  # carried on, and not back
    assert (frozen[6:] == frozen[6]).all()
    assert frozen[6] < frozen[2]
    assert (late[:10] == 1).all()
    assert late[10] < 1
    for step in (5, 8, 9, 11):
        others, resumed = make()
        for other, value in zip(others, saved[step][0], strict=True):
            other.data.copy_(value)
        resumed.load_state_dict(saved[step][1])
        for after in range(step + 1, 16):
            train(others, resumed, after)
        assert all(torch.equal(other, param) for other, param in zip(others, params, strict=True))


def test_parameters_without_gradients_between_synchronizations() -> None:
    run_ranks(without_gradients, 2)


def another_shard(rank: int, kind: str) -> None:
    """State that was whole goes on in parts, and the other way round; parameters are loaded before it, or after."""
    for before in (False, True):
        model, optimizer = make(kind, shard=before)
        steps(model, optimizer, rank, 1, 3)
        saved: list[Any] = [None, None]
        shards = {
            name: (s.global_shape, s.offsets[0], s.local) for name, s in optimizer.sharded_state().items()
        }
        whole = values(model), optimizer.state_dict(), shards, optimizer.scalars()
        torch.distributed.all_gather_object(saved, through_a_file(whole))
        loaded = []
        for way in ("merged", "ranges"):
            other, resumed = make(kind, shard=not before)
            if way == "merged":
                other.load_state_dict(saved[0][0])
                resumed.load_state_dict(cc.merge_states([state for _, state, _, _ in saved]))
            else:
                stored, scalars = whole_state(saved), saved[0][3]
                room = resumed.sharded_room(scalars)
                for name, shard in room.items():
                    shard.local.copy_(stored[name][shard.offsets[0] :][: shard.local.numel()])
                resumed.load_sharded_state(scalars, room)
                other.load_state_dict(saved[0][0])
            loaded.append((other, resumed))
        for other, resumed in [*loaded, (model, optimizer)]:
            steps(other, resumed, rank, 4, 5)
        for other, _ in loaded:
            for name, value in values(other).items():
                torch.testing.assert_close(value, values(model)[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["OneBitAdam", "OneBitLamb"])
def test_another_shard(kind: str) -> None:
    run_ranks(another_shard, 2, kind)


def another_clipper(rank: int) -> None:
    """0/1 Adam that stepped alone goes on as one that never does, and the other way round."""
    for before, after in ((3, 1), (1, 3)):
        model, optimizer = make("ZeroOneAdam", local_step_clipper=before)
        steps(model, optimizer, rank, 1, 14)
        assert (optimizer.steps_since_sync > 0) == (before > 1)
        saved = through_a_file((values(model), optimizer.state_dict()))
        other, resumed = make("ZeroOneAdam", local_step_clipper=after)
        other.load_state_dict(saved[0])
        resumed.load_state_dict(saved[1])
        assert same(values(other), values(model))
        steps(other, resumed, rank, 15, 24)
        resumed.synchronize()
        told = [torch.empty_like(other.first.weight) for _ in range(2)]
        torch.distributed.all_gather(told, other.first.weight.detach().contiguous())
        assert torch.equal(told[0], told[1])


def test_another_local_step_clipper() -> None:
    run_ranks(another_clipper, 2)


def an_earlier_freeze(rank: int) -> None:
    """Where the variance was to be updated for longer: it is frozen now, and ranks may step alone."""
    model, optimizer = make("ZeroOneAdam", var_freeze_step=1000)
    steps(model, optimizer, rank, 1, 8)
    state, parameters = through_a_file((optimizer.state_dict(), values(model)))
    local = {"var_freeze_step": 4, "local_step_scaler": 1, "local_step_clipper": 4}
    other, resumed = make("ZeroOneAdam", **local)
    other.load_state_dict(parameters)
    resumed.load_state_dict(state)
    steps(other, resumed, rank, 9, 20)
    resumed.synchronize()
    found = torch.cat([param.detach().reshape(-1) for param in other.parameters()])
    every = [torch.empty_like(found) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(every, found)
    assert all(torch.equal(each, every[0]) for each in every)
    assert bool(torch.isfinite(found).all())
    counts = [line.calls for line in cc.traffic(resumed).lines]
    assert len(counts) > 1, "some steps sent nothing"


def test_an_earlier_freeze() -> None:
    run_ranks(an_earlier_freeze, 2)


def frozen_yet(rank: int) -> None:
    """An optimizer whose parameters are all frozen knows where they are."""
    params = [torch.nn.Parameter(torch.zeros(3, device="meta"), requires_grad=False)]
    assert cc.OneBitAdam(params, lr=0.1)._device().type == "meta"


def test_parameters_that_are_frozen_yet() -> None:
    run_ranks(frozen_yet, 1)

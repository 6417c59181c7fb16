"""Layers in tiles compute what the whole ones do, keep their state dict, and are never whole at stage 3."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
import zero_core as zero
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from zero_core.testing import run_ranks
from zero_core.tiles import TiledEmbedding, TiledLinear, plan_grid
from zero_core.units import find_units
from zero_core_models import dp_mesh, relative_error, seeded

VOCAB, WIDTH = 41, 24
STAGES = [0, 1, 2, 3]


@settings(deadline=None)
@given(rows=st.integers(1, 200), cols=st.integers(1, 40), most=st.integers(1, 9000), first=st.integers(0, 1))
def test_a_grid_covers_the_matrix_with_tiles_within_the_budget(
    rows: int, cols: int, most: int, first: int
) -> None:
    grid = plan_grid((rows, cols), most, first=first)
    assert grid.shape == (rows, cols)
    for ranges, total in ((grid.rows, rows), (grid.cols, cols)):
        assert [lo for lo, _ in ranges] == [0, *(hi for _, hi in ranges)][:-1], (
            "they do not follow each other"
        )
        assert ranges[-1][1] == total
        sizes = {hi - lo for lo, hi in ranges[:-1]}
        assert len(sizes) <= 1
        assert 0 < ranges[-1][1] - ranges[-1][0] <= max(sizes, default=total)
    largest = max((right - left) * (hi - lo) for lo, hi in grid.rows for left, right in grid.cols)
    assert largest <= most
    cut, other = (grid.rows, grid.cols) if first == 0 else (grid.cols, grid.rows)
    assert len(other) == 1 or (rows, cols)[1 - first] > most, "cut along the other dimension without need"
    assert len(cut) == 1 or rows * cols > most, "cut without need"


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 4 * WIDTH + 3)
        self.down = nn.Linear(4 * WIDTH + 3, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH, padding_idx=3)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def batch(seed: int) -> torch.Tensor:
    return torch.randint(0, VOCAB, (3, 7), generator=torch.Generator().manual_seed(seed))


def loss_of(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(ids).float().flatten(0, 1), ids.roll(-1, 1).flatten())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("rows", "max_bytes", "grid"),
    [(128, 64 * 4 * 32, (4, 1)), (101, 64 * 4 * 40, (4, 1)), (23, 64 * 4 * 5, (5, 1)), (3, 90, (3, 3))],
)
def test_linear(rows: int, max_bytes: int, grid: tuple[int, int], bias: bool) -> None:
    layer = seeded(lambda: nn.Linear(64, rows, bias=bias))
    tiled = zero.tile_linear(copy.deepcopy(layer), max_bytes=max_bytes)
    assert isinstance(tiled, TiledLinear)
    assert (len(tiled.grid.rows), len(tiled.grid.cols)) == grid
    x = torch.randn(2, 5, 64)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [each(given) for each, given in zip((layer, tiled), inputs, strict=True)]
    toward = torch.randn(2, 5, rows)
    for output in outputs:
        (output * toward).sum().backward()
    weight_grad = torch.zeros(rows, 64)
    for tile, place in zip(tiled.parts(), tiled.grid.places(), strict=True):
        weight_grad[place] = tile.weight.grad
    if rows == 128:  # cut along the output dimension, at multiples of a kernel's blocks
        assert torch.equal(outputs[0], outputs[1])
        assert torch.equal(layer.weight.grad, weight_grad)
    found = {"output": outputs[1].detach(), "weight": weight_grad, "input": inputs[1].grad}
    wanted = {"output": outputs[0].detach(), "weight": layer.weight.grad, "input": inputs[0].grad}
    if bias:
        found["bias"], wanted["bias"] = tiled.bias.grad, layer.bias.grad
    assert relative_error(found, wanted) <= 1e-6


@pytest.mark.parametrize(("max_bytes", "grid"), [(41 * 4 * 7, (1, 4)), (41 * 4, (1, 24)), (80, (3, 24))])
def test_embedding(max_bytes: int, grid: tuple[int, int]) -> None:
    layer = seeded(lambda: nn.Embedding(41, 24, padding_idx=-1))
    tiled = zero.tile_linear(copy.deepcopy(layer), max_bytes=max_bytes)
    assert isinstance(tiled, TiledEmbedding)
    assert (len(tiled.grid.rows), len(tiled.grid.cols)) == grid
    ids = torch.cat([torch.arange(41), torch.tensor([0, 0, 13, 40])]).view(5, 9)
    toward = torch.randn(5, 9, 24)
    for each in (layer, tiled):
        (each(ids) * toward).sum().backward()
    assert torch.equal(layer(ids), tiled(ids))
    whole = torch.zeros(41, 24)
    for tile, place in zip(tiled.parts(), tiled.grid.places(), strict=True):
        whole[place] = tile.weight.grad
    assert torch.equal(whole, layer.weight.grad)
    for wrong in (-1, 41):
        with pytest.raises(IndexError):
            tiled(torch.tensor([wrong]))


def test_state_dict_is_the_untiled_one() -> None:
    plain = seeded(Net)
    model = zero.tile_linear(seeded(Net, 1), max_bytes=2000)
    assert isinstance(model.blocks[1].up, TiledLinear)
    assert isinstance(model.embed, TiledEmbedding)
    expected = plain.state_dict()
    assert model.load_state_dict(expected).missing_keys == []
    found = model.state_dict()
    assert list(found) == list(expected)
    assert relative_error(found, expected) == 0
    assert relative_error(copy.deepcopy(model).state_dict(), expected) == 0
    assert torch.allclose(model(batch(0)), plain(batch(0)), atol=1e-5)
    plain.load_state_dict(found)
    broken = dict(expected)
    broken["stray"] = broken.pop("head.bias")
    broken["blocks.0.up.tiles.0.weight"] = broken.pop("blocks.0.up.weight")
    broken["head.weight"] = torch.zeros(2, 2)
    with pytest.raises(RuntimeError) as info:
        model.load_state_dict(broken)
    for part in (
        '"head.bias"',
        '"blocks.0.up.weight"',
        '"stray"',
        "tiles.0",
        "size mismatch for head.weight",
    ):
        assert part in str(info.value)
    model.load_state_dict({n: v + 1 for n, v in expected.items()}, assign=True)
    assert relative_error(model.state_dict(), {n: v + 1 for n, v in expected.items()}) == 0


def training(rank: int, world_size: int, stage: int, dtype: torch.dtype) -> float:
    mesh = dp_mesh(world_size)
    precision = zero.Precision(compute=dtype)
    models, opts = [], []
    for tiled in (False, True):
        model = seeded(Net)
        if tiled:
            zero.tile_linear(model, max_bytes=2000)
        models.append(zero.shard(model, mesh, stage=stage, precision=precision))
        opts.append(zero.ShardedOptimizer(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)))
    for step in range(4):
        for model, opt in zip(models, opts, strict=True):
            loss_of(model, batch(10 * rank + step)).backward()
            zero.clip_grad_norm(opt, 0.5)
            opt.step()
            opt.zero_grad()
    whole, tiles = (zero.full_state_dict(model) for model in models)
    assert list(whole) == list(tiles)
    error = relative_error(tiles, whole)
    streamed = {name: tensor.clone() for name, tensor in zero.stream_full(models[1])}
    assert relative_error({name: streamed[name] for name in tiles}, tiles) == 0
    part = zero.full_state_dict(models[1].blocks[0])
    assert list(part) == list(Block().state_dict())
    zero.load_full_state_dict(models[1], {n: v + 1 for n, v in whole.items()} if rank == 0 else None)
    assert relative_error(zero.full_state_dict(models[1]), {n: v + 1 for n, v in whole.items()}) == 0
    with pytest.raises(zero.ZeroConfigError, match=r"'head\.weight': expected shape \(41, 24\), got \(3,\)"):
        zero.load_full_state_dict(models[1], whole | {"head.weight": torch.ones(3)} if rank == 0 else None)
    return error


@pytest.mark.parametrize(("stage", "dtype"), [*((s, torch.float32) for s in STAGES), (3, torch.bfloat16)])
def test_training_equals_the_untiled_model(stage: int, dtype: torch.dtype) -> None:
    limit = 1e-6 if dtype == torch.float32 else 2e-2  # a tile's part of a sum is rounded to bf16
    assert max(run_ranks(training, 2, 2, stage, dtype)) <= limit


def gradients(rank: int, world_size: int, stage: int) -> tuple[float, float]:
    """Of one backward, with rows whole and with rows cut too."""
    mesh, errors = dp_mesh(world_size), []
    plain = seeded(Net)
    (loss_of(plain, batch(0)) / 2 + loss_of(plain, batch(1)) / 2).backward()
    for max_bytes in (2000, 300):
        model = zero.shard(zero.tile_linear(seeded(Net), max_bytes=max_bytes), mesh, stage=stage)
        loss_of(model, batch(rank)).backward()
        worst = 0.0
        for prefix, module in model.named_modules():
            for i, place in enumerate(module.grid.places() if hasattr(module, "grid") else ()):
                found = zero.get_full(model, f"{prefix}.tiles.{i}.weight", what="grad")
                want = plain.get_submodule(prefix).weight.grad
                error = (found - want[place]).norm() / want.norm()
                worst = max(worst, float(error))
        errors.append(worst)
    return errors[0], errors[1]


@pytest.mark.parametrize("stage", [1, 3])
def test_gradients_equal_the_untiled_model(stage: int) -> None:
    for errors in run_ranks(gradients, 2, 2, stage):
        assert max(errors) <= 1e-6


BIG, TILES = 256, 4


class Big(nn.Module):
    """One layer of four times the budget between small ones."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, BIG)
        self.big = nn.Linear(BIG, BIG)
        self.last = nn.Linear(BIG, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.big(torch.tanh(self.first(x)))))


def peak(rank: int, world_size: int, tiled: bool, prefetch: int | None) -> tuple[int, int]:
    """Most bytes of full parameters at any module's forward or backward, and how often that was looked at."""
    model = seeded(Big)
    if tiled:
        zero.tile_linear(model, max_bytes=BIG * BIG * 4 // TILES)
    overlap = zero.Overlap(prefetch_bytes=prefetch)
    model = zero.shard(model, dp_mesh(world_size), stage=3, overlap=overlap)
    opt = zero.ShardedOptimizer(model, torch.optim.SGD(model.parameters(), lr=1e-2))
    seen: list[int] = []

    def look(*_) -> None:
        seen.append(sum(unit.full.untyped_storage().nbytes() for unit in zero.sharded(model).units))

    for step in range(3):
        if step == 2:
            for module in model.modules():
                if not list(module.children()):
                    module.register_forward_hook(look)
                    module.register_full_backward_hook(look)
            for param in model.parameters():
                param.register_hook(look)
        torch.manual_seed(step)
        model(torch.randn(4, 8)).square().mean().backward()
        opt.step()
        opt.zero_grad()
    return max(seen), len(seen)


@pytest.mark.parametrize(("prefetch", "tiles_at_once"), [(None, 3), (0, 2)])
def test_a_large_layer_is_never_whole(prefetch: int | None, tiles_at_once: int) -> None:
    layer = BIG * BIG * 4
    rest = 4 * (8 * BIG + BIG + BIG + 8 * BIG + 8) + 4096  # what belongs to the root, and padding
    for bytes_seen, looks in run_ranks(peak, 2, 2, True, prefetch):
        assert looks > 2 * TILES, "tiles were not looked at"
        assert layer / TILES <= bytes_seen <= rest + tiles_at_once * layer / TILES
    for bytes_seen, _ in run_ranks(peak, 2, 2, False, prefetch):
        assert bytes_seen >= layer, "the untiled layer is whole"


def under_construction(rank: int, world_size: int) -> float:
    plain = seeded(Net)
    mesh = dp_mesh(world_size)
    with zero.sharded_init(mesh, stage=3, whole_bytes=0):
        model = zero.tile_linear(seeded(Net), max_bytes=2000)
        assert "sharded" in repr(model.blocks[0].up.tiles[0].weight)
    model = zero.shard(model, mesh, stage=3)
    assert relative_error(zero.full_state_dict(model), plain.state_dict()) == 0
    loss_of(model, batch(rank)).backward()
    with torch.no_grad():
        return abs(float(loss_of(model, batch(0)) - loss_of(plain, batch(0))))


def test_under_sharded_init() -> None:
    assert max(run_ranks(under_construction, 2, 2)) <= 1e-5


def meta(rank: int, world_size: int) -> None:
    with torch.device("meta"):
        model = zero.tile_linear(Net(), max_bytes=2000)
    model = zero.shard(model, dp_mesh(world_size), stage=3)
    found, usual = zero.full_state_dict(model), seeded(Net).state_dict()
    assert not found["embed.weight"][3].any(), "the padding row"
    for name in ("embed.weight", "blocks.0.up.weight", "blocks.0.up.bias"):
        assert float(found[name].std()) == pytest.approx(float(usual[name].std()), rel=0.2)


def test_a_meta_model_fills_its_tiles() -> None:
    run_ranks(meta, 2, 2)


def test_units_are_tiles_whatever_the_choice() -> None:
    model = zero.tile_linear(Net(), max_bytes=2000)
    num_tiles = sum(type(module).__name__ == "Tile" for module in model.modules())
    for choice in (None, Block, lambda name, module: name == "head"):
        names = [spec.name for spec in find_units(model, choice)]
        assert sum(".tiles." in name for name in names) == num_tiles
    assert "blocks.0" in [spec.name for spec in find_units(model)], "the rest of a block is still a unit"
    shared = nn.Linear(24, 24)
    twice = zero.tile_linear(nn.Sequential(shared, nn.Tanh(), shared), max_bytes=24 * 24)
    assert twice[0] is twice[2]
    assert [spec.name for spec in find_units(twice)].count("0.tiles.1") == 1


def test_refusals_change_nothing(caplog: pytest.LogCaptureFixture) -> None:
    tied = Net()
    tied.head.weight = tied.embed.weight
    with pytest.raises(
        zero.ZeroConfigError, match=r"'embed\.weight', 'head\.weight' are one tied weight.*layers="
    ):
        zero.tile_linear(tied, max_bytes=1000)
    assert type(tied.head) is nn.Linear
    zero.tile_linear(tied, max_bytes=1000, layers=lambda name, module: name.startswith("blocks"))
    assert type(tied.head) is nn.Linear
    assert isinstance(tied.blocks[0].up, TiledLinear)
    with pytest.raises(zero.ZeroConfigError, match="max_norm"):
        zero.tile_linear(nn.Embedding(9, 9, max_norm=1.0), max_bytes=40)
    with pytest.raises(zero.ZeroConfigError, match=r"scale_grad_by_freq.*raise max_bytes to 36"):
        zero.tile_linear(nn.Embedding(9, 9, scale_grad_by_freq=True), max_bytes=20)
    with pytest.raises(zero.ZeroConfigError, match="expected at least 4, an element of '0', got 2"):
        zero.tile_linear(nn.Sequential(nn.Linear(3, 3)), max_bytes=2)

    class Scaled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    with caplog.at_level(logging.WARNING):
        kept = zero.tile_linear(nn.Sequential(Scaled(9, 9)), max_bytes=20)
    assert type(kept[0]) is Scaled
    assert "'0' is a Scaled and stays whole" in caplog.text


def already_sharded(rank: int, world_size: int) -> None:
    model = zero.shard(Net(), dp_mesh(world_size), stage=1)
    with pytest.raises(zero.ZeroConfigError, match="sharded already; tile it before shard"):
        zero.tile_linear(model, max_bytes=1000)


def test_a_sharded_model_is_refused() -> None:
    run_ranks(already_sharded, 1, 1)

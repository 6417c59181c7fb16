"""Inputs wait in a pool on the host: bounded, used again, fetched one checkpoint ahead; on the CPU by the same way."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import zero_core as zero
from checkpoint_models import LAYERS, WIDTH, Layer, Layers, gradients, same
from zero_core.checkpointing.host import PAGE_BYTES, HostPool, _Lane

ROWS = PAGE_BYTES // (4 * WIDTH) * 3
INPUT = ROWS * WIDTH * 4
BUFFER = INPUT + -INPUT % PAGE_BYTES


@pytest.fixture
def x() -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(ROWS, WIDTH, requires_grad=True)


@pytest.fixture
def model() -> Layers:
    torch.manual_seed(2)
    return Layers()


def pool_of(chosen: zero.CheckpointPolicy) -> HostPool:
    pool = chosen.keeper.holder
    assert isinstance(pool, HostPool)
    return pool


@pytest.mark.parametrize("buffers", [0, 1, 2, LAYERS, None])
def test_the_pool_never_exceeds_its_bound(buffers: int | None, model: Layers, x: torch.Tensor) -> None:
    limit = None if buffers is None else max(1, buffers * BUFFER)
    chosen = zero.CheckpointPolicy(min_bytes=1, host=True, host_bytes=limit)
    expected = gradients(model, lambda: model(x), x)
    with zero.checkpoint_modules(model, Layer, chosen):
        pool = pool_of(chosen)
        for _ in range(3):
            out = model(x)
            held = LAYERS if buffers is None else buffers
            assert len(pool._blocks) == held, "the pool is not used up to its bound"
            assert pool.pooled_bytes == held * BUFFER
            del out
            assert same(gradients(model, lambda: model(x), x), expected)
            assert pool.pooled_bytes == held * BUFFER, "buffers are not used again"
    assert pool.pooled_bytes == 0, "close gives idle buffers back"


def test_buffers_of_another_size_make_room(x: torch.Tensor) -> None:
    chosen = zero.CheckpointPolicy(min_bytes=1, host=True, host_bytes=2 * BUFFER)
    pool = pool_of(chosen)
    first = zero.checkpoint(torch.sin, x, policy=chosen).sum()
    second = zero.checkpoint(torch.sin, x * 1, policy=chosen).sum()
    first.backward()
    del first
    small = zero.checkpoint(torch.sin, x[:1] * 1, policy=chosen).sum()
    assert pool.pooled_bytes == BUFFER + PAGE_BYTES
    assert len(pool._blocks) == 2
    second.backward()
    small.backward()
    assert torch.equal(x.grad, 2 * x.cos() + torch.nn.functional.pad(x[:1].cos(), (0, 0, 0, ROWS - 1)))


def test_the_checkpoint_before_is_on_its_way(
    model: Layers, x: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = zero.CheckpointPolicy(min_bytes=1, host=True)
    events: list[str] = []
    names: dict[int, str] = {}
    fetch, keep = _Lane.fetch, HostPool.keep

    def noted_keep(self, flat, *, name, call):
        kept = keep(self, flat, name=name, call=call)
        names[kept.tensor.data_ptr()] = name
        return kept

    def noted_fetch(self, host):
        events.append(f"fetch {names[host.data_ptr()]}")
        return fetch(self, host)

    monkeypatch.setattr(HostPool, "keep", noted_keep)
    monkeypatch.setattr(_Lane, "fetch", noted_fetch)
    with zero.checkpoint_modules(model, Layer, chosen):
        out = model(x).sum()
        for layer in range(LAYERS):
            model.layers[layer].up.register_forward_pre_hook(
                lambda *_, layer=layer: events.append(f"run {layer}")
            )
        out.backward()
    assert events == [
        "fetch 'layers.2'",
        "fetch 'layers.1'",
        "run 2",
        "fetch 'layers.0'",
        "run 1",
        "run 0",
    ]


def test_a_second_backward_fetches_again(model: Layers, x: torch.Tensor) -> None:
    chosen = zero.CheckpointPolicy(min_bytes=1, host=True)
    with zero.checkpoint_modules(model, Layer, chosen):
        out = model(x).square().sum()
        first = torch.autograd.grad(out, x, retain_graph=True)[0]
        other = model(x)  # in between
        assert torch.equal(torch.autograd.grad(out, x)[0], first)
        del out, other
        pool_of(chosen)._read_notes()
        assert not pool_of(chosen)._blocks


def test_whoever_moves_saved_tensors_may(model: Layers, x: torch.Tensor) -> None:
    expected = gradients(model, lambda: model(x), x)
    chosen = zero.CheckpointPolicy(min_bytes=1, host=True)

    def run() -> torch.Tensor:
        with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda t: t):
            return model(x)

    with zero.checkpoint_modules(model, Layer, chosen):
        assert same(gradients(model, run, x), expected)
    with pytest.raises(zero.ZeroStateError, match="maybe before it had arrived there"):
        pool_of(chosen)._fetch(torch.device("cuda"), torch.ones(3))  # there, copies are under way


class Stream:
    """Notes, in one list for all streams, what is asked of it."""

    def __init__(self, name: str, notes: list[str]) -> None:
        self.name, self.notes = name, notes

    def wait_stream(self, other: Stream) -> None:
        self.notes.append(f"{self.name} waits for {other.name}")

    def record_event(self) -> str:
        self.notes.append(f"event of {self.name}")
        return f"event of {self.name}"

    def wait_event(self, event: str) -> None:
        self.notes.append(f"{self.name} waits for {event}")

    def __enter__(self) -> None:
        self.notes.append(f"on {self.name}:")

    def __exit__(self, *error: object) -> None:
        self.notes.append("back")


def test_streams_wait_for_one_another(monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []
    main, side = Stream("main", notes), Stream("side", notes)
    copy = torch.Tensor.copy_
    monkeypatch.setattr(
        torch.Tensor, "record_stream", lambda t, stream: notes.append(f"used by {stream.name}")
    )
    monkeypatch.setattr(
        torch.Tensor, "copy_", lambda *args, **kwargs: (notes.append("copy"), copy(*args, **kwargs))[1]
    )
    backend = SimpleNamespace(current_stream=lambda device: main, stream=lambda stream: stream)
    lane = _Lane(torch.device("cpu"))
    lane._backend, lane._stream = backend, side
    host = torch.empty(4)
    lane.send(torch.arange(4.0), host)
    assert notes == ["side waits for main", "used by side", "on side:", "copy", "back"]
    notes.clear()
    arrival = lane.fetch(host)
    assert notes == ["on side:", "copy", "event of side", "back"]
    notes.clear()
    assert torch.equal(arrival.wait(), torch.arange(4.0))
    assert notes == ["main waits for event of side", "used by main"]


@pytest.mark.gpu
def test_pinned_and_beside_the_computation() -> None:
    torch.manual_seed(2)
    model = Layers().cuda()
    x = torch.randn(4096, WIDTH, device="cuda", requires_grad=True)
    expected = gradients(model, lambda: model(x), x)
    chosen = zero.CheckpointPolicy(host=True)
    with zero.checkpoint_modules(model, Layer, chosen):
        for _ in range(3):
            assert same(gradients(model, lambda: model(x), x), expected)
        pool = pool_of(chosen)
        assert all(b.is_pinned() for buffers in pool._free.values() for b in buffers)
        assert pool.pooled_bytes == LAYERS * x.numel() * 4

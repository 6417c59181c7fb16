"""One buffer, allocated once, that never hands out memory which something still looks at."""

from __future__ import annotations

import gc
from itertools import pairwise

import pytest
import torch
import zero_core as zero
from checkpoint_models import ROWS, WIDTH, Layer, Layers, gradients, policy, same
from hypothesis import given
from hypothesis import strategies as st
from zero_core.checkpointing.arena import ALIGN_BYTES, Arena, Extents
from zero_core.checkpointing.holders import lend

INPUT = 2 * ROWS * WIDTH * 4


@pytest.fixture
def x() -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(2, ROWS, WIDTH, requires_grad=True)


@pytest.fixture
def model() -> Layers:
    torch.manual_seed(2)
    return Layers()


def in_use(chosen: zero.CheckpointPolicy) -> int:
    arena = chosen.keeper.holder
    assert isinstance(arena, Arena)
    for buffer in arena._buffers.values():
        buffer.read_notes()
    return sum(buffer.extents.in_use for buffer in arena._buffers.values())


@given(st.lists(st.one_of(st.integers(1, 700), st.integers(-20, -1)), max_size=60))
def test_extents_never_overlap(calls: list[int]) -> None:
    """Positive: take that many bytes; negative: free one of those taken."""
    extents, taken = Extents(4096), {}
    for call in calls:
        if call > 0:
            start = extents.take(call)
            if start is None:
                gaps = sorted([(0, 0), *taken.items(), (4096, 4096)])
                widest = max(b[0] - a[1] for a, b in pairwise(gaps))
                assert widest < call + -call % ALIGN_BYTES, "there was a gap"
                continue
            assert start % ALIGN_BYTES == 0
            assert start + call <= 4096
            assert all(start + call <= lo or start >= hi for lo, hi in taken.items())
            taken[start] = start + call + -call % ALIGN_BYTES
        elif taken:
            start = sorted(taken)[call % len(taken)]
            extents.free(start)
            del taken[start]
        assert extents.in_use == sum(hi - lo for lo, hi in taken.items())
    for start in taken:
        extents.free(start)
    assert extents.take(4096) == 0


def test_memory_is_free_when_nothing_looks_at_it() -> None:
    freed: list[int] = []
    buffer = torch.zeros(1024, dtype=torch.uint8)
    lent = lend(buffer, 64, 8, torch.float32, lambda: freed.append(64))
    lent.fill_(1.0)
    assert buffer[64:96].view(torch.float32).sum() == 8
    view = lent.view(2, 4)[:, 1:]
    del lent
    gc.collect()
    assert not freed
    weight = torch.ones(3, requires_grad=True)
    out = view @ weight  # autograd alone holds it now
    del view
    gc.collect()
    assert not freed
    out.sum().backward()
    del out
    assert freed == [64]


def test_one_allocation_whatever_the_number_of_steps(model: Layers, x: torch.Tensor) -> None:
    chosen = policy("contiguous")
    expected = gradients(model, lambda: model(x), x)
    addresses = set()
    with zero.checkpoint_modules(model, Layer, chosen):
        for _ in range(4):
            out = model(x)
            assert in_use(chosen) == 3 * INPUT
            out.sum().backward()
            del out
            assert in_use(chosen) == 0
            assert same(gradients(model, lambda: model(x), x), expected)
            (buffer,) = chosen.keeper.holder._buffers.values()
            addresses.add(buffer.memory.data_ptr())
    assert len(addresses) == 1
    assert not chosen.keeper.holder._buffers, "close gives an idle buffer back"


def test_forwards_in_flight_in_any_order(model: Layers, x: torch.Tensor) -> None:
    chosen = policy("contiguous")
    inputs = [x.detach() * k for k in (1.0, 2.0, 3.0, 4.0)]
    model.eval()
    expected = [torch.autograd.grad(model(i).square().sum(), list(model.parameters())) for i in inputs]
    model.train()
    for layer in model.layers:
        layer.drop.p = 0.0
    with zero.checkpoint_modules(model, Layer, chosen):
        graphs = {k: model(i).square().sum() for k, i in enumerate(inputs[:3])}
        del graphs[1]  # a forward without backward
        graphs[3] = model(inputs[3]).square().sum()
        assert in_use(chosen) == 9 * INPUT
        for k in (0, 3, 2):
            found = torch.autograd.grad(graphs.pop(k), list(model.parameters()))
            assert same(list(found), list(expected[k])), k
        assert in_use(chosen) == 0


def test_an_input_that_someone_keeps_stays_as_it_is(x: torch.Tensor) -> None:
    chosen = zero.CheckpointPolicy(min_bytes=1, contiguous_bytes=2 * INPUT)
    stash: list[torch.Tensor] = []

    def keeps(t: torch.Tensor) -> torch.Tensor:
        stash.append(t.detach()[1:])
        return t.sin()

    zero.checkpoint(keeps, x * 1.0, policy=chosen).sum().backward()
    assert len(stash) == 2
    assert in_use(chosen) == INPUT, "the recomputation's input is in the buffer, and still looked at"
    for _ in range(3):
        zero.checkpoint(torch.sin, x * 7.0, policy=chosen).sum().backward()
    assert torch.equal(stash[1], x.detach()[1:])
    stash.clear()
    assert in_use(chosen) == 0


class MidwayError(Exception):
    pass


@pytest.mark.parametrize("place", ["forward", "backward", "recomputation"])
def test_exceptions_half_way(place: str, model: Layers, x: torch.Tensor) -> None:
    chosen = zero.CheckpointPolicy(min_bytes=1, contiguous_bytes=3 * INPUT)  # not a byte to spare
    expected = gradients(model, lambda: model(x), x)
    fail, calls = [False], [0]

    def count(*args) -> None:
        calls[0] += 1
        if fail[0] and calls[0] == {"forward": 1, "recomputation": 2, "backward": 0}[place]:
            raise MidwayError

    def in_backward(grad: torch.Tensor) -> None:
        if fail[0] and place == "backward":
            raise MidwayError

    model.layers[1].down.register_forward_pre_hook(count)
    model.layers[1].register_forward_hook(lambda m, args, out: out[0].register_hook(in_backward) and None)
    with zero.checkpoint_modules(model, Layer, chosen):
        for _ in range(2):
            fail[0], calls[0] = True, 0
            with pytest.raises(MidwayError):
                model(x).sum().backward()
            fail[0] = False
            gc.collect()  # the exception's traceback held the forward's frames
            assert in_use(chosen) == 0
            assert same(gradients(model, lambda: model(x), x), expected)


def test_a_full_buffer_says_what_it_takes(model: Layers, x: torch.Tensor) -> None:
    expected = gradients(model, lambda: model(x), x)
    small = zero.CheckpointPolicy(min_bytes=1, contiguous_bytes=2 * INPUT)
    with (
        zero.checkpoint_modules(model, Layer, small),
        pytest.raises(
            zero.ZeroStateError,
            match=rf"contiguous_bytes={2 * INPUT}\).*'layers\.2' takes {INPUT} bytes, and {2 * INPUT} are in use.*"
            rf"at least {3 * INPUT}",
        ),
    ):
        model(x)
    enough = zero.CheckpointPolicy(min_bytes=1, contiguous_bytes=3 * INPUT)
    with zero.checkpoint_modules(model, Layer, enough):
        assert same(gradients(model, lambda: model(x), x), expected)


def test_a_change_in_place_is_noticed(x: torch.Tensor) -> None:
    def changes(t: torch.Tensor, plain: torch.Tensor) -> torch.Tensor:
        return t * plain.mul_(2.0).sin()

    out = zero.checkpoint(changes, x, torch.ones_like(x), policy=policy("contiguous")).sum()
    found = torch.autograd.grad(out, x, retain_graph=True)[0]
    assert torch.equal(found, torch.full_like(x, 2.0).sin()), "the copy was made before the change"
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


def test_dtypes_share_the_buffer(x: torch.Tensor) -> None:
    chosen = policy("contiguous")

    def fn(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        return (a * b).sin() * c.double()

    tensors = [x, x.detach().double().requires_grad_(), x.detach().bfloat16().requires_grad_()]
    expected = torch.autograd.grad(fn(*tensors).sum(), tensors)
    out = zero.checkpoint(fn, *tensors, policy=chosen).sum()
    assert in_use(chosen) == INPUT + 2 * INPUT + INPUT // 2
    assert same(list(torch.autograd.grad(out, tensors)), list(expected))

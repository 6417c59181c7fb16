"""A recording computes what the block computed, from what its tensors hold now."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable

import accel_kernels
import pytest
import torch
from accel_kernels import AccelKernelsError, AccelValueError, Recording, native
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

WIDTH, HEADS, BLOCK = 64, 2, 16
NATIVE = native.cpu is not None


class Layer:
    """A block of a decoder: every inference op, and torch's between them."""

    def __init__(self, num_tokens: int, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        make = lambda *shape: (torch.randn(*shape) / 8).to(dtype)  # noqa: E731
        self.x, self.stream = make(num_tokens, WIDTH), make(num_tokens, WIDTH)
        self.qkv, self.out, self.up, self.down = (
            make(3 * WIDTH, WIDTH),
            make(WIDTH, WIDTH),
            make(4 * WIDTH, WIDTH),
            make(WIDTH, 2 * WIDTH),
        )
        self.int8 = accel_kernels.quantize_int8(make(WIDTH, WIDTH))
        self.int4 = accel_kernels.quantize_int4(make(WIDTH, WIDTH), 32)
        self.norm = torch.ones(WIDTH)
        self.cache = [torch.zeros(4, HEADS, BLOCK, WIDTH // HEADS, dtype=dtype) for _ in range(2)]
        self.angles = torch.rand(64, WIDTH // HEADS // 2)
        self.positions, self.slots = torch.arange(num_tokens), torch.arange(num_tokens)
        self.tables = torch.arange(4, dtype=torch.int32).unsqueeze(0)
        self.starts = torch.tensor([0, num_tokens], dtype=torch.int32)
        self.lens = torch.tensor([num_tokens], dtype=torch.int32)

    def forward(self) -> Tensor:
        x = accel_kernels.rms_norm(self.x + 0, self.norm, 1e-5, residual=self.stream)
        heads = accel_kernels.linear(x, self.qkv).view(len(x), 3 * HEADS, -1)
        q, k, v = heads.split(HEADS, dim=1)
        accel_kernels.rotary(q, k, self.angles.cos(), self.angles.sin(), self.positions)
        accel_kernels.write_kv(k, v, *self.cache, self.slots)
        seen = accel_kernels.paged_attention(q, *self.cache, self.tables, self.starts, self.lens, scale=0.2)
        x = accel_kernels.linear(seen.flatten(1), self.out).clone()
        x.mul_(0.5)
        x = accel_kernels.linear_int8(x, *self.int8)
        packed, scale, zero = self.int4
        x = accel_kernels.linear_int4(x, packed, scale, zero, group_size=32)
        x = accel_kernels.linear(accel_kernels.silu_mul(accel_kernels.linear(x, self.up)), self.down)
        values, _ = x.float().topk(3, dim=-1)
        return torch.cat([values, x.float()], dim=1)

    def inputs(self) -> list[Tensor]:
        return [self.x, self.stream, *self.cache]

    def put(self, values: list[Tensor]) -> None:
        for tensor, value in zip(self.inputs(), values, strict=True):
            tensor.copy_(value)


@pytest.mark.skipif(not NATIVE, reason=f"no compiled ops here: {native.why_not}")
@given(st.integers(1, 20), st.sampled_from([torch.float32, torch.bfloat16]), st.integers(0, 9))
def test_a_replay_computes_from_new_values_what_the_block_would(
    num_tokens: int, dtype: torch.dtype, seed: int
) -> None:
    layer = Layer(num_tokens, dtype)
    before = [each.clone() for each in layer.inputs()]
    expected_first = layer.forward()
    layer.put(before)
    recording = Recording()
    with recording:
        result = layer.forward()
    assert torch.equal(result, expected_first)
    for _ in range(2):
        torch.manual_seed(seed)
        values = [torch.randn(each.shape).to(dtype) for each in layer.inputs()]
        layer.put(values)
        expected, after = layer.forward(), [each.clone() for each in layer.inputs()]
        layer.put(values)
        result.zero_()
        recording.replay()
        assert torch.equal(result, expected)
        assert all(map(torch.equal, layer.inputs(), after))


def test_calls_between_two_of_torch_are_one() -> None:
    x, weight = torch.randn(2, 32), torch.randn(32, 32)
    recording = Recording()
    with recording:
        y = x
        for _ in range(10):
            y = accel_kernels.linear(y, weight)
        z = y + 1
        accel_kernels.linear(z, weight)
    assert recording.num_calls == 3 or not NATIVE
    assert recording.num_bytes == 4 * 12 * 2 * 32


def test_what_is_kept_outlives_its_names() -> None:
    x, weights = torch.randn(3, 32), [torch.randn(1024, 32), torch.randn(8, 1024)]
    recording = Recording()
    with recording:
        y = accel_kernels.linear(accel_kernels.linear(x, weights[0]), weights[1])
    expected = y.clone()
    weights.clear()
    in_their_place = [torch.full((1024, 32), float("nan")) for _ in range(8)]
    y.zero_()
    recording.replay()
    assert torch.equal(y, expected)
    assert in_their_place


@pytest.mark.parametrize(
    "act",
    [
        lambda x: x.sum().item(),
        lambda x: x.nonzero(),
        lambda x: torch.rand(3) + x,
        lambda x: x[x > 0],
    ],
)
def test_what_depends_on_values_or_chance_is_refused(act: Callable[[Tensor], object]) -> None:
    with pytest.raises(AccelValueError, match="expected no op that depends on values or chance"), Recording():
        act(torch.ones(3))
    with Recording():  # nothing is left of the one before
        pass


def test_an_op_that_is_not_recorded_says_so() -> None:
    x = torch.zeros(4)
    with pytest.raises(AccelKernelsError, match="cast_copy: expected to be called outside"), Recording():
        accel_kernels.cast_copy(x, x.clone())


@pytest.mark.parametrize("backend", ["portable", "reference"])
def test_a_back_end_that_takes_lengths_out_of_tensors_says_so(backend: str) -> None:
    layer = Layer(3, torch.float32)
    q = torch.zeros(3, HEADS, WIDTH // HEADS)
    tensors = (q, *layer.cache, layer.tables, layer.starts, layer.lens)
    with (
        pytest.raises(AccelKernelsError, match="paged_attention: expected to be called outside"),
        Recording(),
    ):
        accel_kernels.paged_attention(*tensors, scale=1.0, backend=backend)
    with pytest.raises(AccelKernelsError, match="rotary: expected to be called outside"), Recording():
        accel_kernels.rotary(q, None, *[layer.angles] * 2, layer.positions, backend=backend)
    with pytest.raises(AccelKernelsError, match="write_kv: expected to be called outside"), Recording():
        accel_kernels.write_kv(q, q, *layer.cache, layer.slots, backend=backend)


def test_recordings_neither_nest_nor_start_again() -> None:
    outer = Recording()
    with outer:
        torch.ones(2).neg()
        with pytest.raises(AccelValueError, match="entered once"), Recording():
            pass
    with pytest.raises(AccelValueError, match="entered once"), outer:
        pass


def test_other_threads_are_not_recorded() -> None:
    x, weight = torch.randn(2, 32), torch.randn(32, 32)
    recording = Recording()
    with recording:
        thread = threading.Thread(target=lambda: accel_kernels.linear(x, weight))
        thread.start()
        thread.join()
    assert recording.num_calls == 0
    assert not recording.kept


@pytest.mark.skipif(not NATIVE, reason=f"no compiled ops here: {native.why_not}")
def test_bad_values_in_a_replay_end_as_in_a_call() -> None:
    layer = Layer(3, torch.float32)
    recording = Recording()
    with recording:
        layer.forward()
    layer.slots[1] = 64
    with pytest.raises(AccelValueError, match=r"slots\[1\]: expected below 64, got 64"):
        recording.replay()
    layer.slots[1] = 1
    recording.replay()


def test_memory_is_kept_where_a_tensor_is_given_other_memory() -> None:
    x, weight = torch.randn(3, 32), torch.randn(8, 32)
    recording = Recording()
    with recording:
        y = accel_kernels.linear(x, weight)
    expected = y.clone()
    weight.data = torch.full((8, 32), float("nan"))
    in_its_place = [torch.full((8, 32), float("nan")) for _ in range(64)]
    y.zero_()
    recording.replay()
    assert torch.equal(y, expected)
    assert in_its_place


def test_a_tensor_turned_in_place_is_refused() -> None:
    with (
        pytest.raises(AccelValueError, match=r"expected tensors that keep their shape, got aten\.t_"),
        Recording(),
    ):
        torch.ones(3, 2).t_()


def test_rows_by_their_numbers_are_recorded() -> None:
    table, rows = torch.randn(9, 4), torch.tensor([3, 1])
    recording = Recording()
    with recording:
        y = table[rows]
    rows.copy_(torch.tensor([8, 0]))
    recording.replay()
    assert torch.equal(y, table[[8, 0]])


def test_a_replay_within_a_recording_is_refused() -> None:
    inner = Recording()
    with inner:
        torch.ones(2).neg()
    with pytest.raises(AccelKernelsError, match="replay: expected to be called outside"), Recording():
        inner.replay()


@pytest.mark.skipif(not NATIVE or not hasattr(os, "fork"), reason="needs compiled ops and fork")
def test_a_replay_uses_as_many_threads_as_torch_has_now() -> None:
    code = """
import os, torch, accel_kernels
torch.set_num_threads(2)
x, weight = torch.randn(64, 512), torch.randn(1024, 512)
recording = accel_kernels.Recording()
with recording:
    y = accel_kernels.linear(x, weight)
expected = y.clone()
child = os.fork()
if child == 0:
    torch.set_num_threads(1)  # a pool of threads does not survive a fork
    y.zero_()
    recording.replay()
    os._exit(0 if torch.equal(y, expected) else 1)
assert os.waitpid(child, 0)[1] == 0
"""
    found = subprocess.run(
        [sys.executable, "-c", code], timeout=60, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr

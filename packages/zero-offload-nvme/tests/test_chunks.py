"""Chunks hold every element once, in order, within their bound; the pipeline steps them while others travel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zero_offload_nvme as off
from hypothesis import given, settings
from hypothesis import strategies as st
from offload_models import PAIRS, copies_of, give_grads, make_params
from torch import Tensor
from zero_offload_nvme import rows, steppers
from zero_offload_nvme.chunks import plan_chunks
from zero_offload_nvme.device_steps import DeviceStepper


@settings(max_examples=200, deadline=None)
@given(numels=st.lists(st.integers(0, 500), max_size=12), size=st.integers(1, 8).map(lambda k: 32 * k))
def test_every_element_once_and_in_order(numels: list[int], size: int) -> None:
    plan = plan_chunks(numels, size)
    seen: list[list[int]] = [[] for _ in numels]
    for chunk in plan:
        assert chunk
        end = 0
        for piece in chunk:
            assert piece.offset % 32 == 0
            assert piece.offset >= end
            end = piece.offset + piece.stop - piece.start
            assert piece.start < piece.stop
            seen[piece.index] += range(piece.start, piece.stop)
        assert end <= size
    assert seen == [list(range(numel)) for numel in numels]


class Recorded:
    """Copies on the host that happen when they are waited for, and a record of what was asked when."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.count = {"down": 0, "up": 0}

    def begin(self) -> None:
        self.log.append("begin")

    def end(self) -> None:
        self.log.append("end")

    def buffer(self, num_bytes: int) -> Tensor:
        return torch.full((num_bytes,), 255, dtype=torch.uint8)  # NaN in every dtype

    def to_host(self, pairs: list[tuple[Tensor, Tensor]]) -> Any:
        return Late(self, "down", pairs)

    def to_device(self, pairs: list[tuple[Tensor, Tensor]]) -> Any:
        late = Late(self, "up", pairs)
        for target, source in pairs:  # a reader that came too late would find the next chunk's values
            target.copy_(source)
        return late


class Late:
    def __init__(self, owner: Recorded, way: str, pairs: list[tuple[Tensor, Tensor]]) -> None:
        self.owner, self.way, self.pairs = owner, way, pairs
        self.number = owner.count[way]
        owner.count[way] += 1
        owner.log.append(f"{way} {self.number}")

    def wait(self) -> None:
        if self.way == "down":
            for target, source in self.pairs:
                target.copy_(source)
        self.owner.log.append(f"waited {self.way} {self.number}")


def run_as_a_device(optimizer: off.CPUAdam, params: list[Any], stepper: DeviceStepper) -> None:
    from zero_offload_nvme.steppers import Work

    with torch.no_grad():
        work = [Work(param, 0, place) for place, param in enumerate(params) if param.grad is not None]
        stepper.step(work, optimizer.param_groups)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["adamw", "adam, L2", "adagrad, all"])
def test_chunk_by_chunk_gives_the_bits_of_one_call(case: str, dtype: torch.dtype) -> None:
    ours, _, options = PAIRS[case]
    shapes = [(3,), (70, 33), (), (0,), (500,), (1000,), (8, 9)]
    params = [*make_params(shapes, dtype), torch.nn.Parameter(torch.randn(9, 40).to(dtype).t())]
    others = copies_of(params)
    one, other = ours(params, **options), ours(others, **options)
    copies = Recorded()
    stepper = DeviceStepper(one.rule, one.state, copies, chunk_elements=256)
    for step in range(4):
        give_grads(params, others, seed=step)
        if step == 2:
            params[1].grad = others[1].grad = None  # whole chunks have nothing to do
        run_as_a_device(one, params, stepper)
        other.step()
    assert copies.count["up"] > 40
    for param, expected in zip(params, others, strict=True):
        assert torch.equal(param, expected)
        assert all(torch.equal(one.state[param][k], v) for k, v in other.state[expected].items())


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (2, 1, 0, 1)])
def test_dtypes_side_by_side_in_one_chunk(monkeypatch: pytest.MonkeyPatch, order: tuple[int, ...]) -> None:
    def as_on_a_device(param: Tensor, *rest: Any) -> rows.Row:
        row = rows.make_row(param, *rest)
        row.master = param.detach().float().clone() if row.master is None else row.master
        return row

    dtypes = [torch.float32, torch.bfloat16, torch.float16]
    params = [make_params([(70, 3)], dtypes[number])[0] for number in order]
    others = copies_of(params)
    one, other = off.CPUAdamW(params), off.CPUAdamW(others)
    stepper = DeviceStepper(one.rule, one.state, Recorded(), chunk_elements=512)
    for step in range(3):
        give_grads(params, others, seed=step)
        with monkeypatch.context() as patched:
            patched.setattr(steppers, "make_row", as_on_a_device)
            run_as_a_device(one, params, stepper)
        other.step()
    for param, expected in zip(params, others, strict=True):
        assert torch.equal(param, expected)
        assert all(torch.equal(one.state[param][k], v) for k, v in other.state[expected].items())


def test_a_chunk_comes_while_the_one_before_is_stepped() -> None:
    params = make_params([(1000,)], torch.bfloat16)
    optimizer = off.CPUAdamW(params)
    copies = Recorded()
    stepper = DeviceStepper(optimizer.rule, optimizer.state, copies, chunk_elements=256)
    give_grads(params, seed=0)
    run_as_a_device(optimizer, params, stepper)
    assert copies.log == [
        "begin",
        "down 0",
        *("down 1", "waited down 0", "up 0"),
        *("down 2", "waited down 1", "up 1"),
        *("down 3", "waited down 2", "waited up 0", "up 2"),
        *("down 4", "waited down 3", "waited up 1", "up 3"),
        "end",
    ]

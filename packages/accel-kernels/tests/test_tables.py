"""A table of many tensors steps to the same bits as one call a tensor."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

import accel_kernels as ak
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

SEGMENTS = {
    "adam": ak.AdamSegment, "lion": ak.LionSegment, "adagrad": ak.AdagradSegment, "sgd": ak.SgdSegment,
}  # fmt: skip
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
LOWS = (None, torch.bfloat16, torch.float16)
Runner = tuple[str, str | None]


def hyper(optimizer: str) -> list[Any]:
    """Three sets of hyper-parameters; ranges as a table leaves them."""
    decoupled = {"decoupled": False} if optimizer == "adam" else {}
    step = {"step": 3} if optimizer in ("adam", "adagrad") else {}
    momentum = {"momentum": 0.9} if optimizer == "sgd" else {}
    kind: Any = SEGMENTS[optimizer]
    return [
        kind(start=0, stop=0, lr=1e-2, **step, **momentum),
        kind(start=0, stop=0, lr=1e-3, weight_decay=0.1, **step, **momentum),
        kind(start=0, stop=0, lr=1e-1, weight_decay=0.2, **step, **momentum, **decoupled),
    ]


@pytest.mark.parametrize("optimizer", SEGMENTS)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_same_bits_as_a_call_each(
    optimizer: str, runner: Runner, problem: Callable[..., Any], assert_same_bits: Any, data: st.DataObject
) -> None:
    backend, isa = runner
    sizes = data.draw(
        st.lists(st.one_of(st.integers(0, 40), st.just(3000), st.just(40_001)), min_size=1, max_size=8)
    )
    cases = [
        problem(
            optimizer, n, spans=[(0, n)], seed=k, grad_dtype=data.draw(st.sampled_from(FLOATS)),
            low_dtype=data.draw(st.sampled_from(LOWS)),
        )
        for k, n in enumerate(sizes)
    ]  # fmt: skip
    which = [data.draw(st.integers(0, 2)) for _ in cases]
    skipped = [data.draw(st.integers(0, 4)) == 0 for _ in cases]
    segments = hyper(optimizer)
    params = [case.param.clone() for case in cases]
    states = [[case.states[i].clone() for case in cases] for i in range(len(cases[0].states))]
    lows = [None if case.low is None else case.low.clone() for case in cases]
    table = ak.StepTable(SEGMENTS[optimizer], params, states, low_precision=lows)
    grads = [None if skip else case.grad for skip, case in zip(skipped, cases, strict=True)]
    with ak.set_cpu_isa(isa) if isa else contextlib.nullcontext():
        table.step(grads, segments, which, grad_scale=0.7, backend=backend)
    for k, case in enumerate(cases):
        got = [params[k], *(state[k] for state in states), *([] if lows[k] is None else [lows[k]])]
        if not skipped[k]:
            kind = type(segments[which[k]])
            fields = {**vars(segments[which[k]]), "start": 0, "stop": sizes[k]}
            case.segments, case.grad_scale = [kind(**fields)], 0.7
            expected = case.run("reference")
            del expected[1]  # the gradient
        else:
            expected = [case.param, *case.states, *([] if case.low is None else [case.low])]
        assert_same_bits(got, expected)


def test_threads_change_no_bit(run_threads: Any) -> None:
    outcomes = []
    for threads in (1, 2, 3):
        torch.manual_seed(0)
        params = [torch.randn(n) for n in (70_001, 3, 0, 1000, 50_000)]
        states = [[torch.rand_like(p) for p in params] for _ in range(2)]
        grads = [torch.randn_like(p) for p in params]
        with run_threads(threads):
            ak.StepTable(ak.AdamSegment, params, states).step(grads, hyper("adam"), [0, 1, 2, 0, 1])
        outcomes.append(torch.cat([*params, *states[0], *states[1]]))
    assert all(torch.equal(outcomes[0], other) for other in outcomes)


def adam_table(n: int = 8, count: int = 3) -> tuple[ak.StepTable, list[torch.Tensor], list[torch.Tensor]]:
    params = [torch.ones(n) for _ in range(count)]
    table = ak.StepTable(ak.AdamSegment, params, [[torch.zeros(n) for _ in params] for _ in range(2)])
    return table, params, [torch.ones(n) for _ in params]


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda g: g.double(), TypeError, r"grads\[1\]: expected torch.float32 or"),
        (lambda g: g[:-1], ValueError, r"grads\[1\]: expected 8 elements"),
        (lambda g: torch.ones(16)[::2], ValueError, r"grads\[1\]: expected a flat contiguous tensor"),
        (lambda g: g.to_sparse(), ValueError, r"grads\[1\]: expected a dense tensor"),
        (lambda g: torch.ones(8, device="meta"), ValueError, r"grads\[1\]: expected a tensor on cpu"),
    ],
)
def test_a_bad_gradient_is_named_and_nothing_written(change: Any, error: type[Exception], words: str) -> None:
    table, params, grads = adam_table()
    grads[1] = change(grads[1])
    with pytest.raises(error, match=words):
        table.step(grads, hyper("adam"), [0, 0, 0])
    assert all((param == 1).all() for param in params)


def test_other_mistakes() -> None:
    table, params, grads = adam_table()
    with pytest.raises(ValueError, match="indices into 3 segments"):
        table.step(grads, hyper("adam"), [0, 3, 0])
    with pytest.raises(TypeError, match=r"segments\[0\]: expected AdamSegment, got LionSegment"):
        table.step(grads, hyper("lion"), [0, 0, 0])
    with pytest.raises(ValueError, match="expected 3 grads"):
        table.step(grads[:2], hyper("adam"), [0, 0])
    with pytest.raises(ValueError, match=r"grads\[2\]: expected memory of its own"):
        table.step([*grads[:2], params[0]], hyper("adam"), [0, 0, 0])
    with pytest.raises(ValueError, match="some share memory"):
        ak.StepTable(ak.LionSegment, params, [[params[1], torch.ones(8), torch.ones(8)]])
    with pytest.raises(ValueError, match="expected 2 lists for AdamSegment"):
        ak.StepTable(ak.AdamSegment, params, [])
    with pytest.raises(ValueError, match=r"states\[0\]: expected 3 entries"):
        ak.StepTable(ak.LionSegment, params, [params[:2]])
    plain = ak.StepTable(ak.SgdSegment, params, [])
    with pytest.raises(ValueError, match="has momentum, and the table has no state"):
        plain.step(grads, hyper("sgd"), [0, 0, 0])
    with pytest.raises(TypeError, match="expected one of the segment classes"):
        ak.StepTable(int, params, [])  # type: ignore[type-var]


def test_moved_memory_is_noticed() -> None:
    table, params, grads = adam_table()
    assert table.is_current()
    params[1].data = torch.ones(8)
    assert not table.is_current()
    with pytest.raises(ValueError, match="make a new one"):
        table.step(grads, hyper("adam"), [0, 0, 0])


def test_a_backward_pass_that_saved_a_parameter_notices() -> None:
    param = torch.nn.Parameter(torch.ones(2, 3))
    table = ak.StepTable(ak.LionSegment, [param], [[torch.zeros(2, 3)]])
    loss = (param * param).sum()
    table.step([torch.ones(2, 3)], hyper("lion"), [0])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_small_tensor_costs_less_than_a_call() -> None:
    table, params, grads = adam_table(n=8, count=2000)
    which = [0] * 2000
    best = min(_seconds(lambda: table.step(grads, hyper("adam"), which)) for _ in range(5))
    each = min(
        _seconds(
            lambda: ak.lion_step(
                params[0], grads[0], torch.zeros(8), [ak.LionSegment(start=0, stop=8, lr=0.1)]
            )
        )
        for _ in range(5)
    )
    assert best / 2000 < each


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start

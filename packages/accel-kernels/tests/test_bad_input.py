"""Bad input: a clear error that names the argument, and nothing written."""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Callable
from typing import Any

import accel_kernels as ak
import numpy as np
import pytest
import torch

N = 64
Tensors = dict[str, Any]


def tensors() -> Tensors:
    return {
        "param": torch.ones(N),
        "grad": torch.ones(N),
        "exp_avg": torch.ones(N),
        "exp_avg_sq": torch.ones(N),
        "low_precision": torch.ones(N, dtype=torch.bfloat16),
    }


def segment(start: int = 0, stop: int = N) -> ak.AdamSegment:
    return ak.AdamSegment(start=start, stop=stop, lr=0.1, step=1)


def call(given: Tensors, segments: Any = None, **options: Any) -> None:
    param, grad, m, v = (given[name] for name in ("param", "grad", "exp_avg", "exp_avg_sq"))
    segments = [segment()] if segments is None else segments
    ak.adam_step(param, grad, m, v, segments, low_precision=given["low_precision"], **options)


def overlapping(given: Tensors, name: str, other: str) -> None:
    memory = torch.ones(2 * N)
    given[name], given[other] = memory[:N], memory[N - 1 : 2 * N - 1]


def set_to(name: str, make: Callable[[], Any]) -> Callable[[Tensors], None]:
    def change(given: Tensors) -> None:
        given[name] = make()

    return change


CASES: dict[str, tuple[Callable[[Tensors], None], type[Exception], str]] = {
    "param dtype": (
        set_to("param", lambda: torch.ones(N).double()),
        TypeError,
        r"param: expected torch.float32",
    ),
    "grad dtype": (set_to("grad", lambda: torch.ones(N).int()), TypeError, r"grad: .*got torch.int32"),
    "state dtype": (
        set_to("exp_avg", lambda: torch.ones(N).half()),
        TypeError,
        "exp_avg: expected torch.float32",
    ),
    "low dtype": (
        set_to("low_precision", lambda: torch.ones(N)),
        TypeError,
        "low_precision: expected torch.bf",
    ),
    "not a tensor": (
        set_to("grad", lambda: np.ones(N)),
        TypeError,
        "grad: expected a torch.Tensor, got ndarray",
    ),
    "size": (set_to("exp_avg_sq", lambda: torch.ones(N - 1)), ValueError, "exp_avg_sq: expected 64 elements"),
    "device": (
        set_to("grad", lambda: torch.ones(N, device="meta")),
        ValueError,
        "grad: expected a tensor on cpu",
    ),
    "strided": (
        set_to("grad", lambda: torch.ones(2 * N)[::2]),
        ValueError,
        "grad: expected a flat contiguous",
    ),
    "expanded": (
        set_to("param", lambda: torch.ones(1).expand(N)),
        ValueError,
        "param: expected a flat contiguous",
    ),
    "2-d": (set_to("param", lambda: torch.ones(8, 8)), ValueError, r"param: .*view\(-1\)"),
    "sparse": (
        set_to("grad", lambda: torch.ones(N).to_sparse()),
        ValueError,
        "grad: expected a dense tensor",
    ),
    "recorded": (
        set_to("param", lambda: torch.ones(N, requires_grad=True) * 2),
        ValueError,
        "param: .*recorded",
    ),
    "overlap, written": (
        lambda given: overlapping(given, "param", "exp_avg"),
        ValueError,
        "memory of its own",
    ),
    "overlap, grad": (
        lambda given: overlapping(given, "grad", "exp_avg_sq"),
        ValueError,
        "memory of its own",
    ),
    "same tensor": (
        lambda given: given.update(grad=given["param"]),
        ValueError,
        "shares param's|shares grad's",
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", [None, "portable", "reference"])
def test_tensors(case: str, backend: str | None) -> None:
    change, error, message = CASES[case]
    given = tensors()
    change(given)
    before = {
        name: t.detach().clone() for name, t in given.items() if isinstance(t, torch.Tensor) and not t.is_meta
    }
    with pytest.raises(error, match=f"^adam_step: .*{message}|^adam_step: {message}") as caught:
        call(given, backend=backend)
    assert isinstance(caught.value, ak.AccelKernelsError)
    for name, original in before.items():
        assert torch.equal(given[name].to_dense(), original.to_dense())


@pytest.mark.parametrize(
    ("segments", "error", "message"),
    [
        ([segment(0, N + 1)], ValueError, r"segments\[-1\]: expected a stop <= 64 elements, got 65"),
        ([segment(0, 10), segment(9, 20)], ValueError, r"segments\[1\]: expected a start >= 10"),
        ([segment(20, 30), segment(0, 10)], ValueError, r"segments\[1\]: expected a start >= 30"),
        (
            [ak.LionSegment(start=0, stop=3, lr=0.1)],
            TypeError,
            r"segments\[0\]: expected AdamSegment, got Lion",
        ),
    ],
)
def test_segments(segments: Any, error: type[Exception], message: str) -> None:
    given = tensors()
    with pytest.raises(error, match=message):
        call(given, segments)
    assert (given["param"] == 1).all()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("start", -1),
        ("stop", -1),
        ("lr", -0.1),
        ("lr", float("nan")),
        ("lr", float("inf")),
        ("beta1", 1.0),
        ("beta2", -0.1),
        ("eps", -1e-8),
        ("weight_decay", float("nan")),
        ("step", 0),
    ],
)
def test_hyper_parameters(field: str, value: float) -> None:
    fields = {"start": 0, "stop": 4, "lr": 0.1, "step": 1, field: value}
    with pytest.raises(ValueError, match=rf"AdamSegment\.{field}: expected .*, got"):
        ak.AdamSegment(**fields)  # type: ignore[arg-type]


def test_hyper_parameters_beyond_fp32() -> None:
    given = tensors()
    with pytest.raises(ValueError, match="beyond fp32's range"):
        call(given, [ak.AdamSegment(start=0, stop=N, lr=1e200, step=1)])
    assert (given["param"] == 1).all()


def test_nesterov_needs_momentum() -> None:
    with pytest.raises(ValueError, match="nesterov"):
        ak.SgdSegment(start=0, stop=1, lr=0.1, nesterov=True)


def test_momentum_needs_a_buffer() -> None:
    with pytest.raises(
        ValueError, match=r"momentum_buffer: expected a tensor, since segments\[0\] has momentum"
    ):
        ak.sgd_step(
            torch.ones(4), torch.ones(4), None, [ak.SgdSegment(start=0, stop=4, lr=0.1, momentum=0.9)]
        )


@pytest.mark.parametrize(
    ("scale", "error"),
    [("1", TypeError), (None, TypeError), (torch.ones(2), ValueError), (torch.tensor(1), TypeError)],
)
def test_grad_scale(scale: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="adam_step: grad_scale: expected"):
        call(tensors(), grad_scale=scale)


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match="backend: expected None or one of"):
        call(tensors(), backend="gpu")


def test_backend_of_another_device() -> None:
    with pytest.raises(ak.BackendUnavailableError, match="works on cuda tensors, got cpu ones"):
        call(tensors(), backend="cuda")


def test_unknown_isa() -> None:
    if not ak.available_cpu_isas():
        pytest.skip("no C++ extension")
    with pytest.raises(ValueError, match="set_cpu_isa: expected one of"), ak.set_cpu_isa("mmx"):
        pass


@pytest.mark.skipif(not ak.available_cpu_isas(), reason="the extension does the asking")
def test_file_mapped_for_reading() -> None:
    """Writing there would end the process."""
    with tempfile.TemporaryFile() as file:
        file.write(b"\0" * 4 * N)
        file.flush()
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            with pytest.warns(UserWarning, match="not writable"):
                read_only = torch.frombuffer(mapped, dtype=torch.float32)
            given = tensors()
            given["param"] = read_only
            with pytest.raises(ValueError, match="param: expected writable memory"):
                call(given)
            assert (given["exp_avg"] == 1).all()
            given = tensors()
            given["grad"] = read_only  # reading is fine
            call(given)
            del given, read_only


def test_numpy_memory_is_welcome() -> None:
    array = np.ones(N, np.float32)
    given = tensors()
    given["param"] = torch.from_numpy(array)
    call(given)
    assert (array != 1).all()


@pytest.mark.parametrize(
    ("args", "options", "error", "message"),
    [
        ((torch.ones(3), torch.ones(4)), {}, ValueError, "dst: expected 3 elements, as many as src, got 4"),
        ((torch.ones(3), torch.ones(3).double()), {}, TypeError, "dst: expected"),
        (
            (torch.ones(3), torch.ones(3).bfloat16()),
            {"stochastic": True},
            ValueError,
            "seed: expected an integer",
        ),
        ((torch.ones(3), torch.ones(3)), {"scale": "2"}, TypeError, "scale: expected a number"),
    ],
)
def test_cast(args: Any, options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"cast_copy: {message}"):
        ak.cast_copy(*args, **options)


def test_cast_onto_itself() -> None:
    both = torch.ones(8)
    with pytest.raises(ValueError, match="memory of its own"):
        ak.cast_copy(both[:4], both[3:7])


@pytest.mark.parametrize(
    ("grads", "options", "error", "message"),
    [
        (torch.ones(3).double(), {}, TypeError, "grads: expected"),
        ([torch.ones(3), torch.ones(2, 2)], {}, ValueError, r"grads\[1\]: expected a flat"),
        (
            [torch.ones(3), torch.ones(3, device="meta")],
            {},
            ValueError,
            r"grads\[1\]: expected a tensor on cpu",
        ),
        (torch.ones(3), {"out": torch.ones(2)}, TypeError, "out: expected torch.float64"),
        (
            torch.ones(3),
            {"out": torch.ones(3).double()},
            ValueError,
            "out: expected 2 elements on cpu, got 3",
        ),
    ],
)
def test_norm(grads: Any, options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"grad_norm_scale: {message}"):
        ak.grad_norm_scale(grads, **options)


@pytest.mark.parametrize("runner_name", ["cpu", "portable", "reference"])
def test_segments_may_come_from_a_generator(runner_name: str) -> None:
    if runner_name == "cpu" and not ak.available_cpu_isas():
        pytest.skip("the C++ back end is not built")
    given = tensors()
    call(given, (segment(start, start + 8) for start in (0, 8)), backend=runner_name)
    assert (given["param"][:16] != 1).all()
    assert (given["param"][16:] == 1).all()


def test_a_segment_begins_at_a_whole_element() -> None:
    with pytest.raises(ValueError, match=r"AdamSegment.start: expected an integer, got 0.5"):
        ak.AdamSegment(start=0.5, stop=2, lr=0.1, step=1)  # type: ignore[arg-type]
    assert segment(np.int64(3)).start == 3  # type: ignore[arg-type]


def test_a_tensor_without_memory_is_refused() -> None:
    given = tensors()
    given["grad"].untyped_storage().resize_(0)
    with pytest.raises(TypeError, match="adam_step: grad: expected a tensor with memory"):
        call(given)
    params, states, grad = [torch.ones(8)], [[torch.ones(8)], [torch.ones(8)]], torch.ones(8)
    table = ak.StepTable(ak.AdamSegment, params, states)
    grad.untyped_storage().resize_(0)
    with pytest.raises(TypeError, match=r"StepTable: grads\[0\]: expected a tensor with memory"):
        table.step([grad], [segment()], [0])
    with pytest.raises(TypeError, match=r"StepTable: grads\[0\]: expected a torch.Tensor, got list"):
        table.step([[1.0]], [segment()], [0])  # type: ignore[list-item]

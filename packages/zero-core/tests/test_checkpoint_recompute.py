"""A checkpoint changes what is kept and nothing else: gradients stay equal to the last bit, whatever a call is like."""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from dataclasses import dataclass

import pytest
import torch
import zero_core as zero
from checkpoint_models import (
    LAYERS,
    MATMULS,
    POLICIES,
    ROWS,
    WIDTH,
    Layer,
    Layers,
    LiveBytes,
    gradients,
    policy,
    same,
)
from torch import nn


@pytest.fixture
def x() -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(2, ROWS, WIDTH, requires_grad=True)


@pytest.fixture
def model() -> Layers:
    torch.manual_seed(2)
    return Layers()


@pytest.mark.parametrize("name", POLICIES)
def test_gradients_are_equal_to_the_last_bit(name: str, model: Layers, x: torch.Tensor) -> None:
    mask = torch.rand(2, ROWS, 2 * WIDTH)
    expected = gradients(model, lambda: model(x, mask), x)
    runs = Counter()
    for layer in model.layers:
        layer.down.register_forward_pre_hook(lambda *_: runs.update(["down"]))
    with zero.checkpoint_modules(model, Layer, policy(name)):
        for _ in range(3):  # buffers are used again
            assert same(gradients(model, lambda: model(x, mask), x), expected)
        assert runs["down"] == 3 * 2 * LAYERS, "nothing was computed again"
    assert not same(gradients(model, lambda: model(x, mask), x, seed=5), expected), "dropout dropped nothing"


@dataclass
class Result:
    hidden: torch.Tensor
    note: str


@pytest.mark.parametrize("name", POLICIES)
def test_any_arguments_and_results(name: str, x: torch.Tensor) -> None:
    weight = nn.Parameter(torch.randn(WIDTH, WIDTH))
    rows = torch.tensor([3, 1])

    def fn(first, nothing, pair, *, table, power, index):
        assert nothing is None
        hidden = torch.tanh(first @ weight) * pair[0] + table["shift"][0] ** power
        return {"out": [Result(hidden[:, index], "as it is")], "none": None, "two": (hidden.sum(), 2)}

    def run(call):
        result = call(fn, x, None, (x * 2, "text"), table={"shift": [torch.ones(WIDTH)]}, power=2, index=rows)
        assert result["out"][0].note == "as it is"
        assert result["none"] is None
        assert result["two"][1] == 2
        return result["out"][0].hidden * result["two"][0]

    holder = nn.ParameterList([weight])
    expected = gradients(holder, lambda: run(lambda f, *args, **kwargs: f(*args, **kwargs)), x)
    chosen = policy(name)
    found = gradients(holder, lambda: run(lambda f, *a, **k: zero.checkpoint(f, *a, policy=chosen, **k)), x)
    assert same(found, expected)


@pytest.mark.parametrize("name", POLICIES)
def test_tensors_of_any_layout(name: str) -> None:
    torch.manual_seed(3)
    big = torch.randn(12, 3 * WIDTH, requires_grad=True)
    layer = Layer().eval()
    layouts = [
        lambda: big[:, WIDTH : 2 * WIDTH],
        lambda: big[:WIDTH, :12].t().reshape(12, 12).t()[:, :1].expand(12, WIDTH),
        lambda: big.view(12, 3, WIDTH).transpose(0, 1),
        lambda: big[0, :WIDTH],
        lambda: big[:0, :WIDTH],
        lambda: big.t()[:WIDTH].t(),
    ]
    chosen = policy(name)
    for layout in layouts:
        expected = gradients(layer, lambda: layer(layout())[0], big)  # noqa: B023  # called at once
        found = gradients(layer, lambda: zero.checkpoint(layer, layout(), policy=chosen)[0], big)  # noqa: B023
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", POLICIES)
def test_inputs_without_gradient(name: str, model: Layers) -> None:
    x = torch.randn(ROWS, WIDTH)
    layer = model.layers[0]
    expected = gradients(layer, lambda: layer(x)[0])
    with zero.checkpoint_modules(model, Layer, policy(name)):
        assert same(gradients(layer, lambda: layer(x)[0]), expected)


def test_autocast_is_restored(model: Layers, x: torch.Tensor) -> None:
    def run() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(x).float()

    expected = gradients(model, run, x)
    seen = set()
    model.layers[0].down.register_forward_hook(lambda m, args, out: seen.add(out.dtype))
    with zero.checkpoint_modules(model, Layer):
        assert same(gradients(model, run, x), expected)
    assert seen == {torch.bfloat16}
    assert not same(gradients(model, lambda: model(x), x), expected)


@pytest.mark.parametrize("how", ["no_grad", "eval", "frozen"])
def test_without_backward_nothing_happens(how: str, model: Layers, x: torch.Tensor) -> None:
    chosen = policy("contiguous")

    def never(*args):
        raise AssertionError("a region was made")

    with zero.checkpoint_modules(model, Layer, chosen) as handle:
        for forward in handle.forwards.values():
            forward.plan = never
        if how == "eval":
            model.eval()
            model(x).sum().backward()
            assert x.grad is not None
        elif how == "frozen":
            model.requires_grad_(False)
            assert not model(x.detach()).requires_grad
        else:
            with torch.no_grad():
                model(x)
                zero.checkpoint(model, x, policy=chosen)
    assert chosen.keeper.holder._buffers == {}


def test_frozen_layers_pass_gradients_on(model: Layers, x: torch.Tensor) -> None:
    model.layers[1].requires_grad_(False)
    expected = gradients(model, lambda: model(x), x)
    with zero.checkpoint_modules(model, Layer, policy("contiguous")):
        assert same(gradients(model, lambda: model(x), x), expected)


@pytest.mark.parametrize("name", POLICIES)
def test_a_module_may_be_called_several_times(name: str, model: Layers, x: torch.Tensor) -> None:
    layer = model.layers[0]

    def run() -> torch.Tensor:
        return layer(layer(layer(x)[0], scale=2.0)[0])[0]

    expected = gradients(layer, run, x)
    with zero.checkpoint_modules(model, Layer, policy(name)):
        assert same(gradients(layer, run, x), expected)


@pytest.mark.parametrize("name", [name for name in POLICIES if "save_ops" not in name])
def test_backward_twice_through_one_graph(name: str, model: Layers, x: torch.Tensor) -> None:
    with zero.checkpoint_modules(model, Layer, policy(name)):
        out = model(x).sum()
        first = torch.autograd.grad(out, x, retain_graph=True)[0]
        assert torch.equal(torch.autograd.grad(out, x)[0], first)


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("outer", POLICIES)
def test_checkpoints_nest(name: str, outer: str, model: Layers, x: torch.Tensor) -> None:
    expected = gradients(model, lambda: model(x), x)
    chosen = policy(name)
    around = chosen if name == outer else policy(outer)
    with zero.checkpoint_modules(model, Layer, chosen):
        for _ in range(2):
            found = gradients(model, lambda: zero.checkpoint(model, x, policy=around), x)
            assert same(found, expected)


def test_hooks_of_a_checkpointed_module_run_once(model: Layers, x: torch.Tensor) -> None:
    runs = Counter()
    for layer in model.layers:
        layer.register_forward_pre_hook(lambda *_: runs.update(["before"]))
        layer.register_forward_hook(lambda *_: runs.update(["after"]))
    with zero.checkpoint_modules(
        model, lambda name, module: name.startswith("layers.") and name[-1].isdigit()
    ):
        model(x).sum().backward()
    assert runs == {"before": LAYERS, "after": LAYERS}


def test_close_restores_the_modules_exactly(model: Layers, x: torch.Tensor) -> None:
    own = model.layers[1].forward
    model.layers[2].forward = own  # somebody's own override
    before = [dict(module.__dict__) for module in model.modules()]
    params = [dict(param.__dict__) for param in model.parameters()]
    handle = zero.checkpoint_modules(model, Layer)
    model(x).sum().backward()
    handle.close()
    handle.close()
    assert before == [dict(module.__dict__) for module in model.modules()]
    assert params == [dict(param.__dict__) for param in model.parameters()]
    assert "forward" not in model.layers[0].__dict__

    handle = zero.checkpoint_modules(model, Layer)
    model.layers[0].forward = lambda *args: None
    with pytest.raises(zero.ZeroStateError, match=r"'layers\.0' was replaced after"):
        handle.close()
    assert "forward" not in model.layers[1].__dict__


def test_a_graph_outlives_its_handle(model: Layers, x: torch.Tensor) -> None:
    expected = gradients(model, lambda: model(x), x)

    def run() -> torch.Tensor:
        with zero.checkpoint_modules(model, Layer, policy("contiguous")):
            return model(x)

    assert same(gradients(model, run, x), expected)


def test_copies_and_pickles(model: Layers, x: torch.Tensor) -> None:
    expected = gradients(model, lambda: model(x), x)
    with zero.checkpoint_modules(model, Layer, policy("host")):
        copied = copy.deepcopy(model)
        with pytest.raises(zero.ZeroStateError, match="close the handle"):
            pickle.dumps(model)
        with torch.no_grad():
            for param in model.parameters():
                param.zero_()
        assert same(gradients(copied, lambda: copied(x), x), expected)


def test_what_cannot_be_honoured_is_refused(model: Layers) -> None:
    handle = zero.checkpoint_modules(model, lambda name, module: name == "layers.1")
    with pytest.raises(zero.ZeroConfigError, match=r"'layers\.1' \(Layer\) is under a checkpoint already"):
        zero.checkpoint_modules(model, Layer)
    assert "forward" not in model.layers[0].__dict__, "something was changed before the refusal"
    handle.close()
    with pytest.raises(
        zero.ZeroConfigError, match=r"classes: no module matches Conv2d; the model is made of .*Layer"
    ):
        zero.checkpoint_modules(model, nn.Conv2d)
    model.layers[0].compile(backend="eager")
    with pytest.raises(zero.ZeroConfigError, match=r"'layers\.0' .* compile its forward instead"):
        zero.checkpoint_modules(model, Layer)
    for settings, message in (
        ({"save_ops": (torch.ops.aten.mm,)}, r"expected ops such as torch\.ops\.aten\.mm\.default"),
        ({"partition": 2}, "expected a DeviceMesh or a ProcessGroup, got int"),
        ({"verify": True}, "over the ranks of partition"),
        ({"host_bytes": 1}, "host is False"),
        ({"host": True, "host_bytes": 0}, "bytes >= 1, got 0"),
        ({"contiguous_bytes": 2.5}, r"bytes >= 1, got 2\.5"),
        ({"host": True, "contiguous_bytes": 1}, "leave one of the two out"),
        ({"timeout_s": 0}, "seconds > 0"),
        (
            {"timeout_s": 5.0},
            r"timeout_s=\.\.\.\): it is the deadline of gathers among the ranks of partition",
        ),
        ({"min_bytes": 64, "save_ops": MATMULS}, r"min_bytes=\.\.\.\): without partition, host or"),
    ):
        with pytest.raises(zero.ZeroConfigError, match=message):
            zero.CheckpointPolicy(**settings)


def test_a_different_second_run_is_an_error(x: torch.Tensor) -> None:
    widths = iter([WIDTH, WIDTH - 1])
    with pytest.raises(torch.utils.checkpoint.CheckpointError, match="different metadata"):
        zero.checkpoint(lambda t: t[..., : next(widths)].sin(), x).sum().backward()


def test_saved_ops_are_not_run_again(model: Layers, x: torch.Tensor) -> None:
    def matmuls(chosen: zero.CheckpointPolicy) -> int:
        with zero.checkpoint_modules(model, Layer, chosen), LiveBytes() as live:
            model(x).sum().backward()
        return live.ops[torch.ops.aten.addmm.default]

    assert matmuls(zero.CheckpointPolicy(save_ops=MATMULS)) == 1 + 2 * LAYERS
    again = matmuls(zero.CheckpointPolicy()) - 1 - 2 * LAYERS
    assert again == LAYERS, (
        "the recomputation of a layer ends before its last matmul, whose result nothing saves"
    )


def test_compiled_functions_inside(model: Layers, x: torch.Tensor) -> None:
    model.eval()  # the compiler draws dropout elsewhere
    expected = gradients(model, lambda: model(x), x)
    model.train()
    for layer in model.layers:
        layer.drop.p = 0.0
        layer.forward = torch.compile(layer.forward, backend="aot_eager")
    torch._dynamo.utils.counters.clear()
    with zero.checkpoint_modules(model, Layer, policy("contiguous")):
        found = gradients(model, lambda: model(x), x)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0, "nothing was compiled"
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(found, expected, strict=True))

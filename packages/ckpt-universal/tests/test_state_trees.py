"""What a state tree may hold, and what happens where it and a checkpoint differ."""

from __future__ import annotations

import ckpt_universal as ckpt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn,
]  # fmt: skip


def a_tensor(shape, dtype, seed=0):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 9).to(dtype)


@settings(max_examples=40, deadline=None)
@given(
    st.dictionaries(
        st.text("abc", min_size=1, max_size=3),
        st.tuples(st.lists(st.integers(0, 9), max_size=4), st.sampled_from(DTYPES)),
        max_size=5,
    ),
    st.sampled_from([None, 1]),
    st.integers(1, 3000),
)
def test_any_shape_and_dtype_comes_back(tmp_path_factory, tensors, compress, chunk_bytes):
    root = tmp_path_factory.mktemp("any")
    state = {name: a_tensor(shape, dtype) for name, (shape, dtype) in tensors.items()}
    ckpt.save(root, state, step=1, policy=ckpt.SavePolicy(compress=compress, chunk_bytes=chunk_bytes))
    found = ckpt.read_tree(root)
    into = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    ckpt.load(root, into=into)
    for name, tensor in state.items():
        for other in (found[name], into[name]):
            assert other.dtype is tensor.dtype
            assert other.shape == tensor.shape
            assert torch.equal(other.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


def test_strides_do_not_matter(tmp_path):
    base = torch.arange(60.0).view(6, 10)
    state = {"t": base.t(), "step": base[::2, 1::3], "one": base[3], "expanded": torch.ones(1).expand(4, 3)}
    ckpt.save(tmp_path, state, step=0)
    into = {"t": torch.zeros(6, 10).t(), "step": torch.zeros(6, 10)[::2, 1::3], "one": torch.zeros(10)}
    ckpt.load(tmp_path, into={**into, "expanded": torch.zeros(4, 3)})
    assert all(torch.equal(into[name], state[name]) for name in into)


def model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))


def trained(optimizer_class=torch.optim.AdamW, steps=3, **options):
    net = model()
    optimizer = optimizer_class(net.parameters(), lr=0.1, **options)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20)
    train(net, optimizer, schedule, steps)
    return {
        "model": net,
        "optimizer": optimizer,
        "schedule": schedule,
        "random": ckpt.RandomStates(),
        "epoch": 2,
    }


def train(net, optimizer, schedule, steps):
    losses = []
    for _ in range(steps):
        loss = net(torch.randn(16, 6)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (torch.optim.AdamW, {}),
        (torch.optim.SGD, {"momentum": 0.9}),
        (torch.optim.Adafactor, {}),
        (torch.optim.Adam, {"amsgrad": True}),
    ],
)
def test_a_new_process_goes_on_bit_for_bit(tmp_path, kind, options):
    state = trained(kind, **options)
    ckpt.save(tmp_path, state, step=3)
    expected = train(state["model"], state["optimizer"], state["schedule"], 4)
    fresh = trained(kind, steps=0, **options)
    fresh["epoch"] = 0
    with torch.no_grad():
        for param in fresh["model"].parameters():
            param.add_(1.0)
    ckpt.load(tmp_path, into=fresh)
    assert fresh["epoch"] == 2
    assert train(fresh["model"], fresh["optimizer"], fresh["schedule"], 4) == expected


def test_differences_are_listed_and_nothing_changes(tmp_path):
    ckpt.save(tmp_path, {"a": torch.ones(3), "b": torch.ones(2, 2), "n": 1, "old": torch.ones(1)}, step=0)
    state = {"a": torch.zeros(3), "b": torch.zeros(4), "new": torch.zeros(1), "n": 0, "m": 0}
    with pytest.raises(ckpt.MismatchError) as caught:
        ckpt.load(tmp_path, into=state)
    message = str(caught.value)
    assert "missing in the checkpoint: 'm', 'new'" in message
    assert "unexpected there: 'old'" in message
    assert "'b': (4,) in the state, (2, 2) in the checkpoint" in message
    assert "Nothing was changed" in message
    assert not state["a"].any()
    assert state["n"] == 0
    with pytest.raises(ckpt.MismatchError, match="of another shape"):
        ckpt.load(tmp_path, into=state, strict=False)
    state["b"] = torch.zeros(2, 2)
    loaded = ckpt.load(tmp_path, into=state, strict=False)
    assert loaded.missing == ("m", "new")
    assert loaded.unexpected == ("old",)
    assert state["a"].all()
    assert state["n"] == 1
    with pytest.raises(ckpt.MismatchError, match=r"'a': torch\.int64 in the state, torch\.float32"):
        ckpt.load(tmp_path, into={"a": torch.zeros(3, dtype=torch.int64)}, strict=False)


def test_parts_of_a_checkpoint(tmp_path):
    ckpt.save(
        tmp_path,
        {"model": {"a": torch.ones(3), "b": torch.ones(2)}, "optimizer": {"a": torch.ones(3)}},
        step=0,
    )
    state = {"model": {"a": torch.zeros(3), "b": torch.zeros(2)}, "more": torch.zeros(1)}
    ckpt.load(tmp_path, into=state, only="model.*")
    assert state["model"]["a"].all()
    assert state["model"]["b"].all()
    assert not state["more"].any()
    for pattern in ("modell.*", "optimizer.*"):
        with pytest.raises(ckpt.ConfigError, match="only: nothing of the state matches"):
            ckpt.load(tmp_path, into=state, only=pattern)
    renamed = {"net": {"a": torch.zeros(3)}}
    ckpt.load(tmp_path, into=renamed, only="*", rename=lambda name: name.replace("net.", "model."))
    assert renamed["net"]["a"].all()
    other = {"x": torch.zeros(3)}
    ckpt.load(tmp_path, into=other, only=["x"], rename={"x": "optimizer.a"})
    assert other["x"].all()
    assert set(ckpt.read_tree(tmp_path, only="model.*")) == {"model.a", "model.b"}


def test_containers_keep_their_identity(tmp_path):
    inner = {"lr": 0.5, "list": [1, torch.ones(2), {"k": 3}], "tuple": (1, torch.ones(1))}
    ckpt.save(tmp_path, {"inner": inner}, step=0)
    target = {"lr": 0.0, "list": [0, torch.zeros(2), {"k": 0}], "tuple": (0, torch.zeros(1))}
    tensors = target["list"][1], target["list"][2], target["tuple"][1]
    ckpt.load(tmp_path, into={"inner": target})
    assert target["lr"] == 0.5
    assert target["list"][0] == 1
    assert target["list"][1] is tensors[0]
    assert target["list"][2] is tensors[1]
    assert target["list"][2] == {"k": 3}
    assert target["tuple"] == (1, tensors[2])
    assert all(tensor.all() for tensor in (tensors[0], tensors[2]))


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"a": {"b": torch.ones(1)}, "a.b": torch.ones(1)}, "two tensors have the name 'a.b'"),
        ({"f": open}, "f: a builtins.builtin_function_or_method cannot be stored"),
        ({"s": torch.eye(3).to_sparse()}, "layout torch.sparse_coo cannot be stored"),
        ({"s": ckpt.Shard((4,), torch.float32, (3,), torch.ones(2))}, "leaves the tensor"),
        ({"s": ckpt.Shard((4,), torch.float16, (0,), torch.ones(4))}, "says torch.float16"),
        (
            {"s": ckpt.Shard((4, 4), torch.float32, (0, 0), torch.ones(4))},
            "expected a 1-D part with one offset",
        ),
        ({"s": ckpt.Shard((4,), torch.float32, (0,), torch.ones(3))}, "1 of 4 elements are held by nobody"),
        ({"p": ckpt.PerRank(torch.ones(5 << 20))}, "inside PerRank"),
    ],
)
def test_what_cannot_be_stored_is_refused_before_anything_is_written(tmp_path, state, message):
    with pytest.raises(ckpt.ConfigError, match=message):
        ckpt.save(tmp_path / "new", state, step=0)
    assert not (tmp_path / "new").exists()


def test_a_model_without_memory_is_refused(tmp_path):
    ckpt.save(tmp_path, {"model": model()}, step=0)
    with torch.device("meta"):
        empty = model()
    with pytest.raises(ckpt.MismatchError, match="meta device and has no memory"):
        ckpt.load(tmp_path, into={"model": empty})


@pytest.mark.parametrize(
    "make",
    [
        lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [3, 5]),
        lambda o: torch.optim.lr_scheduler.SequentialLR(
            o, [torch.optim.lr_scheduler.MultiStepLR(o, [1]), torch.optim.lr_scheduler.ConstantLR(o)], [2]
        ),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.5, total_steps=9),
    ],
)
def test_schedules_go_on(tmp_path, make):
    def made():
        optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
        return optimizer, make(optimizer)

    def rates(optimizer, schedule):
        found = []
        for _ in range(4):
            optimizer.step()
            schedule.step()
            found.append(optimizer.param_groups[0]["lr"])
        return found

    optimizer, schedule = made()
    rates(optimizer, schedule)
    ckpt.save(tmp_path, {"optimizer": optimizer, "schedule": schedule}, step=4)
    expected = rates(optimizer, schedule)
    optimizer, schedule = made()
    ckpt.load(tmp_path, into={"optimizer": optimizer, "schedule": schedule})
    assert rates(optimizer, schedule) == expected


def test_a_module_may_be_found_under_other_names(tmp_path):
    saved, model = nn.Linear(2, 2), nn.Linear(2, 2)
    ckpt.save(tmp_path, {"m": saved}, step=1)
    ckpt.load(tmp_path, into={"enc": model}, only="*", rename=lambda name: name.replace("enc.", "m."))
    assert torch.equal(model.weight, saved.weight)
    with pytest.raises(ckpt.MismatchError, match=r"enc\.bias.*m\.weight.*Nothing was changed"):
        ckpt.load(tmp_path, into={"enc": model})
    loaded = ckpt.load(tmp_path, into={"enc": model}, only="*", strict=False)
    assert loaded.missing == ("enc.bias", "enc.weight")


def test_a_model_with_fewer_layers_takes_what_it_has(tmp_path):
    def layers(count):
        return nn.Sequential(*(nn.Linear(2, 2) for _ in range(count)))

    saved, model = layers(3), layers(2)
    before = model[0].weight.detach().clone()
    ckpt.save(tmp_path, {"m": saved}, step=1)
    with pytest.raises(ckpt.MismatchError, match=r"unexpected there: 'm\.2\.bias', 'm\.2\.weight'"):
        ckpt.load(tmp_path, into={"m": model})
    assert torch.equal(model[0].weight, before)
    loaded = ckpt.load(tmp_path, into={"m": model}, strict=False)
    assert loaded.unexpected == ("m.2.bias", "m.2.weight")
    assert torch.equal(model[1].weight, saved[1].weight)


def test_a_load_that_is_refused_leaves_an_optimizer_as_it_was(tmp_path):
    def made(**options):
        param = nn.Parameter(torch.ones(3))
        optimizer = torch.optim.AdamW([param], **options)
        param.sum().backward()
        optimizer.step()
        return param, optimizer

    ckpt.save(tmp_path, {"o": made(amsgrad=True)[1], "more": torch.ones(1)}, step=1)
    param, optimizer = made()
    with pytest.raises(ckpt.MismatchError, match="unexpected there: 'more'"):
        ckpt.load(tmp_path, into={"o": optimizer})
    assert set(optimizer.state[param]) == {"step", "exp_avg", "exp_avg_sq"}


def test_conjugates_are_stored_as_what_they_show(tmp_path):
    value = torch.randn(5, dtype=torch.complex64)
    ckpt.save(tmp_path, {"conj": value.conj(), "neg": value.conj().imag}, step=1)
    found = ckpt.read_tree(tmp_path)
    assert torch.equal(found["conj"], value.conj().resolve_conj())
    assert torch.equal(found["neg"], -value.imag)


def test_an_optimizer_that_has_not_stepped_takes_chosen_state(tmp_path):
    def made():
        param = nn.Parameter(torch.ones(3))
        return param, torch.optim.AdamW([param], lr=0.5)

    param, optimizer = made()
    param.sum().backward()
    optimizer.step()
    ckpt.save(tmp_path, {"o": optimizer}, step=1)
    other, fresh = made()
    fresh.param_groups[0]["lr"] = 0.25
    ckpt.load(tmp_path, into={"o": fresh}, only="o.state.*")
    assert torch.equal(fresh.state[other]["exp_avg"], optimizer.state[param]["exp_avg"])
    assert fresh.state[other]["step"] == 1
    assert fresh.param_groups[0]["lr"] == 0.25

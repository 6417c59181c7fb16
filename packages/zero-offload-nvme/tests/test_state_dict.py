"""State dicts go both ways between these classes and torch's, through files and copies, and training goes on."""

from __future__ import annotations

import copy
import io
from pathlib import Path

import pytest
import torch
import zero_offload_nvme as off
from offload_models import PAIRS, SHAPES, copies_of, make_params, train


@pytest.mark.parametrize("case", PAIRS)
def test_from_torch_and_back(case: str) -> None:
    ours, theirs, options = PAIRS[case]
    params = make_params()
    whole, there, back = copies_of(params), copies_of(params), copies_of(params)
    reference = theirs(whole, fused=True, **options)
    train((reference, whole), steps=9)

    first = theirs(there, fused=True, **options)
    train((first, there), steps=3)
    second = ours(there, lr=0.5)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for step in range(3, 6):
        _one(second, there, step)
    for param, value in zip(back, there, strict=True):
        param.data.copy_(value)
    third = theirs(back, lr=0.5)
    third.load_state_dict(copy.deepcopy(second.state_dict()))
    for step in range(6, 9):
        _one(third, back, step)
    for param, expected in zip(back, whole, strict=True):
        torch.testing.assert_close(param, expected, rtol=1e-6, atol=1e-6)
    assert third.state_dict()["param_groups"][0]["lr"] == reference.state_dict()["param_groups"][0]["lr"]
    assert _names(third) == _names(reference)


def _one(optimizer: torch.optim.Optimizer, params: list[torch.nn.Parameter], step: int) -> None:
    from offload_models import give_grads

    give_grads(params, seed=step)
    optimizer.step()


def _names(optimizer: torch.optim.Optimizer) -> list[set[str]]:
    return [set(state) for state in optimizer.state_dict()["state"].values()]


@pytest.mark.parametrize("saved_by", [torch.optim.Adam, off.CPUAdam])
def test_weight_decay_stays_decoupled(saved_by) -> None:
    """`AdamW` that takes over the state of an Adam: torch's decays as AdamW, and so does ours."""
    params = make_params()
    first = saved_by(params, lr=1e-2, weight_decay=0.3)
    train((first, params), steps=2)
    here, there = copies_of(params), copies_of(params)
    ours, theirs = off.CPUAdamW(here), torch.optim.AdamW(there, fused=True)
    for each in (ours, theirs):
        each.load_state_dict(copy.deepcopy(first.state_dict()))
    train((ours, here), (theirs, there), steps=3)
    for param, expected in zip(here, there, strict=True):
        torch.testing.assert_close(param, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", [*PAIRS, "lion"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resuming_from_a_file_changes_no_bit(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    make = off.CPULion if case == "lion" else PAIRS[case][0]
    options = {} if case == "lion" else PAIRS[case][2]
    params = make_params(dtype=dtype)
    others = copies_of(params)
    one, other = make(params, **options), make(others, **options)
    train((one, params), (other, others), steps=3)
    torch.save(other.state_dict(), tmp_path / "state.pt")
    fresh = make(others, lr=0.7)
    fresh.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    train((one, params), (fresh, others), steps=3, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(params, others, strict=True))


def test_masters_travel_in_fp32_under_their_own_key() -> None:
    params = make_params(dtype=torch.bfloat16)
    optimizer = off.CPUAdamW(params, lr=1e-4)
    train((optimizer, params), steps=3)
    for state in optimizer.state_dict()["state"].values():
        assert set(state) == {"step", "exp_avg", "exp_avg_sq", "master"}
        assert {value.dtype for value in state.values()} == {torch.float32}
    fresh = off.CPUAdamW(params)
    fresh.load_state_dict(optimizer.state_dict())
    assert all(torch.equal(fresh.state[p]["master"], optimizer.state[p]["master"]) for p in params)


def test_a_state_dict_without_masters_is_welcome() -> None:
    params = make_params(dtype=torch.bfloat16)
    theirs = torch.optim.AdamW(params)
    train((theirs, params), steps=2)
    optimizer = off.CPUAdamW(params)
    optimizer.load_state_dict(theirs.state_dict())
    train((optimizer, params), steps=1)
    assert all(state["exp_avg"].dtype == torch.float32 for state in optimizer.state.values())
    assert all(torch.equal(optimizer.state[p]["master"].bfloat16(), p) for p in params)


def test_weights_that_are_loaded_count_whatever_the_master_says() -> None:
    params = make_params([(40,)], dtype=torch.bfloat16)
    optimizer = off.CPUAdamW(params, lr=0.0, weight_decay=0.0)
    train((optimizer, params), steps=1)
    (param,) = params
    master = optimizer.state[param]["master"]
    finer = master + 1e-5  # rounds to the same: the master has more to say than the parameter
    master.copy_(finer)
    assert torch.equal(master.bfloat16(), param)
    with torch.no_grad():
        param[:3] = 7.0
    train((optimizer, params), steps=1)
    assert (master[:3] == 7).all()
    assert torch.equal(master[3:], finer[3:])
    assert (param[:3] == 7).all()


def test_copies_and_pickles_go_on_alone() -> None:
    params = make_params()
    optimizer = off.CPUAdamW(params)
    train((optimizer, params), steps=2)
    for made in (copy.deepcopy(optimizer), _through_pickle(optimizer)):
        before = [param.detach().clone() for param in params]
        others = made.param_groups[0]["params"]
        train((made, others), steps=1)
        assert all(torch.equal(param, value) for param, value in zip(params, before, strict=True))
        assert made.state[others[0]]["step"] == 3
    assert optimizer.state[params[0]]["step"] == 2


def _through_pickle(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    buffer = io.BytesIO()
    torch.save(optimizer, buffer)
    buffer.seek(0)
    loaded: torch.optim.Optimizer = torch.load(buffer, weights_only=False)
    return loaded


def test_hooks_see_what_is_loaded() -> None:
    params = make_params()
    optimizer = off.CPUAdam(params)
    train((optimizer, params), steps=1)
    saved = copy.deepcopy(optimizer.state_dict())
    seen: list[int] = []

    def double(_: torch.optim.Optimizer, given: dict[str, object]) -> dict[str, object]:
        states = given["state"]
        assert isinstance(states, dict)
        return {**given, "state": {k: {**s, "exp_avg": s["exp_avg"] * 2} for k, s in states.items()}}

    optimizer.register_load_state_dict_pre_hook(double)
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append(len(o.state)))
    optimizer.load_state_dict(saved)
    assert seen == [len(SHAPES)]
    assert torch.equal(optimizer.state[params[-1]]["exp_avg"], saved["state"][len(SHAPES) - 1]["exp_avg"] * 2)


def test_what_does_not_fit_changes_nothing() -> None:
    params = make_params([(4,), (5,)])
    optimizer = off.CPUAdamW(params)
    train((optimizer, params), steps=1)
    before = copy.deepcopy(optimizer.state_dict())
    other = copy.deepcopy(before)
    other["state"][1]["exp_avg"] = torch.zeros(6)
    with pytest.raises(
        RuntimeError, match=r"parameter 1 of group 0, shape \(5,\): state 'exp_avg' has shape \(6,\)"
    ):
        optimizer.load_state_dict(other)
    other = copy.deepcopy(before)
    other["param_groups"][0]["amsgrad"] = True
    with pytest.raises(ValueError, match="amsgrad=True: expected False"):
        optimizer.load_state_dict(other)
    other = copy.deepcopy(before)
    other["param_groups"][0]["params"].pop()
    with pytest.raises(ValueError, match="doesn't match the size"):
        optimizer.load_state_dict(other)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert all(torch.equal(after["state"][1][k], v) for k, v in before["state"][1].items())

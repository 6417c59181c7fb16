"""Closures, schedulers, groups, scalers, hooks: what people do with a torch optimizer works as it does there."""

from __future__ import annotations

import copy

import pytest
import torch
import zero_offload_nvme as off
from offload_models import copies_of, give_grads, make_params, train
from torch import nn


def test_a_closure_is_called_with_gradients_and_its_loss_returned() -> None:
    param = nn.Parameter(torch.ones(3))
    optimizer = off.CPUAdam([param])

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = param.square().sum()
        loss.backward()
        return loss

    with torch.no_grad():
        assert optimizer.step(closure) == 3.0
    assert (param < 1).all()
    assert optimizer.step() is None


@pytest.mark.parametrize("tensor_lr", [False, True])
def test_schedulers(tensor_lr: bool) -> None:
    params = make_params()
    others = copies_of(params)
    lr = torch.tensor(0.1) if tensor_lr else 0.1
    one, other = off.CPUAdamW(params, lr=lr), torch.optim.AdamW(others, lr=0.1, fused=True)
    schedules = [torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.2, total_steps=20) for o in (one, other)]
    for step in range(15):
        give_grads(params, others, seed=step)
        for optimizer, schedule in zip((one, other), schedules, strict=True):
            optimizer.step()
            schedule.step()
    for param, expected in zip(params, others, strict=True):
        torch.testing.assert_close(param, expected, rtol=1e-5, atol=1e-5)


def test_groups_of_their_own_options_and_later_ones() -> None:
    params, later = make_params(), make_params(seed=5)
    others, also = copies_of(params), copies_of(later)
    groups = [
        {"params": params[:4], "lr": 0.1},
        {"params": params[4:], "weight_decay": 0.0, "betas": (0.5, 0.9)},
    ]
    same = [{**groups[0], "params": others[:4]}, {**groups[1], "params": others[4:]}]
    one, other = off.CPUAdamW(groups), torch.optim.AdamW(same, fused=True)
    train((one, params), (other, others), steps=3)
    one.add_param_group({"params": later, "eps": 1e-4})
    other.add_param_group({"params": also, "eps": 1e-4})
    train((one, [*params, *later]), (other, [*others, *also]), steps=3, seed=1)
    for param, expected in zip([*params, *later], [*others, *also], strict=True):
        torch.testing.assert_close(param, expected, rtol=1e-5, atol=1e-6)
        assert one.state[param]["step"] == other.state[expected]["step"]


def test_parameters_without_a_gradient_stay_and_are_not_counted() -> None:
    params = make_params()
    others = copies_of(params)
    one, other = off.CPUAdamW(params, lr=0.1), torch.optim.AdamW(others, lr=0.1, fused=True)
    for step in range(8):  # as experts are used: now these, now those
        give_grads(params, others, seed=step)
        for place, (param, also) in enumerate(zip(params, others, strict=True)):
            if (place + step) % 3 == 0 or (place == 5 and step < 6):
                param.grad = also.grad = None
        one.step()
        other.step()
    for param, expected in zip(params, others, strict=True):
        torch.testing.assert_close(param, expected, rtol=1e-5, atol=1e-6)
        assert one.state[param]["step"] == other.state[expected]["step"]


def test_nothing_to_step() -> None:
    params = make_params()
    before = copies_of(params)
    optimizer = off.CPUAdamW(params)
    optimizer.step()
    assert not optimizer.state
    assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))


def test_a_grad_scaler_skips_what_overflowed() -> None:
    param = nn.Parameter(torch.ones(4))
    optimizer = off.CPUAdamW([param])
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for factor, moves in ((float("inf"), False), (1.0, True)):
        before = param.detach().clone()
        optimizer.zero_grad()
        scaler.scale((param * factor).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(param, before) != moves


def test_states_that_a_user_replaces_count() -> None:
    params = make_params([(6,), (7,)])
    others = copies_of(params)
    one, other = off.CPUAdamW(params), torch.optim.AdamW(others, fused=True)
    train((one, params), (other, others), steps=2)
    for optimizer, first in ((one, params[0]), (other, others[0])):
        optimizer.state[first]["exp_avg"] = torch.full((6,), 0.5)
        optimizer.state[first]["step"] = torch.tensor(9.0)
        optimizer.param_groups[0]["lr"] = 0.3
    train((one, params), (other, others), steps=2, seed=1)
    for param, expected in zip(params, others, strict=True):
        torch.testing.assert_close(param, expected, rtol=1e-6, atol=1e-6)


def test_a_parameter_that_gets_other_memory_is_found_there() -> None:
    model = nn.Linear(4, 4)
    optimizer = off.CPUAdamW(model.parameters(), lr=0.1)
    train((optimizer, list(model.parameters())), steps=1)
    old = model.weight.data
    kept = old.clone()
    model.weight.data = old.clone()
    train((optimizer, list(model.parameters())), steps=1)
    assert torch.equal(old, kept)
    assert not torch.equal(model.weight, kept)


def test_two_optimizers_of_one_process_know_nothing_of_each_other() -> None:
    params, others = make_params(), make_params()
    one, other = off.CPUAdamW(params), off.CPUAdamW(others)
    train((one, params), (other, others), steps=2)
    assert all(torch.equal(a, b) for a, b in zip(params, others, strict=True))
    assert one.state[params[0]]["step"] is not other.state[others[0]]["step"]
    assert not any(name.startswith("zero") for param in params for name in vars(param))


def test_hooks_and_profiles_of_torch_see_the_step() -> None:
    params = make_params([(3,)])
    optimizer = off.CPUAdamW(params)
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    train((optimizer, params), steps=1)
    assert seen == ["before", "after"]
    assert copy.copy(repr(optimizer)).startswith("CPUAdamW")

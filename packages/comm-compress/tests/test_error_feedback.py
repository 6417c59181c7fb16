"""Residuals: nothing that is lost is lost for good, and the number of ranks may change."""

from __future__ import annotations

import pytest
import torch
from comm_compress import CompressConfigError, CompressStateError
from comm_compress.error_feedback import (
    ErrorFeedback,
    LoCo,
    LoCoPolicy,
    redeal_server_errors,
    redeal_worker_errors,
)
from hypothesis import given
from hypothesis import strategies as st


def coarse(tensor: torch.Tensor) -> torch.Tensor:
    """A channel that loses much."""
    return (tensor * 2).round() / 2


def test_what_arrives_and_what_is_owed_add_up_to_all_that_was_wanted() -> None:
    feedback, generator = ErrorFeedback(), torch.Generator().manual_seed(0)
    wanted, arrived = torch.zeros(100), torch.zeros(100)
    for _ in range(50):
        x = torch.randn(100, generator=generator)
        c = feedback.compensate("a", x)
        feedback.keep("a", c, coarse(c))
        wanted += x
        arrived += coarse(c)
    owed = feedback.state_dict()["owed"]["a"]
    torch.testing.assert_close(arrived + owed, wanted)
    assert owed.abs().max() <= 0.25 + 1e-6
    assert (arrived - wanted).abs().max() > 0.1  # the channel did lose something


def test_loco_keeps_the_moving_average_of_its_definition() -> None:
    feedback, generator = LoCo(LoCoPolicy(beta=0.7, reset_steps=5)), torch.Generator().manual_seed(0)
    error = torch.zeros(33)
    for step in range(1, 13):
        x = torch.randn(33, generator=generator)
        c = feedback.compensate("a", x)
        torch.testing.assert_close(c, x + error)
        feedback.keep("a", c, coarse(c))
        error = torch.zeros(33) if step % 5 == 0 else 0.7 * error + 0.3 * (c - coarse(c))
    assert LoCo(LoCoPolicy(beta=0.0, reset_steps=0)).policy.beta == 0


@pytest.mark.parametrize("make", [ErrorFeedback, LoCo])
def test_state_dict_reset_names_and_dtypes(make: type[ErrorFeedback]) -> None:
    first, second = make(), make()
    for name, dtype in (("a", torch.bfloat16), ("b", torch.float16), ("empty", torch.float32)):
        x = torch.linspace(-3, 3, 0 if name == "empty" else 11).to(dtype)
        c = first.compensate(name, x)
        assert c.dtype == torch.float32
        assert c.data_ptr() != x.data_ptr() or not x.numel()
        first.keep(name, c, coarse(c).to(dtype))
    second.load_state_dict(first.state_dict())
    x = torch.linspace(-3, 3, 11)
    assert torch.equal(first.compensate("a", x), second.compensate("a", x))
    assert not torch.equal(first.compensate("a", x), first.compensate("c", x))
    first.reset()
    assert torch.equal(first.compensate("a", x), x)
    assert not torch.equal(second.compensate("a", x), x)
    with pytest.raises(CompressStateError, match=r"'a': expected 11 elements, got 3"):
        second.compensate("a", torch.zeros(3))


def test_a_step_that_overflows_costs_no_residual() -> None:
    feedback = ErrorFeedback()
    c = feedback.compensate("a", torch.tensor([0.3, 0.4]))
    feedback.keep("a", c, coarse(c))
    before = feedback.state_dict()["owed"]["a"].clone()
    c = feedback.compensate("a", torch.tensor([float("inf"), 1.0]))
    feedback.keep("a", c, coarse(c))
    assert torch.equal(feedback.state_dict()["owed"]["a"], before)


@pytest.mark.parametrize("kwargs", [{"beta": 1.0}, {"beta": -0.1}, {"reset_steps": -1}])
def test_policies_out_of_range(kwargs: dict[str, float]) -> None:
    with pytest.raises(CompressConfigError, match="LoCoPolicy"):
        LoCoPolicy(**kwargs)  # type: ignore[arg-type]


@given(st.integers(0, 50), st.integers(1, 6), st.integers(1, 6))
def test_redealt_residuals_owe_as_much(numel: int, old: int, new: int) -> None:
    generator = torch.Generator().manual_seed(numel)
    errors = [torch.randn(numel, generator=generator) for _ in range(old)]
    dealt = redeal_worker_errors(errors, new)
    assert len(dealt) == new
    torch.testing.assert_close(torch.stack(dealt).mean(0), torch.stack(errors).mean(0))
    whole = torch.randn(numel, generator=generator)
    sizes = [numel // old + (rank < numel % old) for rank in range(old)]
    served = redeal_server_errors(list(whole.split(sizes)), new)
    assert torch.equal(torch.cat(served), whole)
    assert [part.numel() for part in served] == [numel // new + (rank < numel % new) for rank in range(new)]

"""What waits for the backward is the inputs of the checkpoints, byte for byte, and nothing of it is left afterwards."""

from __future__ import annotations

import gc

import pytest
import torch
import zero_core as zero
from checkpoint_models import LiveBytes
from torch import nn

WIDTH, ROWS, LAYERS = 32, 32, 4
INPUT = ROWS * WIDTH * 4


class Wide(nn.Module):
    """Saves 9 times its input: the input, and twice the hidden state."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH, bias=False)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


def bytes_of_a_step(policy: zero.CheckpointPolicy | None, *, wrap: bool = True) -> tuple[int, int, int]:
    """Bytes that live between forward and backward, at most during the step, and when the graph is gone."""
    torch.manual_seed(0)
    model = nn.Sequential(*(Wide() for _ in range(LAYERS)))
    for param in model.parameters():
        param.grad = torch.zeros_like(param)  # so that a step leaves nothing new behind
    handle = zero.checkpoint_modules(model, Wide, policy) if wrap else None
    x = torch.randn(ROWS, WIDTH)
    gc.disable()  # nothing may depend on the collector
    try:
        with LiveBytes() as live:
            loss = model(x * 1.0).sum()
            between = live.now
            loss.backward()
            del loss
        assert all(param.grad.abs().sum() > 0 for param in model.parameters())
    finally:
        gc.enable()
    if handle is not None:
        handle.close()
    return between, live.peak, live.now


def test_the_inputs_are_all_that_is_kept() -> None:
    between, peak, after = bytes_of_a_step(zero.CheckpointPolicy())
    assert between == LAYERS * INPUT + 4, "the inputs, and the loss"
    without, peak_without, _ = bytes_of_a_step(None, wrap=False)
    assert without == LAYERS * 9 * INPUT + 4
    assert after == 0
    assert peak <= (LAYERS + 1) * INPUT + 3 * 9 * INPUT, (
        "all kept inputs, and one layer's activations and gradients"
    )
    assert peak < 0.75 * peak_without


@pytest.mark.parametrize(
    "settings",
    [{"host": True}, {"host": True, "host_bytes": 2 * INPUT}, {"contiguous_bytes": 2 * LAYERS * INPUT}],
)
def test_holders_keep_no_second_copy(settings: dict) -> None:
    policy = zero.CheckpointPolicy(min_bytes=1, **settings)
    between, peak, after = bytes_of_a_step(policy)
    buffers = settings.get("contiguous_bytes", LAYERS * INPUT)
    assert between == buffers + 4
    assert after == 0, "close gives buffers back"
    assert peak < buffers + 3 * 9 * INPUT


def test_saved_ops_cost_their_outputs() -> None:
    policy = zero.CheckpointPolicy(save_ops=(torch.ops.aten.addmm.default,))
    assert bytes_of_a_step(policy)[0] == LAYERS * (INPUT + 4 * INPUT) + 4


def test_a_mask_of_all_layers_is_kept_once() -> None:
    mask = torch.rand(ROWS, WIDTH)
    for settings in ({"host": True}, {"contiguous_bytes": 64 * INPUT}):
        policy = zero.CheckpointPolicy(min_bytes=1, **settings)
        x = torch.randn(ROWS, WIDTH, requires_grad=True)
        h, addresses = x, set()

        def layer(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            addresses.add(mask.data_ptr())  # noqa: B023  # called in this round
            return (x * mask).sin()

        for _ in range(LAYERS):
            h = zero.checkpoint(layer, h, mask, policy=policy)
        holder = policy.keeper.holder
        kept = holder.pooled_bytes if "host" in settings else _in_use(holder)
        assert kept == (LAYERS + 1) * INPUT
        expected = x.detach().clone().requires_grad_()
        h.sum().backward()
        h = expected
        for _ in range(LAYERS):
            h = (h * mask).sin()
        h.sum().backward()
        assert torch.equal(x.grad, expected.grad)

        h = zero.checkpoint(layer, x, mask, policy=policy)
        mask.mul_(2)  # what was kept of it no longer says what it does
        h = zero.checkpoint(layer, h, mask, policy=policy)
        x.grad = expected.grad = None
        h.sum().backward()
        ((expected * (mask / 2)).sin() * mask).sin().sum().backward()
        assert torch.equal(x.grad, expected.grad)


def _in_use(arena) -> int:
    return sum(buffer.extents.in_use for buffer in arena._buffers.values())

"""Between two ends of windows, ranks exchange the chosen rows and nothing else of the parameters."""

from __future__ import annotations

import math

import torch
import zero_core as zero
from stored_models import build, train
from zero_core.testing import run_ranks
from zero_offload_nvme import HostStore, ZenFlow

RATIO, WINDOW = 0.1, 3


def count(wire, sizes: list[int]) -> None:
    """Have the bytes of every gather go into `sizes`."""
    gather = wire.gather

    def counted(name, shard, out):
        sizes.append(out.numel() * out.element_size())
        return gather(name, shard, out)

    wire.gather = counted


def gathered(rank: int, dtype: torch.dtype):
    """Bytes that each step gathers, a whole model's, and those of all chosen rows."""
    policy = ZenFlow(topk_ratio=RATIO, update_interval=WINDOW, select_strategy="step", select_interval=300)
    model, opt = build(zero.Stores(optimizer=HostStore()), 2, dtype, zenflow=policy)
    sizes: list[int] = []
    for wire in (zero.sharded(model).wire, opt._zenflow._beside):
        count(wire, sizes)
    by_step = []
    for step in range(2 * WINDOW):
        sizes.clear()
        train(model, opt, rank, range(step, step + 1))
        for unit in zero.sharded(model).units:
            unit.settle()
        by_step.append(sum(sizes))
    everything = sum(unit.full_bytes for unit in zero.sharded(model).units)
    rows = 0
    for name, param in model.named_parameters():
        if not name.endswith("unused"):
            share = param[0].numel() if param.dim() > 1 else param.numel()
            rows += share * (math.ceil(RATIO * len(param)) if param.dim() > 1 else 1)
    opt.close()
    return by_step, everything, rows * dtype.itemsize


def check(by_step: list[int], everything: int, rows: int) -> None:
    for step, num_bytes in enumerate(by_step):
        if step == 0 or step % WINDOW == WINDOW - 1:  # channels were chosen; the window ended
            assert num_bytes == everything, step
        else:  # each rank sends as much as the one with the most
            assert rows <= num_bytes <= 2 * rows < everything / 2, step


def test_a_step_inside_a_window_sends_chosen_rows() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for found in run_ranks(gathered, 2, dtype):
            check(*found)

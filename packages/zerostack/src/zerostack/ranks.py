"""The few words that ranks exchange about checkpoints and configuration; the package's one user of collectives.

Texts and verdicts travel as tensors. Everything here is called by all ranks of the group, in the same order.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist


def _device(group: dist.ProcessGroup) -> torch.device:
    """Where tensors must live to travel in `group`."""
    if "nccl" in str(dist.get_backend(group)):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def gather_text(text: str, group: dist.ProcessGroup) -> list[str]:
    """Every rank's text, in rank order."""
    if group.size() == 1:
        return [text]
    device = _device(group)
    mine = torch.frombuffer(bytearray(text.encode() or b" "), dtype=torch.uint8).to(device)
    sizes = [int(size) for size in _all_gather(torch.tensor([mine.numel()], device=device), group)]
    padded = torch.zeros(max(sizes), dtype=torch.uint8, device=device)
    padded[: mine.numel()] = mine
    rows = zip(_all_gather(padded, group), sizes, strict=True)
    return [bytes(row[:size].cpu().numpy()).decode().strip() for row, size in rows]


def _all_gather(tensor: torch.Tensor, group: dist.ProcessGroup) -> list[torch.Tensor]:
    everyone = [torch.empty_like(tensor) for _ in range(group.size())]
    dist.all_gather(everyone, tensor, group=group)
    return everyone


def gather_json(value: Any, group: dist.ProcessGroup) -> list[Any]:
    """Every rank's JSON value, in rank order."""
    return [json.loads(text) for text in gather_text(json.dumps(value), group)]


def agree(
    error: BaseException | None, group: dist.ProcessGroup, failure: type[Exception], doing: str
) -> None:
    """Go on together or fail together.

    Args:
        error: What went wrong on this rank, if anything.
        group: The ranks.
        failure: What ranks raise whose own part went well.
        doing: What was being done, for their message.

    Raises:
        BaseException: `error` itself on the rank that has one, `failure` on the others.
    """
    texts = gather_text("" if error is None else f"{type(error).__name__}: {error}", group)
    if error is not None:
        raise error
    failed = [f"rank {rank}: {text}" for rank, text in enumerate(texts) if text]
    if failed:
        raise failure(f"{doing} failed on another rank; nothing was changed here. {'; '.join(failed)}")


def any_rank(flag: bool, group: dist.ProcessGroup) -> bool:
    """Whether the flag is up on any rank."""
    if group.size() == 1:
        return flag
    seen = torch.tensor([int(flag)], device=_device(group))
    dist.all_reduce(seen, op=dist.ReduceOp.MAX, group=group)
    return bool(seen.item())


def all_sum(values: Sequence[float], group: dist.ProcessGroup) -> list[float]:
    """Element-wise sum over ranks."""
    total = torch.tensor(values, dtype=torch.float64, device=_device(group))
    if group.size() > 1:
        dist.all_reduce(total, group=group)
    return [float(item) for item in total.tolist()]

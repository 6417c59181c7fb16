"""The few words that ranks exchange about checkpoints and configuration; the package's one user of collectives.

Texts and verdicts travel as tensors. Everything here is called by all ranks of the group, in the same order; a rank
that does not come ends the wait of the others with an error that names it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from .errors import LostRankError

_TAG = 0x7A53  # of these messages; between two ranks they arrive in the order in which they were sent


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


def _all_gather(mine: torch.Tensor, group: dist.ProcessGroup) -> list[torch.Tensor]:
    """Every rank's tensor, all of one shape.

    On the CPU as messages: gloo finishes its collectives on a thread of its own, which ends the process with an abort
    if it comes to free the last one's tensors while the interpreter shuts down, as after a save at a program's end.

    Raises:
        LostRankError: a rank has ended, or did not come in time; names the first of them.
    """
    rank, size = group.rank(), group.size()
    everyone = [mine if r == rank else torch.empty_like(mine) for r in range(size)]
    if mine.device.type != "cpu":
        dist.all_gather(everyone, mine, group=group)
        return everyone
    # A rank that is lost does not keep this one from the others: they are to hear who it was, not to wait for one who
    # left early.
    works, lost = [], []
    for step in range(1, size):
        to, source = (rank + step) % size, (rank - step) % size
        for call, tensor, peer in ((group.recv, everyone[source], source), (group.send, mine, to)):
            try:
                works.append((call([tensor], peer, _TAG), peer))
            except RuntimeError as error:  # noqa: PERF203 - each may be of another rank
                lost.append((peer, error))
    for work, peer in works:
        try:
            work.wait()
        except RuntimeError as error:  # noqa: PERF203 - each may be of another rank
            lost.append((peer, error))
    if lost:
        peer, cause = lost[0]
        said = str(cause).splitlines()[0][:200]
        raise LostRankError(f"rank {peer} of {size} has ended or did not answer ({said})") from cause
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
    return any(map(bool, _all_gather(torch.tensor([int(flag)], device=_device(group)), group)))


def all_sum(values: Sequence[float], group: dist.ProcessGroup) -> list[float]:
    """Element-wise sum over ranks."""
    mine = torch.tensor(values, dtype=torch.float64, device=_device(group))
    return [float(item) for item in torch.stack(_all_gather(mine, group)).sum(0).tolist()]

"""The mean over ranks at one bit an element each way: signs to whoever serves a chunk, signs of the mean to all.

In: a tensor on every rank, and the two residuals. Out: the same approximation of their mean on every rank. Follow
`OneBitReduction`: SCATTERING (every rank's signs of my chunk are coming) -> GATHERING (the signs of every chunk's mean
are coming) -> DONE. Several may be under way at once. Next: the optimizers reduce momenta with it.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.distributed as dist
from accel_kernels import mean_signs, pack_signs, sign_bytes, unpack_signs
from zero_core import Pending, PlainCollectives, Wire

from .errors import CompressConfigError, CompressStateError
from .topology import group_or_default
from .wire_1bit import chunk_ranges

Norm = Literal["l2", "l1"]


@dataclass
class OneBitState:
    """What one tensor's all-reduce keeps from call to call.

    Attributes:
        name: in errors, and in the tags of messages: alike on every rank, different for tensors that may be under way
            at once.
        worker_error: [n], fp32: what this rank's signs have lost.
        server_error: [this rank's chunk], fp32: what the signs of its chunk's mean have lost.
    """

    name: str
    worker_error: torch.Tensor
    server_error: torch.Tensor

    @staticmethod
    def zeros(numel: int, world: int, rank: int, device: torch.device, name: str = "tensor") -> OneBitState:
        """No residuals yet."""
        start, stop = chunk_ranges(numel, world)[rank]
        return OneBitState(name, torch.zeros(numel, device=device), torch.zeros(stop - start, device=device))

    def reset(self) -> None:
        """Owe nothing any more."""
        self.worker_error.zero_()
        self.server_error.zero_()


class _Phase(enum.Enum):
    """SCATTERING -> GATHERING -> DONE; `advance` makes each step."""

    SCATTERING = enum.auto()
    GATHERING = enum.auto()
    DONE = enum.auto()


@dataclass
class OneBitReduction:
    """An all-reduce on its way; the tensor holds its result, and the state its residuals, when `wait` returns.

    Until then neither may be touched.
    """

    tensor: torch.Tensor
    state: OneBitState
    wire: Wire
    norm: Norm
    _chunks: list[tuple[int, int]] = field(init=False)
    _phase: _Phase = field(default=_Phase.SCATTERING, init=False)
    _pending: Pending | None = field(init=False)
    _received: list[torch.Tensor] = field(init=False)

    def __post_init__(self) -> None:
        rank, world = self.wire.group.rank(), self.wire.group.size()
        self._chunks = chunk_ranges(self.tensor.numel(), world)
        messages = [self._message(peer) for peer in range(world)]
        for (start, stop), message in zip(self._chunks, messages, strict=True):
            pack_signs(
                self.tensor[start:stop],
                message,
                error=self.state.worker_error[start:stop],
                norm=self.norm,
            )
        self._received = [messages[rank] if peer == rank else self._message(rank) for peer in range(world)]
        self._pending = self.wire.swap(f"{self.state.name}, to servers", messages, self._received)

    def _message(self, chunk: int) -> torch.Tensor:
        start, stop = self._chunks[chunk]
        return torch.empty(sign_bytes(stop - start), dtype=torch.uint8, device=self.tensor.device)

    def is_ready(self) -> bool:
        """Whether `advance` need not wait for another rank, as far as is known."""
        return self._pending is None or self._pending.is_done()

    def arrive(self) -> None:
        """Wait for what is on its way, and do no more."""
        if self._pending is not None:
            self._pending.wait()
            self._pending = None  # a message is waited for once

    def advance(self) -> None:
        """Wait for what is on its way and do what comes next: serve this rank's chunk, or read the result."""
        self.arrive()
        if self._phase is _Phase.SCATTERING:
            self._serve()
            self._phase = _Phase.GATHERING
        elif self._phase is _Phase.GATHERING:
            for (start, stop), message in zip(self._chunks, self._received, strict=True):
                unpack_signs(message, self.tensor[start:stop])
            self._received.clear()
            self._phase = _Phase.DONE

    def wait(self) -> None:
        """Finish.

        Raises:
            zero_core.CollectiveError: a rank died, or did not come.
        """
        while self._phase is not _Phase.DONE:
            self.advance()

    def _serve(self) -> None:
        rank, world = self.wire.group.rank(), self.wire.group.size()
        mean = torch.empty_like(self.state.server_error)
        mean_signs(self._received, mean)
        own = self._message(rank)
        pack_signs(mean, own, error=self.state.server_error, norm=self.norm)
        self._received = [own if peer == rank else self._message(peer) for peer in range(world)]
        self._pending = self.wire.swap(f"{self.state.name}, to all", [own] * world, self._received)


def start_allreduce_1bit(
    tensor: torch.Tensor, wire: Wire, state: OneBitState, *, norm: Norm = "l2"
) -> OneBitReduction:
    """`allreduce_1bit`, under way: see there.

    Args:
        tensor: as there.
        wire: the ranks; one for all tensors that are reduced among them.
        state: as there.
        norm: as there.
    """
    start, stop = chunk_ranges(tensor.numel(), wire.group.size())[wire.group.rank()]
    if tensor.dim() != 1 or not tensor.is_contiguous():
        raise CompressConfigError(
            f"allreduce_1bit of '{state.name}': expected a flat contiguous tensor, got shape {tuple(tensor.shape)}, "
            f"strides {tensor.stride()}; pass tensor.view(-1)"
        )
    have = (state.worker_error.numel(), state.server_error.numel())
    if have != (tensor.numel(), stop - start):
        raise CompressStateError(
            f"allreduce_1bit of '{state.name}': expected residuals of {tensor.numel()} and {stop - start} elements "
            f"(rank {wire.group.rank()} of {wire.group.size()}), got {have[0]} and {have[1]}; make the state for this "
            "tensor and group, or re-deal it (error_feedback)"
        )
    return OneBitReduction(tensor, state, wire, norm)


def allreduce_1bit(
    tensor: torch.Tensor,
    group: dist.ProcessGroup | None = None,
    state: OneBitState | None = None,
    *,
    norm: Norm = "l2",
    timeout_s: float = 300.0,
) -> OneBitState:
    """Replace `tensor` by the same 1-bit approximation of its mean on all ranks; every rank of `group` calls it.

    Of n elements, rank i serves chunk i (`chunk_ranges`). With w_i and s_i the residuals of this rank, and
    C(c) = scale sign(c), scale = |c|_2 / sqrt(n of the chunk) or |c|_1 / n:

    1. c = tensor + w_i, chunk by chunk: send C(c) to the chunk's server; w_i = c - C(c).
    2. c = mean over ranks of what came + s_i: send C(c) to all; s_i = c - C(c).

    Args:
        tensor: [n], any n, fp32, bf16 or fp16, contiguous; read and written. Finite on all ranks: an infinity or NaN
            makes its chunk NaN everywhere, and leaves the residuals of that chunk as they were on the way.
        group: any number of ranks; gloo for tensors on the CPU. None: the default one.
        state: the residuals, updated; None starts without any.
        norm: what the scale keeps: the chunk's 2-norm, or its 1-norm.
        timeout_s: deadline on the CPU.

    Returns:
        `state`, for the next call on this tensor.

    Raises:
        CompressConfigError: the tensor is not flat, or there is no process group.
        CompressStateError: residuals of another size.
        zero_core.CollectiveError: a rank died, or did not come.

    Bytes this rank sends: `wire_1bit.sent_1bit`: n/4 (N-1)/N and scales, against 4n (N-1)/N of a bf16 mean.
    Source: Tang et al., 1-bit Adam, arXiv:2102.02888, algorithm 1 and figure 3.
    """
    group = group_or_default(group, "allreduce_1bit")
    wire = Wire(group, PlainCollectives(group, timeout_s), tensor.device, timeout_s)
    if state is None:
        state = OneBitState.zeros(tensor.numel(), group.size(), group.rank(), tensor.device)
    start_allreduce_1bit(tensor, wire, state, norm=norm).wait()
    return state

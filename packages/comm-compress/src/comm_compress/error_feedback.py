"""What a lossy channel lost last time is added next time: the residuals, and what becomes of them elsewhere.

In: what was to be sent, and what arrived of it. Out: what to send next. `allreduce_1bit` keeps its two residuals
fused with the packing of signs; the classes here serve channels that quantize blocks. `redeal_worker_errors` and
`redeal_server_errors` carry residuals over to another number of ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from accel_kernels import grad_norm_scale

from .errors import CompressConfigError, CompressStateError
from .wire_1bit import chunk_ranges


class Feedback(Protocol):
    """How a channel compensates for what it loses; one residual a name, made when it is first asked for."""

    def compensate(self, name: str, tensor: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """`tensor` (flat, any float dtype) and what is still owed for `name`: fp32, in `out` or new memory."""

    def keep(
        self, name: str, wanted: torch.Tensor, arrived: torch.Tensor, out: torch.Tensor | None = None
    ) -> None:
        """Take in what became of `wanted`, that `compensate` returned: `arrived` (its size, any float dtype).

        `out` is fp32 memory to work in, which may be that of `wanted`; None: new memory.
        """

    def reset(self) -> None:
        """Owe nothing any more."""

    def state_dict(self) -> dict[str, Any]:
        """This rank's residuals."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`."""


class ErrorFeedback:
    """Everything that is lost comes back whole the next time.

    With e_0 = 0: send C(x_t + e_t), keep e_(t+1) = x_t + e_t - C(x_t + e_t); what was sent and what is owed add up to
    all that was wanted. A non-finite element of what was to be sent leaves the residual as it is: that step is for
    others to skip.

    Bytes: 4 an element.
    Source: Karimireddy et al., arXiv:1901.09847, algorithm 2 (EF-SGD).
    """

    def __init__(self) -> None:
        self._owed: dict[str, torch.Tensor] = {}

    def compensate(self, name: str, tensor: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """See `Feedback.compensate`.

        Raises:
            CompressStateError: what is owed for `name` has another size.
        """
        owed = self._owed.get(name)
        if owed is not None:
            _check_size(name, owed, tensor)
        out = torch.empty(tensor.numel(), device=tensor.device) if out is None else out
        out.copy_(tensor.detach().flatten())  # two passes of one dtype each are faster than one of two dtypes
        return out if owed is None else out.add_(owed)

    def keep(
        self, name: str, wanted: torch.Tensor, arrived: torch.Tensor, out: torch.Tensor | None = None
    ) -> None:
        """See `Feedback.keep`."""
        _check_size(name, wanted, arrived)
        lost = torch.sub(wanted, arrived.detach().flatten(), out=out)
        if float(grad_norm_scale(lost)[1]) == 0:  # no element is infinite or NaN; in one pass
            self._owe(name, lost)

    def _owe(self, name: str, lost: torch.Tensor) -> None:
        if name in self._owed:
            self._owed[name].copy_(lost)
        else:
            self._owed[name] = lost.clone()

    def reset(self) -> None:
        """See `Feedback.reset`."""
        self._owed.clear()

    def state_dict(self) -> dict[str, Any]:
        """See `Feedback.state_dict`."""
        return {"owed": dict(self._owed)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Feedback.load_state_dict`."""
        self._owed = {name: tensor.clone() for name, tensor in state["owed"].items()}


@dataclass(frozen=True, kw_only=True)
class LoCoPolicy:
    """How LoCo averages errors.

    Args:
        beta: weight of the residual so far; 1 - beta goes to what has just been lost. 0 is plain error feedback.
        reset_steps: `keep`s of a name after which its residual starts from zero again; 0: never.

    Raises:
        CompressConfigError: out of range.
    """

    beta: float = 0.8
    reset_steps: int = 1024

    def __post_init__(self) -> None:
        if not 0 <= self.beta < 1 or self.reset_steps < 0:
            raise CompressConfigError(
                f"LoCoPolicy: expected 0 <= beta < 1 and reset_steps >= 0, got {self.beta!r} and {self.reset_steps!r}"
            )


class LoCo(ErrorFeedback):
    """A moving average of what is lost is added, and forgotten from time to time.

    With e_0 = 0: send C(x_t + e_t), keep e_(t+1) = beta e_t + (1 - beta) (x_t + e_t - C(x_t + e_t)). One step's large
    loss is spread over the next ones, which is kinder to a channel of few bits than all of it at once.

    Bytes: 4 an element.
    Source: Xie et al., LoCo, arXiv:2407.04480, algorithm 1; residuals are kept in fp32 here, not in 8 bits.
    """

    def __init__(self, policy: LoCoPolicy | None = None) -> None:
        super().__init__()
        self.policy = policy or LoCoPolicy()
        self._kept: dict[str, int] = {}

    def _owe(self, name: str, lost: torch.Tensor) -> None:
        self._kept[name] = self._kept.get(name, 0) + 1
        if self.policy.reset_steps and self._kept[name] % self.policy.reset_steps == 0:
            self._owed.pop(name, None)
            return
        if name in self._owed:
            self._owed[name].lerp_(lost, 1 - self.policy.beta)
        else:
            self._owed[name] = lost * (1 - self.policy.beta)

    def reset(self) -> None:
        """See `Feedback.reset`."""
        super().reset()
        self._kept.clear()

    def state_dict(self) -> dict[str, Any]:
        """See `Feedback.state_dict`."""
        return {**super().state_dict(), "kept": dict(self._kept)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Feedback.load_state_dict`."""
        super().load_state_dict(state)
        self._kept = dict(state["kept"])


def redeal_worker_errors(errors: Sequence[torch.Tensor], world: int) -> list[torch.Tensor]:
    """Residuals of what ranks sent, for another number of ranks: each gets the mean.

    What reaches a server is the mean over workers of what they send, residuals included: with the mean for all, it is
    owed as much as before, to fp32 rounding.

    Args:
        errors: one of each old rank, [n], fp32.
        world: new ranks.
    """
    if len(errors) == world:
        return list(errors)
    mean = torch.stack(list(errors)).to(torch.float64).mean(0).float()
    return [mean.clone() for _ in range(world)]


def redeal_server_errors(errors: Sequence[torch.Tensor], world: int) -> list[torch.Tensor]:
    """Residuals of what ranks served, for another number of ranks: put together, and cut again.

    Args:
        errors: those of the old ranks' chunks, in rank order.
        world: new ranks.
    """
    whole = torch.cat(list(errors))
    return [whole[start:stop].clone() for start, stop in chunk_ranges(whole.numel(), world)]


def _check_size(name: str, one: torch.Tensor, other: torch.Tensor) -> None:
    if one.numel() != other.numel():
        raise CompressStateError(
            f"error feedback of '{name}': expected {one.numel()} elements, got {other.numel()}; call reset() where a "
            "tensor changes its size"
        )

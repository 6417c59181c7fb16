"""PURE: what a run will hold per rank, before anything is allocated.

In: a model or a number of parameters, a stage, a world size, dtypes. Out: bytes by kind. The formulas are those of
the ZeRO paper (section 3.1 and figure 1), generalised to the dtypes of `Precision`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from .config import Precision
from .errors import ZeroConfigError
from .units import UnitChoice, find_units

STATE_BYTES = {
    "adam": 8,
    "adamw": 8,
    "adam-amsgrad": 12,
    "lion": 4,
    "adagrad": 4,
    "sgd-momentum": 4,
    "sgd": 0,
}
"""fp32 optimizer state, in bytes a parameter, the master not counted."""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of model states on one rank.

    Attributes:
        params, grads, master, optimizer: what lives from step to step. At stage 3 a separate master is all that rests
            of a trainable parameter: `params` is then 0, but for the paper's formula.
        in_flight: stage 3: units whole at a time (the one in use, and those gathered ahead) with one's gradients, and
            under autocast (`Precision.autocast`) the whole model in the compute dtype, which waits for the backward
            where nothing is recomputed. Stage 2: the full gradients of the units that are being reduced.
    """

    stage: int
    world: int
    params: int
    grads: int
    master: int
    optimizer: int
    in_flight: int

    @property
    def model_states(self) -> int:
        """What the paper's formulas count: everything but what is in flight."""
        return self.params + self.grads + self.master + self.optimizer

    @property
    def total(self) -> int:
        """Everything."""
        return self.model_states + self.in_flight


def plan_memory(
    model_or_n_params: nn.Module | int | float,
    *,
    stage: int,
    world: int,
    precision: Precision | None = None,
    optimizer: str = "adam",
    units: UnitChoice = None,
) -> MemoryPlan:
    """Bytes per rank of parameters, gradients, master copy and optimizer state.

    Args:
        model_or_n_params: a model (any device, the meta device too): what `shard` holds of it. Or a number of
            parameters: the paper's formula, which at stage 3 counts 2P/N bytes of bf16 parameters more.
        stage: 0 to 3.
        world: number of ranks.
        precision: None: for a number, bf16 with fp32 masters as in the paper; for a model, its own dtypes.
        optimizer: one of "adam", "adamw", "adam-amsgrad", "lion", "adagrad", "sgd-momentum", "sgd".
        units: as for `shard`; sizes what is in flight. With a number of parameters nothing is known of units.

    Raises:
        ZeroConfigError: an argument out of range.

    Source: ZeRO (Rajbhandari et al., 2020), figure 1: 7.5 B parameters on 64 ranks take 120, 31.4, 16.6, 1.9 GB.
    """
    if stage not in (0, 1, 2, 3):
        raise ZeroConfigError(f"stage: expected 0, 1, 2 or 3, got {stage!r}")
    if world < 1:
        raise ZeroConfigError(f"world: expected at least 1 rank, got {world!r}")
    if optimizer not in STATE_BYTES:
        raise ZeroConfigError(f"optimizer: expected one of {', '.join(STATE_BYTES)}, got {optimizer!r}")
    as_in_paper = not isinstance(model_or_n_params, nn.Module)
    if isinstance(model_or_n_params, nn.Module):
        precision = precision or Precision()
        sized = [
            (sum(p.numel() for _, p in spec.params), spec.params[0][1].dtype, spec.trainable)
            for spec in find_units(model_or_n_params, units)
        ]
        unit_sizes = sized
    else:
        if not model_or_n_params > 0:
            raise ZeroConfigError(f"model_or_n_params: expected a number > 0, got {model_or_n_params!r}")
        precision = precision or Precision(compute=torch.bfloat16)
        sized, unit_sizes = [(int(model_or_n_params), torch.float32, True)], []

    def share(nbytes: int, from_stage: int) -> int:
        return -(-nbytes // world) if stage >= from_stage else nbytes

    params = grads = master = state = 0
    for numel, own, trainable in sized:
        dtype = precision.param_dtype(own)
        updated = precision.master_dtype(dtype)
        rests_as_master = stage == 3 and trainable and dtype != updated and not as_in_paper
        params += 0 if rests_as_master else share(numel * dtype.itemsize, 3)
        if trainable:
            grads += share(numel * precision.accumulate_dtype(dtype).itemsize, 2)
            master += 0 if dtype == updated else share(numel * updated.itemsize, 1)
            # States follow the master's dtype, as torch's optimizers make them.
            state += share(numel * STATE_BYTES[optimizer] * updated.itemsize // 4, 1)
    return MemoryPlan(stage, world, params, grads, master, state, _in_flight(unit_sizes, stage, precision))


def _in_flight(sized: list[tuple[int, torch.dtype, bool]], stage: int, precision: Precision) -> int:
    """Two largest units whole (in use, and gathered ahead) at stage 3; the largest's full gradient from stage 2."""
    if not sized or stage < 2:
        return 0
    full = sorted((numel * precision.param_dtype(own).itemsize for numel, own, _ in sized), reverse=True)
    grads = [
        numel * precision.reduce_dtype(precision.param_dtype(own)).itemsize
        for numel, own, train in sized
        if train
    ]
    whole = sum(full[:2]) if stage == 3 else 0
    if stage == 3 and precision.autocast:
        assert precision.compute is not None
        whole += sum(numel for numel, own, _ in sized if own.is_floating_point) * precision.compute.itemsize
    return whole + max(grads, default=0)

"""What cannot go together in a configuration: one list for `initialize` and for `zerostack explain`.

In: a configuration, the number of ranks and an optimizer, before any model changes. Out: nothing, or an error. Next:
`api` shards the model.
"""

from __future__ import annotations

import torch
import zero_core as zero
from torch import nn
from torch.optim import Optimizer

from . import policies, signs
from .compression import check_compression
from .offload import check_offload, check_stepped, zenflow
from .schema import Config


def check(
    config: Config,
    optimizer: Optimizer | None,
    *,
    num_shards: int,
    num_replicas: int,
    model: nn.Module | None = None,
    placement: zero.Placement | None = None,
    publish_late: bool = False,
    whole_tensors: bool | None = None,
) -> None:
    """Refuse what cannot be honoured.

    Args:
        config: All of it.
        optimizer: That is to step; None: the program will bring one.
        num_shards: Ranks that share one set of shards.
        num_replicas: Such sets.
        model: That is to be trained; None: it is not known.
        placement: As `initialize`.
        publish_late: As `initialize`.
        whole_tensors: As `initialize`.

    Raises:
        ConfigError: With what to change.
        ZeroConfigError: Likewise, where an optimizer steps nothing that is sharded.
    """
    check_offload(config)
    check_compression(config, num_shards)
    if optimizer is None:
        return
    signs.check(
        config,
        optimizer,
        num_replicas=num_replicas,
        publish_late=publish_late,
        whole_tensors=whole_tensors,
    )
    zero.steps_whole_tensors(optimizer, whole_tensors)
    policies.check_rates(config, optimizer)
    zenflow(config, optimizer)
    check_stepped(config, optimizer, whole_tensors, model, placement)


def stand_in(config: Config) -> Optimizer | None:
    """The optimizer that a configuration names, over as many groups of one element as its schedule has rates."""
    if config.optimizer is None:
        return None
    schedule = {} if config.scheduler is None else config.scheduler.params.model_dump()
    num_groups = max((len(value) for value in schedule.values() if isinstance(value, list)), default=1)
    return policies.optimizer(config, [{"params": [nn.Parameter(torch.zeros(1))]} for _ in range(num_groups)])

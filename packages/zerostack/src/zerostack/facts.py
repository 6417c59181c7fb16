"""What an engine is made of, how far it has come, and what it tells about itself under DeepSpeed's names.

Read-only: nothing here changes anything. Next: `engine` adds the calls that train, save and load.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import comm_compress as cc
import torch
import torch.distributed as dist
import zero_core as zero
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from .loader import EpochLoader
from .resolve import Effective
from .schema import Config


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What an engine is made of.

    Attributes:
        module: The sharded model.
        optimizer: Steps its shards.
        scheduler: Sets learning rates after each step; any object with `step()`. In checkpoints, if it has
            `state_dict()` and `load_state_dict()`.
        scaler: Scales the loss and finds overflows.
        loader: Of the training data that `initialize` was given.
        settings: The effective configuration.
        group: The data-parallel ranks.
        device: Where this rank computes.
        collectives: Compresses what travels, where the configuration says so.
    """

    module: nn.Module
    optimizer: zero.ShardedOptimizer
    scheduler: LRScheduler | None
    scaler: zero.LossScaler | None
    loader: EpochLoader | None
    settings: Effective
    group: dist.ProcessGroup
    device: torch.device
    collectives: cc.QuantizedCollectives | None = None


@dataclass
class Progress:
    """How far training has come; part of every checkpoint."""

    micro_steps: int = 0
    global_steps: int = 0
    global_samples: int = 0
    skipped_steps: int = 0


@dataclass(eq=False)
class Facts:
    """The read-only side of `engine.Engine`."""

    parts: Parts
    progress: Progress = field(default_factory=Progress)
    last_grad_norm: float | None = field(default=None, init=False)

    @property
    def config(self) -> Config:
        """The typed configuration."""
        return self.parts.settings.config

    @property
    def module(self) -> nn.Module:
        """The model; the same object that `initialize` was given."""
        return self.parts.module

    @property
    def optimizer(self) -> zero.ShardedOptimizer:
        """Steps this rank's shards."""
        return self.parts.optimizer

    @property
    def lr_scheduler(self) -> LRScheduler | None:
        """Advanced at every step that is not skipped."""
        return self.parts.scheduler

    @property
    def training_dataloader(self) -> EpochLoader | None:
        """Loader of the training data that `initialize` was given."""
        return self.parts.loader

    @property
    def device(self) -> torch.device:
        """Where this rank computes."""
        return self.parts.device

    @property
    def collectives(self) -> cc.QuantizedCollectives | None:
        """What compresses parameters and gradients on the wire, for `comm_compress.traffic`; None: nothing does."""
        return self.parts.collectives

    @property
    def global_rank(self) -> int:
        """This process among all."""
        return dist.get_rank()

    @property
    def local_rank(self) -> int:
        """This process on its machine."""
        return int(os.environ.get("LOCAL_RANK", "0"))

    @property
    def world_size(self) -> int:
        """Number of data-parallel ranks."""
        return self.parts.group.size()

    @property
    def micro_steps(self) -> int:
        """Micro-batches that `step()` has seen."""
        return self.progress.micro_steps

    @property
    def global_steps(self) -> int:
        """Boundaries reached, skipped ones too."""
        return self.progress.global_steps

    @property
    def global_samples(self) -> int:
        """Samples trained on, over all ranks."""
        return self.progress.global_samples

    @property
    def skipped_steps(self) -> int:
        """Updates left out because gradients were not finite."""
        return self.progress.skipped_steps

    @property
    def loss_scale(self) -> float:
        """What losses are multiplied by now; 1 without a scaler."""
        return 1.0 if self.parts.scaler is None else self.parts.scaler.value

    cur_scale = loss_scale

    def is_gradient_accumulation_boundary(self) -> bool:
        """Whether the current micro-batch is the last before an update."""
        return (self.progress.micro_steps + 1) % self.gradient_accumulation_steps() == 0

    def get_lr(self) -> list[float]:
        """Learning rate of each parameter group."""
        return [float(group["lr"]) for group in self.parts.optimizer.param_groups]

    def get_global_grad_norm(self) -> float | None:
        """Global norm of the last step's gradients before clipping; None before the first, or if switched off."""
        return self.last_grad_norm

    def train_batch_size(self) -> int:
        """Samples in one update, over all ranks."""
        return self.parts.settings.batch.train

    def train_micro_batch_size_per_gpu(self) -> int:
        """Samples in one forward on one rank."""
        return self.parts.settings.batch.micro

    def gradient_accumulation_steps(self) -> int:
        """Micro-batches in one update."""
        return self.parts.settings.batch.accumulation

    def zero_optimization_stage(self) -> int:
        """ZeRO stage, 0 to 3."""
        return int(self.config.zero_optimization.stage)

    def fp16_enabled(self) -> bool:
        """Whether the maths run in float16."""
        return bool(self.config.fp16.enabled)

    def bfloat16_enabled(self) -> bool:
        """Whether the maths run in bfloat16."""
        return bool(self.config.bf16.enabled)

"""The object that stands where a DeepSpeed engine stood: forward, backward, step, save, load.

In: a sharded model, its optimizer and the effective configuration. It keeps the counters of gradient accumulation
and nothing else; the maths are zero-core's. Next: `checkpoint` for what one holds.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import zero_core as zero
from zero_offload_nvme import OffloadedOptimizer

from . import checkpoint, policies, signs
from .clock import Clock, peak_bytes
from .errors import ConfigError, EngineStateError
from .facts import Facts
from .full_model import save_full_model

log = logging.getLogger(__name__)


@dataclass(eq=False)
class Engine(Facts):
    """Trains one model with DeepSpeed's calls.

    `loss = engine(batch); engine.backward(loss); engine.step()` once for every micro-batch; the optimizer steps
    at gradient accumulation boundaries. Whatever is not defined here is looked up in the model.
    """

    clock: Clock = field(init=False)
    _pending_backward: bool = field(default=False, init=False)
    _reported_step: int | None = field(default=None, init=False)
    _told_of_dropped: bool = field(default=False, init=False)
    _waits: bool = field(init=False)

    def __post_init__(self) -> None:
        self.clock = Clock(enabled=self.config.wall_clock_breakdown, device=self.device)
        self._waits = self.zero_optimization_stage() <= 1 and not policies.accumulates_reduced(self.config)

    # -- training ---------------------------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Forward of the model."""
        if self._reported_step is None:  # the time before the first forward is nobody's
            self.clock.since_last_report()
            self._reported_step = self.global_steps
        with self.clock.span("forward"):
            return self.module(*args, **kwargs)

    forward = __call__

    def backward(
        self, loss: torch.Tensor, retain_graph: bool = False, scale_wrt_gas: bool = True
    ) -> torch.Tensor:
        """Backward of one micro-batch.

        Args:
            loss: Mean loss of the micro-batch, a scalar.
            retain_graph: As `torch.Tensor.backward`.
            scale_wrt_gas: Divide the loss by the number of accumulated micro-batches.

        Where optimizer state is offloaded, and neither clipping nor a loss scale changes gradients, the backward of the
        last micro-batch may be called inside `with optimizer.last_backward():`, which steps units as they are reduced.

        Returns:
            `loss`, as it was given.
        """
        scaled = loss / self.gradient_accumulation_steps() if scale_wrt_gas else loss
        if self.parts.scaler is not None:
            scaled = self.parts.scaler.scale(scaled)
        with self.clock.span("backward"), self._accumulation():
            scaled.backward(retain_graph=retain_graph)
        self._pending_backward = True
        return loss

    def _accumulation(self) -> AbstractContextManager[None]:
        """Stages 0 and 1 hold full gradients anyway, so nothing travels before the last micro-batch.

        Stages 2 and 3 reduce every micro-batch: full gradients would have to live from the first to the last. So does a
        job that adds them up in another dtype (`data_types.grad_accum_dtype`): full ones are in the one that travels.
        """
        if self._waits and not self.is_gradient_accumulation_boundary():
            return zero.no_sync(self.module)
        return nullcontext()

    def step(self, lr_kwargs: Mapping[str, Any] | None = None) -> None:
        """End one micro-batch; at a boundary, clip, update the parameters and advance the schedule.

        An update that raises (a drive is full, the loss scale cannot become smaller) moves no counter: `step` may be
        called again, or `zero_grad` to leave the update out.

        Args:
            lr_kwargs: For the `step` of the schedule.

        Raises:
            EngineStateError: If there was no `backward()` since the last call.
        """
        if not self._pending_backward:
            raise EngineStateError(
                "step() before backward(): call engine.backward(loss) for every micro-batch first"
            )
        boundary = self.is_gradient_accumulation_boundary()
        if boundary:
            with self.clock.span("step"):
                self._update()
        self._pending_backward = False
        self.progress.micro_steps += 1
        if boundary:
            if self.parts.scheduler is not None and not self.parts.optimizer.last_step_skipped:
                self.parts.scheduler.step(**(lr_kwargs or {}))
            self._report()

    def _update(self) -> None:
        """Step the optimizer; only then anything counts."""
        optimizer, clip = self.parts.optimizer, self.config.gradient_clipping
        if clip > 0:
            self.last_grad_norm = float(zero.clip_grad_norm(optimizer, clip))
        elif self.config.zero_optimization.compute_grad_norm:
            self.last_grad_norm = float(zero.grad_norm(optimizer))
        optimizer.step()
        optimizer.zero_grad()
        skipped = optimizer.last_step_skipped
        self.progress.global_steps += 1
        self.progress.global_samples += self.train_batch_size()
        self.progress.skipped_steps += int(skipped)
        if skipped and self.parts.group.rank() == 0:
            log.warning("step %d skipped: %s", self.global_steps, optimizer.overflow_report)

    def _report(self) -> None:
        every = self.config.steps_per_print
        if every is None and (self.config.wall_clock_breakdown or self.config.memory_breakdown):
            every = 10
        if every is None or self.global_steps % every:
            return
        elapsed_s, spans = self.clock.since_last_report()
        steps, self._reported_step = self.global_steps - (self._reported_step or 0), self.global_steps
        words = [f"step {self.global_steps}", f"skipped {self.skipped_steps}", f"lr {_rates(self.get_lr())}"]
        if self.config.fp16.enabled:
            words.append(f"loss scale {self.loss_scale:g}")
        if self.config.timers.throughput.enabled:
            words.append(f"{steps * self.train_batch_size() / elapsed_s:.1f} samples/s")
        words += [f"{name} {total / steps:.1f} ms" for name, total in spans.items()]
        if self.config.memory_breakdown:
            words.append(f"peak memory {peak_bytes(self.device) / 1e6:.0f} MB")
        if self.global_rank == 0:
            log.info(", ".join(words))

    def no_sync(self) -> AbstractContextManager[None]:
        """Accumulate gradients without communication while the block runs (see `zero_core.no_sync`)."""
        return zero.no_sync(self.module)

    def zero_grad(self) -> None:
        """Forget the gradients that have accumulated; the counters stay, so the update comes when it was to come.

        `step` does it after every update. Between micro-batches of one it drops what the earlier ones gave, which the
        first call says in the log.
        """
        dropped = self.micro_steps % self.gradient_accumulation_steps()
        if dropped and not self._told_of_dropped and self.parts.group.rank() == 0:
            log.warning(
                "zero_grad() drops the gradients of %d of the %d micro-batches of an update; leave it out where that "
                "is not meant: step() forgets gradients after every update",
                dropped,
                self.gradient_accumulation_steps(),
            )
        self._told_of_dropped = self._told_of_dropped or dropped > 0
        self.parts.optimizer.zero_grad()
        self._pending_backward = False

    def train(self, mode: bool = True) -> Engine:
        """Put the model in training mode."""
        self.module.train(mode)
        return self

    def eval(self) -> Engine:
        """Put the model in evaluation mode."""
        return self.train(False)

    def flush(self) -> None:
        """Apply updates that "zenflow" has yet to apply; all ranks call it. With an exact step there are none.

        Checkpoints and exports do it by themselves. An evaluation sees the parameters as the next forward would, some
        of them as of an earlier step; call this before one that is to see every gradient.
        """
        if isinstance(self.parts.optimizer, OffloadedOptimizer):
            self.parts.optimizer.flush()

    def close(self) -> None:
        """End the thread that steps what is offloaded, when it has done what it was given; raises what it met."""
        if isinstance(self.parts.optimizer, OffloadedOptimizer):
            self.parts.optimizer.close()

    # -- checkpoints ------------------------------------------------------------------------------------------

    def save_checkpoint(
        self,
        save_dir: str | Path,
        tag: str | None = None,
        client_state: dict[str, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
    ) -> Path:
        """Save everything needed to go on, on this or any other number of ranks and at any stage; all ranks call it.

        Args:
            save_dir: Directory that all ranks see.
            tag: Name of the checkpoint; None means `global_step<n>`.
            client_state: Small values (numbers, text, lists, tuples, dictionaries, small tensors), given back by
                `load_checkpoint`; the first rank's are kept.
            save_latest: Whether `save_dir/latest` is to name this checkpoint.
            exclude_frozen_parameters: Leave out parameters that are not trained, such as the base of a LoRA.

        Returns:
            The directory of the checkpoint.

        Raises:
            ConfigError: For a URL.
            CheckpointError: For a value of `client_state` that cannot be stored; or if a rank could not write. What was
                there before is still there.
        """
        self.flush()  # what waits is described for as many ranks alone
        name = f"global_step{self.global_steps}" if tag is None else str(tag)
        with signs.shared_values(self.parts.optimizer):
            return checkpoint.save(
                self,
                _local(save_dir),
                name,
                client_state or {},
                point_latest=save_latest,
                frozen=not exclude_frozen_parameters,
            )

    def load_checkpoint(
        self,
        load_dir: str | Path,
        tag: str | None = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        *,
        load_loader_states: bool = True,
    ) -> tuple[str | None, dict[str, Any]]:
        """Go on from a checkpoint that any number of ranks wrote at any stage; all ranks call it.

        Args:
            load_dir: What was `save_dir`.
            tag: Which checkpoint; None means the one that `latest` names.
            load_module_strict: Whether names missing here or there are errors.
            load_optimizer_states: Whether to take over the optimizer's state and the loss scale.
            load_lr_scheduler_states: Whether to take over the schedule.
            load_module_only: Only the parameters and buffers; everything else, counters too, stays as it is, but
                for gradients accumulated since the last update, which are discarded: they are of the values before.
            load_loader_states: Whether the loader of `initialize(training_data=)` goes on after the samples seen; False
                for a loop that skips them itself.

        Returns:
            The directory that was loaded and its `client_state`; (None, {}) where there is no `latest`.

        Raises:
            ConfigError: For a URL.
            CheckpointError: If the checkpoint is damaged or does not fit; nothing was changed.

        Memory: what is read, until it has been taken over; of optimizer state that rests in a store 512 MiB at a time,
        which is read twice for it.
        """
        self._reported_step = None
        self.flush()  # or updates under way would come over what is loaded
        signs.settle(self.parts.optimizer)
        return checkpoint.load(
            self,
            _local(load_dir),
            None if tag is None else str(tag),
            strict=load_module_strict,
            states=load_optimizer_states and not load_module_only,
            schedule=load_lr_scheduler_states and not load_module_only,
            progress=not load_module_only,
            loader=load_loader_states and not load_module_only,
        )

    def save_16bit_model(self, save_dir: str | Path, save_filename: str = "model.safetensors") -> Path:
        """Write the whole model's parameters, in the 16-bit dtype of training, as one safetensors file.

        All ranks call it; the first one writes, one unit of the model at a time.

        Raises:
            ConfigError: For a file name that promises a pickle; for a URL.
        """
        if not save_filename.endswith(".safetensors"):
            raise ConfigError(
                f"save_16bit_model: expected a file name that ends in .safetensors, got {save_filename!r}; nothing "
                "here writes pickles"
            )
        self.flush()
        dtype = torch.float16 if self.fp16_enabled() else torch.bfloat16 if self.bfloat16_enabled() else None
        with signs.shared_values(self.parts.optimizer):
            return save_full_model(self.module, _local(save_dir) / save_filename, dtype, self.parts.group)

    def __getattr__(self, name: str) -> Any:
        """Whatever else is asked for is the model's."""
        if name.startswith("_") or name == "parts":
            raise AttributeError(name)
        return getattr(self.parts.module, name)


def _rates(rates: list[float]) -> str:
    return "/".join(f"{rate:.3g}" for rate in rates)


def _local(directory: str | Path) -> Path:
    """A directory of this machine; as a path, a URL would silently become one, too."""
    if "://" in str(directory):
        raise ConfigError(
            f"expected a directory that all ranks see, got {str(directory)!r}: an engine writes to file systems alone; "
            "copy its checkpoints, or save with ckpt_universal, which takes URLs"
        )
    return Path(directory)

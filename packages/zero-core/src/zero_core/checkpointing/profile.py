"""What each layer's checkpoint costs in time, and what it saves in bytes.

In: a model under `checkpoint_modules`, and a function that makes one training step. Out: a `CheckpointProfile`, to be
read as a table or drawn. The step runs once to warm up, once as it is, and once with everything kept.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from ..errors import ZeroConfigError, ZeroError
from .wrap import CheckpointedForward


@dataclass
class LayerCost:
    """One checkpointed module in one step, all its calls together.

    Attributes:
        name: of the module.
        forward_s: seconds in its first run, with what keeping the inputs takes.
        recompute_s: seconds in its run in backward, with what fetching them takes.
        kept_bytes: what waits for the backward, wherever (device or host); inputs of several layers count at the first.
        saved_bytes: what would wait for it without the checkpoint, parameters not counted.
    """

    name: str
    forward_s: float = 0.0
    recompute_s: float = 0.0
    kept_bytes: int = 0
    saved_bytes: int = 0


@dataclass(frozen=True)
class CheckpointProfile:
    """The costs of a model's checkpoints in one step.

    Attributes:
        layers: in order of definition.
    """

    layers: list[LayerCost]

    def table(self) -> str:
        """A line a layer, and their sum."""
        rows = [*self.layers, self.total()]
        width = max(len(row.name) for row in rows)
        head = (
            f"{'layer':<{width}} {'forward ms':>11} {'recompute ms':>13} {'kept MiB':>10} {'without MiB':>12}"
        )
        lines = [
            f"{row.name:<{width}} {row.forward_s * 1e3:>11.2f} {row.recompute_s * 1e3:>13.2f} "
            f"{row.kept_bytes / 2**20:>10.3f} {row.saved_bytes / 2**20:>12.3f}"
            for row in rows
        ]
        return "\n".join([head, *lines])

    def total(self) -> LayerCost:
        """All layers together."""
        total = LayerCost("all")
        for layer in self.layers:
            total.forward_s += layer.forward_s
            total.recompute_s += layer.recompute_s
            total.kept_bytes += layer.kept_bytes
            total.saved_bytes += layer.saved_bytes
        return total

    def save_png(self, path: str | Path) -> None:
        """Draw time and bytes by layer.

        Raises:
            ZeroError: matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ZeroError(
                "CheckpointProfile.save_png: it draws with matplotlib, which is not installed; pip install "
                '"zero-core[plot]", or print(profile.table())'
            ) from error
        figure = Figure(figsize=(9, 1.6 + 0.25 * len(self.layers)), layout="constrained")
        times, sizes = figure.subplots(1, 2, sharey=True)
        names = [layer.name for layer in self.layers]
        forward = [layer.forward_s * 1e3 for layer in self.layers]
        times.barh(names, forward, color="#9ecae1", label="forward")
        again = [layer.recompute_s * 1e3 for layer in self.layers]
        times.barh(names, again, left=forward, color="#d94801", label="recompute")
        times.set_xlabel("ms a step")
        without = [layer.saved_bytes / 2**20 for layer in self.layers]
        sizes.barh(names, without, color="#9ecae1", label="without checkpoint")
        kept = [layer.kept_bytes / 2**20 for layer in self.layers]
        sizes.barh(names, kept, height=0.4, color="#08519c", label="kept")
        sizes.set_xlabel("MiB until backward")
        times.invert_yaxis()
        for axes in (times, sizes):
            axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
            axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(path, dpi=150)


def profile_checkpoints(model: nn.Module, step: Callable[[], object]) -> CheckpointProfile:
    """Measure the checkpoints of a model; runs `step` three times.

    Args:
        model: under `checkpoint_modules`. All ranks must call it where the model is sharded.
        step: forward and backward, as `lambda: model(x).sum().backward()`. Gradients add up over the three runs, and
            random numbers are drawn in each: forget them (`zero_grad`) and do not step in it.

    Returns:
        The costs of every module under a checkpoint; one that lies in another counts in both.

    Raises:
        ZeroConfigError: no module is under a checkpoint.
    """
    found = [module.__dict__.get("forward") for module in model.modules()]
    forwards = [forward for forward in found if isinstance(forward, CheckpointedForward)]
    if not forwards:
        raise ZeroConfigError(
            "profile_checkpoints: no module of the model is under a checkpoint; call checkpoint_modules first"
        )
    layers = [LayerCost(forward.name) for forward in forwards]
    known = {_address(tensor) for tensor in (*model.parameters(), *model.buffers())}
    step()
    with ExitStack() as stack:
        kept = set(known)
        for forward, layer in zip(forwards, layers, strict=True):
            stack.enter_context(_timing(forward, layer, kept))
        step()
    with ExitStack() as stack:
        inside: list[tuple[LayerCost, set[int]]] = []
        for forward, layer in zip(forwards, layers, strict=True):
            stack.enter_context(_counting(forward, layer, known, inside))
        step()
    return CheckpointProfile(layers)


@contextmanager
def _timing(forward: CheckpointedForward, layer: LayerCost, kept: set[int]) -> Iterator[None]:
    """Write the time of a module's runs to `layer`, and the bytes of what is kept and not yet in `kept`."""
    plan = forward.plan

    def timed_plan(
        fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], name: str
    ) -> tuple[Callable[..., Any], list[torch.Tensor]]:
        start = _now()
        region, saved = plan(fn, args, kwargs, name)
        for tensor in saved:
            if _address(tensor) not in kept:
                kept.add(_address(tensor))
                layer.kept_bytes += tensor.numel() * tensor.element_size()
        layer.forward_s += _now() - start
        runs = count()

        def timed_region(*tensors: torch.Tensor) -> Any:
            start, first = _now(), next(runs) == 0
            try:
                return region(*tensors)
            finally:
                if first:
                    layer.forward_s += _now() - start
                else:
                    layer.recompute_s += _now() - start

        return timed_region, saved

    forward.plan = timed_plan
    try:
        yield
    finally:
        forward.plan = plan


@contextmanager
def _counting(
    forward: CheckpointedForward,
    layer: LayerCost,
    known: set[int],
    inside: list[tuple[LayerCost, set[int]]],
) -> Iterator[None]:
    """Run a module without its checkpoint, and write to `layer`, and to those it lies in, what autograd saves."""
    seen = set(known)

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        for around, counted in inside:
            if _address(tensor) not in counted:
                counted.add(_address(tensor))
                around.saved_bytes += tensor.untyped_storage().nbytes()
        return tensor.detach()  # of an output, the tensor itself would make a cycle with its graph

    def counted_forward(*args: Any, **kwargs: Any) -> Any:
        inside.append((layer, seen))
        try:
            with saved_tensors_hooks(pack, lambda tensor: tensor):
                return forward.original(*args, **kwargs)
        finally:
            inside.pop()

    forward.module.__dict__["forward"] = counted_forward
    try:
        yield
    finally:
        forward.module.__dict__["forward"] = forward


def _address(tensor: torch.Tensor) -> int:
    """What is the same for two tensors that share memory, while both live."""
    address: int = tensor.untyped_storage()._cdata
    return address


def _now() -> float:
    """Seconds, when all that was launched is done."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()

"""Communication hooks for torch's `DistributedDataParallel`.

In: a bucket of gradients, from DDP. Out: a future of their mean. On the CPU a thread of the hook takes buckets one
after another, in the order in which DDP hands them out (the same on all ranks), while backward goes on; on an
accelerator a stream does. `fp16`, `bf16` and `powersgd` are torch's own hooks, counted.
"""

# No `from __future__ import annotations`: DDP compares the annotations of a hook with classes.
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
import zero_core as zero
from torch._C._distributed_c10d import GradBucket
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.distributed.device_mesh import DeviceMesh

from .. import ops, wire
from ..agreement import take_name
from ..allreduce_1bit import OneBitState, start_allreduce_1bit
from ..error_feedback import LoCo, LoCoPolicy
from ..errors import CompressConfigError
from ..group_collectives import GroupCollectives
from ..settings import Settings
from ..topology import Grid, grid_of, group_or_default
from ..traffic import Entry
from ..wire import Sent
from ..wire_1bit import sent_1bit
from .torch_hooks import CastHook, PowerSGDHook
from .worker import Worker

Kind = Literal["int8", "int4", "1bit", "fp16", "bf16", "powersgd"]
_Bucket = tuple[int, tuple[int, ...]]  # its number, and what its parameters are


def ddp_hook(
    kind: Kind,
    group: dist.ProcessGroup | None = None,
    *,
    node_size: int | None = None,
    mesh: DeviceMesh | None = None,
    block_size: int | None = None,
    min_bytes: int | None = None,
    policy: Literal["always", "auto"] | None = None,
    loco: LoCoPolicy | None = None,
    timeout_s: float | None = None,
    shared_memory: bool | None = None,
    **options: Any,
) -> "Hook":
    """Make a hook: `ddp.register_comm_hook(None, cc.ddp_hook("int8"))`; every rank calls it alike.

    Args:
        kind: "int8", "int4": gradients are reduced as in qgZ, and their mean is gathered in the same format. "1bit":
            signs with two residuals (`allreduce_1bit`). "fp16", "bf16", "powersgd": torch's own.
        group: DDP's process group; None: the default one, as in DDP.
        node_size: "int8", "int4": neighbouring ranks that share a node, so that 1/node_size leaves it.
        mesh: nodes x ranks of a node, instead.
        block_size: "int8", "int4": elements that share a scale; None: 256.
        min_bytes: "int8", "int4": buckets that have fewer bytes travel as they are; None: 16 KiB.
        policy: "int8", "int4": "auto" leaves compression off where it measurably does not pay; None: "always".
        loco: "int8", "int4": what is lost comes back, averaged. `LoCoPolicy(beta=0, reset_steps=0)` is plain error
            feedback.
        timeout_s: "int8", "int4", "1bit": deadline of a wait on the CPU; None: 300 s. The others have the group's own.
        shared_memory: "int8", "int4": on the CPU, use memory that ranks of one machine share; None: yes.
        options: "powersgd": of `torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook.PowerSGDState`.

    Returns:
        the hook, for one DDP model; `comm_compress.traffic(hook)` says what it has sent.

    Raises:
        CompressConfigError: a kind that is not known, an option that does not belong to it, a node size that does not
            divide the group, ranks that were given other settings, no process group. From backward: the hook serves two
            models, or "1bit" is given fp64.

    Residuals ("1bit", `loco`) are those of gradients as they come, under a `GradScaler` still scaled, and know of no
    step that it skips: what was owed before an overflow is lost, and after it counts by the old scale. Where that
    matters train in bf16, or take `OneBitAdam`, which knows of both.

    Bytes per rank, n elements: "int8", "int4": a padded copy of a bucket that N does not divide; with `loco` 4 n, and
    4 n / N. "1bit": 4 n and 4 n / N.
    Source: ZeRO++ (Wang et al., 2023), section 3.3; 1-bit Adam (Tang et al., 2021), figure 3; LoCo (Xie et al., 2024).
    """
    group = group_or_default(group, f"ddp_hook({kind!r})")
    given = {
        "node_size": node_size,
        "mesh": mesh,
        "block_size": block_size,
        "min_bytes": min_bytes,
        "policy": policy,
        "loco": loco,
        "timeout_s": timeout_s,
        "shared_memory": shared_memory,
    }
    asked: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if options and kind != "powersgd":
        raise CompressConfigError(f"ddp_hook({kind!r}): {', '.join(options)}: options of 'powersgd' alone")
    if kind in ("int8", "int4"):
        settings = Settings(weights=kind, grads=kind, **asked)
        grid_of(group, node_size, mesh)
        salt = _salt(kind, group, settings.timeout_s)  # first: it finds ranks that make another kind
        return _hook(kind, group, settings.timeout_s, _Blocks(GroupCollectives(settings, group), salt))
    wrong = asked.keys() - ({"timeout_s"} if kind == "1bit" else set())
    if wrong:
        raise CompressConfigError(
            f"ddp_hook({kind!r}): {', '.join(sorted(wrong))}: no option of this kind; leave it out"
        )
    if kind == "1bit":
        plain = zero.PlainCollectives(group, **asked)
        salt = _salt(kind, group, plain.timeout_s)
        return _hook(kind, group, plain.timeout_s, _Signs(group, plain, salt))
    grid = Grid(group.size(), 1)
    if kind in ("fp16", "bf16"):
        torchs = default_hooks.fp16_compress_hook if kind == "fp16" else default_hooks.bf16_compress_hook
        return CastHook(kind, grid, group, torchs)
    if kind == "powersgd":
        try:
            state = powerSGD_hook.PowerSGDState(process_group=group, **options)
        except (TypeError, ValueError) as error:
            raise CompressConfigError(f"ddp_hook('powersgd'): {error}") from error
        return PowerSGDHook(kind, grid, state)
    raise CompressConfigError(
        f"ddp_hook: kind: expected 'int8', 'int4', '1bit', 'fp16', 'bf16' or 'powersgd', got {kind!r}"
    )


class Hook(Protocol):
    """A communication hook; its first argument, DDP's `state`, is not looked at."""

    __name__: str  # DDP logs it
    __qualname__: str

    def __call__(self, state: object, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
        """Start to average a bucket's gradients over the ranks."""

    def entries(self) -> Iterator[Entry]:
        """See `comm_compress.traffic`."""


# -- ours -------------------------------------------------------------------------------------------------------


class _Blocks:
    """A quantized reduce-scatter, and a quantized gather of what came of it."""

    def __init__(self, collectives: GroupCollectives, salt: str) -> None:
        self.collectives = collectives
        self.salt = salt
        loco = collectives.settings.loco
        self.feedback = None if loco is None else LoCo(loco)

    def run(self, buffer: torch.Tensor, name: str) -> None:
        """Replace `buffer` by the mean over ranks."""
        made, tag = self.collectives, zlib.crc32(f"{name}{self.salt}".encode()) & 0x7FFFFFFF
        size, rank = made.grid.num_ranks, made.every.rank
        part = wire.slice_numel(buffer.numel(), size)
        padded = buffer
        if part * size != buffer.numel():
            padded = buffer.new_zeros(part * size)
            padded[: buffer.numel()].copy_(buffer)
        mean = buffer.new_empty(part)
        made.reduce_scatter(padded, mean, tag=tag).wait()
        wanted = mean
        # Others than these travel as they are, and lose nothing.
        feedback = self.feedback if buffer.dtype in ops.FLOATS else None
        if feedback is not None:
            wanted = feedback.compensate(name, mean)
            mean.copy_(wanted)
        made.gather_weights(lambda: mean, padded, tag=tag, version=None).wait()
        if feedback is not None:
            feedback.keep(name, wanted, padded.view(size, -1)[rank])
        if padded is not buffer:
            buffer.copy_(padded[: buffer.numel()])

    def reset(self) -> None:
        """Owe nothing any more."""
        for feedback in (self.feedback, self.collectives.reductions.feedback):
            if feedback is not None:
                feedback.reset()

    def entries(self) -> Iterator[Entry]:
        yield from self.collectives.entries()


class _Signs:
    """`allreduce_1bit`, with residuals for each bucket."""

    def __init__(self, group: dist.ProcessGroup, plain: zero.PlainCollectives, salt: str) -> None:
        self.group = group
        self.plain = plain
        self.salt = salt
        self.entry = Entry("all_reduce_1bit")
        self._wire: zero.Wire | None = None
        self._states: dict[str, OneBitState] = {}

    def run(self, buffer: torch.Tensor, name: str) -> None:
        """Replace `buffer` by an approximation of the mean over ranks."""
        if buffer.dtype not in ops.FLOATS:
            raise CompressConfigError(
                f"ddp_hook('1bit'): {name}: expected fp32, bf16 or fp16, got {buffer.dtype}; take another kind"
            )
        size, rank, numel = self.group.size(), self.group.rank(), buffer.numel()
        if self._wire is None:
            self._wire = zero.Wire(self.group, self.plain, buffer.device, self.plain.timeout_s)
            self._wire.salt = self.salt
        if name not in self._states:
            self._states[name] = OneBitState.zeros(numel, size, rank, buffer.device, name)
        self.entry.begin(wire.plain_all_reduce(Grid(size, 1), numel, buffer.element_size()))
        self.entry.sent += Sent(across=sent_1bit(numel, size, rank).total)
        with self.entry.codec.running(buffer.device):
            reduction = start_allreduce_1bit(buffer, self._wire, self._states[name])
        for _ in range(2):
            while not reduction.is_ready():
                time.sleep(1e-4)
            reduction.arrive()
            with self.entry.codec.running(buffer.device):
                reduction.advance()

    def reset(self) -> None:
        """Owe nothing any more."""
        self._states.clear()

    def entries(self) -> Iterator[Entry]:
        yield self.entry


@dataclass
class _Averaging:
    """Averages buckets, one after another, and explains what goes wrong."""

    ways: _Blocks | _Signs
    wire: zero.Wire
    known: dict[int, _Bucket] = field(default_factory=dict)
    gone: set[_Bucket] = field(default_factory=set)

    def run(self, buffer: torch.Tensor, bucket: _Bucket) -> torch.Tensor:
        """Replace `buffer` by the mean over ranks; returns it.

        Raises:
            CompressConfigError: two models take turns.
        """
        number, numel = bucket[0], buffer.numel()
        if self.known.setdefault(number, bucket) != bucket:  # DDP has dealt parameters out anew
            if bucket in self.gone:
                raise CompressConfigError(
                    "this hook serves two DDP models by turns, which would lose each other's residuals; make a hook "
                    "for each"
                )
            self.gone |= set(self.known.values())
            self.ways.reset()
            self.known = {number: bucket}
        name = f"bucket {number} of {numel} elements"
        self.wire.guard(f"average of {name}", lambda: self.ways.run(buffer, name))
        return buffer


class _OwnHook:
    """Ours on a thread, or on a stream."""

    def __init__(self, kind: str, averaging: _Averaging) -> None:
        self.__name__ = self.__qualname__ = f"comm_compress_{kind}"
        self.averaging = averaging
        self._worker = Worker()
        self._params: dict[int, torch.Tensor] = {}
        self._streams: dict[torch.device, torch.Stream] = {}

    def __call__(self, state: object, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
        buffer = bucket.buffer()
        params = bucket.parameters()
        # Kept, so that no other gets the number of one.
        self._params.update((id(param), param) for param in params)
        what = bucket.index(), tuple(map(id, params))
        if buffer.device.type != "cpu":
            return self._on_stream(buffer, what)
        return self._worker.add(partial(self.averaging.run, buffer, what))

    def _on_stream(self, buffer: torch.Tensor, what: _Bucket) -> torch.futures.Future[torch.Tensor]:
        module = torch.get_device_module(buffer.device)
        stream = self._streams.setdefault(buffer.device, module.Stream(buffer.device))
        stream.wait_stream(module.current_stream(buffer.device))
        with module.stream(stream):
            self.averaging.run(buffer, what)
            future: torch.futures.Future[torch.Tensor] = torch.futures.Future(devices=[buffer.device])
            future.set_result(buffer)  # whoever waits for it waits for the stream
        return future

    def entries(self) -> Iterator[Entry]:
        yield from self.averaging.ways.entries()


def _hook(kind: str, group: dist.ProcessGroup, timeout_s: float, ways: _Blocks | _Signs) -> Hook:
    plain = zero.PlainCollectives(group, timeout_s)
    return _OwnHook(kind, _Averaging(ways, zero.Wire(group, plain, torch.device("cpu"), timeout_s)))


def _salt(kind: str, group: dist.ProcessGroup, timeout_s: float) -> str:
    """A name of this hook alone, the same on every rank, so that no other hook's bytes are taken for its own.

    Raises:
        CompressConfigError: ranks make hooks of different kinds; on every rank.
    """
    device = next((each for each in group._device_types if each.type == "cpu"), group._device_types[0])
    plain = zero.PlainCollectives(group, timeout_s, shared_memory=False)
    ranks = zero.Wire(group, plain, device, timeout_s)
    take_name(ranks, "ddp_hook", kind)
    return ranks.salt

"""Compressed all-gathers and reduce-scatters for torch's FSDP2 (`fully_shard`).

In: FSDP2's flat buffers, from `set_custom_all_gather` and `set_custom_reduce_scatter`. Out: the same buffers, filled.
FSDP2 keeps a node's second shard itself (`reshard_after_forward=int`), so hpZ is not for here: what a gather has
brought, quantized, is gathered again among the ranks of the node as it is.
"""

from __future__ import annotations

import importlib
import zlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..errors import CompressConfigError
from ..group_collectives import GroupCollectives
from ..traffic import Entry
from ..wire import Sent
from .quantized import QuantizedCollectives


def compress_fsdp(
    model: nn.Module, collectives: QuantizedCollectives, group: dist.ProcessGroup
) -> FsdpCompression:
    """Have every module of `model` that `fully_shard` was applied to gather and reduce through `collectives`.

    Every rank calls it alike, after `fully_shard` and before the first forward.

    Args:
        model: has such modules.
        collectives: what is compressed; without a group of its own, and without `secondary`.
        group: the ranks that the parameters are sharded over: `mesh.get_group()`, with two dimensions the last one's.

    Returns:
        what `comm_compress.traffic` can be asked about.

    Raises:
        CompressConfigError: this torch's FSDP2 takes no collectives of others; `model` has no such module; `secondary`
            or `frozen`. Later, from a backward: FSDP2 asks for another reduction than a sum or a mean.
    """
    fsdp = importlib.import_module("torch.distributed.fsdp")
    sharded: type[Any] | None = getattr(fsdp, "FSDPModule", None)
    needed = ("set_custom_all_gather", "set_custom_reduce_scatter")
    if sharded is None or not all(hasattr(sharded, name) for name in needed):
        raise CompressConfigError(
            f"compress_fsdp: torch {torch.__version__} has no FSDPModule.{' and '.join(needed)}; use a newer one, or "
            "zero_core.shard(collectives=...)"
        )
    if collectives.settings.secondary:
        raise CompressConfigError(
            "compress_fsdp: secondary=True is for zero_core; with FSDP2 give fully_shard(reshard_after_forward=n)"
        )
    if collectives.settings.frozen is not None:
        raise CompressConfigError(
            "compress_fsdp: frozen=...: FSDP2 does not say what is trained; leave it out, and all travels as weights="
        )
    modules = [module for module in model.modules() if isinstance(module, sharded)]
    if not modules:
        raise CompressConfigError(
            "compress_fsdp: no module of the model was sharded by fully_shard; call that first"
        )
    made = FsdpCompression(collectives(group))
    for number, module in enumerate(modules):
        module.set_custom_all_gather(made.gather(number))
        module.set_custom_reduce_scatter(made.reduce(number))
    return made


class FsdpCompression:
    """What `compress_fsdp` has put in: for each module an `AllGather` and a `ReduceScatter` of FSDP2's."""

    def __init__(self, collectives: GroupCollectives) -> None:
        api = importlib.import_module("torch.distributed.fsdp._fully_shard._fsdp_api")
        self.collectives = collectives
        self._passes = _Passes()
        self._gather = type("QuantizedAllGather", (_Gather, api.AllGather), {})
        self._reduce = type("QuantizedReduceScatter", (_Reduce, api.ReduceScatter), {})

    def gather(self, module: int) -> Any:
        """For the module of this number."""
        return self._gather(self.collectives, module, self._passes)

    def reduce(self, module: int) -> Any:
        """For the module of this number."""
        return self._reduce(self.collectives, module, self._passes)

    def entries(self) -> Iterator[Entry]:
        """See `comm_compress.traffic`."""
        yield from self.collectives.entries()


class _Passes:
    """Numbers the passes of a model, each a forward (or several) with the backward after it."""

    def __init__(self) -> None:
        self._number = 0
        self._in_backward = False

    def number(self, *, reduces: bool = False) -> int:
        """Of the pass that a gather, or a reduction, belongs to."""
        in_backward = reduces or torch._C._current_graph_task_id() != -1  # of autograd, on this thread
        if self._in_backward and not in_backward:
            self._number += 1
        self._in_backward = in_backward
        return self._number


class _Comm:
    """What both have, for one module; FSDP2 calls them in one order on all ranks, and one is over before the next.

    So messages may have the same tag at every call: by it residuals are found again, and passes told apart.
    """

    def __init__(self, collectives: GroupCollectives, module: int, passes: _Passes) -> None:
        self.collectives = collectives
        self._module = module
        self._passes = passes

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """As FSDP2 does by default."""
        return torch.empty(*size, dtype=dtype, device=device)

    def _tag(self, group: dist.ProcessGroup, numel: int) -> int:
        if dist.get_process_group_ranks(group) != dist.get_process_group_ranks(self.collectives.group):
            raise CompressConfigError(
                f"compress_fsdp: FSDP2 works over ranks {dist.get_process_group_ranks(group)}, and group= has ranks "
                f"{dist.get_process_group_ranks(self.collectives.group)}; pass the group that the mesh has"
            )
        return zlib.crc32(f"{type(self).__name__} {self._module} {numel}".encode()) & 0x7FFFFFFF


class _Gather(_Comm):
    def __init__(self, collectives: GroupCollectives, module: int, passes: _Passes) -> None:
        super().__init__(collectives, module, passes)
        self._has_gathered = False

    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: dist.ProcessGroup,
        async_op: bool = False,
    ) -> None:
        """Fill `output_tensor`; on an accelerator on the current stream, which FSDP2 has chosen for that."""
        if self._has_gathered and group.size() < self.collectives.group.size():
            self._again(output_tensor, input_tensor, group)
            return
        tag = self._tag(group, output_tensor.numel())
        version = self._passes.number()  # while policy="auto" measures, forward and backward go one way
        self.collectives.gather_weights(lambda: input_tensor, output_tensor, tag=tag, version=version).wait()
        self._has_gathered = True

    def _again(
        self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: dist.ProcessGroup
    ) -> None:
        """What a gather among all ranks has brought, from those that FSDP2 has dealt it out to."""
        grid, whole, entry = self.collectives.grid, self.collectives.group, self.collectives.gathers.again
        ranks = [dist.get_group_rank(whole, rank) for rank in dist.get_process_group_ranks(group)]
        near = sum(grid.node_of(rank) == grid.node_of(whole.rank()) for rank in ranks)
        nbytes = input_tensor.numel() * input_tensor.element_size()
        sent = Sent(inside=(near - 1) * nbytes, across=(len(ranks) - near) * nbytes)
        entry.begin(sent)
        entry.sent += sent
        dist.all_gather_into_tensor(output_tensor, input_tensor, group=group)


class _Reduce(_Comm):
    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> None:
        """Fill `output_tensor` with this rank's slice of the sum or mean."""
        is_sum = op == dist.ReduceOp.SUM
        if not is_sum and op != dist.ReduceOp.AVG:
            raise CompressConfigError(
                f"compress_fsdp: expected a sum or a mean of gradients, FSDP2 asks for {getattr(op, 'op', op)}; leave "
                "set_gradient_divide_factor out, or call set_force_sum_reduction_for_comms(True)"
            )
        tag = self._tag(group, input_tensor.numel())
        self._passes.number(reduces=True)
        self.collectives.reduce_scatter(input_tensor, output_tensor, tag=tag).wait()
        if is_sum:
            output_tensor.mul_(group.size())

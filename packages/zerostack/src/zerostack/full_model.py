"""The whole model as one plain safetensors file, for programs that know nothing of shards.

In: a sharded model. Out: a file with torch's names and shapes, written by the first rank while the model streams
past it one unit at a time.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import torch
import torch.distributed as dist
import zero_core as zero
from ckpt_universal import CheckpointError, write_safetensors_file
from torch import nn

from . import ranks


def save_full_model(
    model: nn.Module, path: Path, dtype: torch.dtype | None, group: dist.ProcessGroup
) -> Path:
    """Write every parameter and persistent buffer; all ranks call it.

    Args:
        model: A sharded model.
        path: The file; it appears whole or not at all.
        dtype: Of floating-point values in the file; None keeps each one's own.
        group: The ranks that hold the model.

    Raises:
        Exception: On the first rank, what kept it from writing (OSError, if its disk refuses); CheckpointError on the
            others.

    Bytes per rank: one unit of the model, whole.
    """
    error: BaseException | None = None
    stream = zero.stream_full(model)
    if group.rank() == 0:
        hidden = path.with_name(f".{path.name}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            specs = {
                name: (_dtype_in_file(own, dtype), shape)
                for name, (own, shape) in zero.full_specs(model).items()
            }
            parts = ((name, tensor.to(specs[name][0])) for name, tensor in stream)
            write_safetensors_file(hidden, specs, parts)
            hidden.replace(path)
        except Exception as caught:  # the others are to hear of it, not to wait
            error = caught
            with suppress(OSError):  # whatever kept it from being written may keep it from being removed
                hidden.unlink()
    for _ in stream:  # ranks that do not write, and one that failed, still take part to the end
        pass
    ranks.agree(error, group, CheckpointError, f"writing {path}")
    return path


def _dtype_in_file(own: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    return wanted if wanted is not None and own.is_floating_point else own

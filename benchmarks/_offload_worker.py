"""One rank of `offload.py`'s search for the largest model: builds it unit by unit, steps, says what a step costs."""

from __future__ import annotations

import json
import os
import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import _engines
import accel_kernels as ak
import torch
import torch.distributed as dist
import zero_core as zero
import zero_offload_nvme as off
from gpt import GPT, Block, GPTConfig, num_parameters, random_batch
from torch.distributed.device_mesh import init_device_mesh


class Counting(ak.TransferEngine):
    """Counts the bytes that it moves."""

    read_bytes = written_bytes = 0

    def read(self, file: Any, offset: int, out: Any) -> ak.Transfer:
        """See `accel_kernels.TransferEngine`."""
        transfer = super().read(file, offset, out)
        self.read_bytes += transfer.nbytes
        return transfer

    def write(self, file: Any, offset: int, data: Any) -> ak.Transfer:
        """See `accel_kernels.TransferEngine`."""
        transfer = super().write(file, offset, data)
        self.written_bytes += transfer.nbytes
        return transfer


def main() -> None:
    """Build, step, print."""
    torch.set_num_threads(1)
    order = json.loads(os.environ["ORDER"])
    _engines.init_process_group()
    config = GPTConfig(
        num_layers=order["layers"],
        width=order["width"],
        num_heads=16,
        vocab_size=256,
        sequence_length=order["tokens"],
    )
    torch.manual_seed(0)
    with torch.device("meta"):
        model = GPT(config)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("dp",))
    engine = Counting()
    folder = os.environ["OFFLOAD_FOLDER"]
    store = off.NvmeStore(folder, cache_bytes=64 << 20, engine=engine) if order["drive"] else None
    model = zero.shard(model, mesh, stage=3, store=store, init_module=initialise)
    zero.checkpoint_modules(model, Block, zero.CheckpointPolicy())
    inner = _engines.torch_adamw(model.parameters())
    if store is None:
        optimizer: zero.ShardedOptimizer = zero.ShardedOptimizer(model, inner)
    else:
        optimizer = off.OffloadedOptimizer(model, inner, window_bytes=32 << 20)
    seconds = []
    for step in range(order["steps"]):
        engine.read_bytes = engine.written_bytes = 0
        begun = time.perf_counter()
        loss = model(*random_batch(config, sequences=order["sequences"], seed=step * 2 + dist.get_rank()))
        with last_backward(optimizer):
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - begun)
    answer = {
        "layers": order["layers"],
        "parameters": num_parameters(model),
        "step_s": min(seconds[1:]),
        "loss": float(loss.detach()),
        "read_bytes": engine.read_bytes,
        "written_bytes": engine.written_bytes,
    }
    print(json.dumps(answer), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def last_backward(optimizer: zero.ShardedOptimizer) -> AbstractContextManager[None]:
    """Units are stepped while backward goes on, where their states rest in a store."""
    return optimizer.last_backward() if isinstance(optimizer, off.OffloadedOptimizer) else nullcontext()


def initialise(module: torch.nn.Module) -> None:
    """Values for a module that was built on the meta device."""
    for name, param in module.named_parameters(recurse=False):
        if param.dim() > 1:
            torch.nn.init.normal_(param, std=0.02)
        else:
            param.fill_(1.0 if name == "weight" else 0.0)


if __name__ == "__main__":
    main()

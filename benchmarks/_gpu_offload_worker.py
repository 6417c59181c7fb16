"""One process of `gpu_offload.py`: trains a GPT on a capped device for a few steps, and says what they cost."""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import _engines
import torch
import torch.distributed as dist
import zero_core as zero
import zero_offload_nvme as off
from _offload_worker import initialise
from gpt import GPT, Block, GPTConfig, num_parameters, random_batch
from torch._C._distributed_c10d import HashStore
from torch.distributed.device_mesh import init_device_mesh

FULL = 3
"""Exit status where memory, of the device or of the host, does not suffice."""
HEAD_WIDTH = 64


def stores_of(order: dict[str, Any], folder: str) -> zero.ShardStore | zero.Stores | None:
    """Where shards rest."""
    host = off.HostStore(limit_bytes=order["host_bytes"])
    places: dict[str, zero.ShardStore | zero.Stores | None] = {
        "device": None,
        "host": host,
        "host, states": zero.Stores(grads=host, optimizer=host),
        "host, sums": zero.Stores(optimizer=host),
        "drive, states": zero.Stores(params=host, grads=host, optimizer=off.NvmeStore(folder)),
    }
    return places[order["rests"]]


def train(order: dict[str, Any], folder: str) -> dict[str, Any]:
    """Medians of steps, the first three left out."""
    device, overlap = order["device"], order["overlap"]
    if device == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(order["cap_bytes"] / total, 1.0))
    config = GPTConfig(
        num_layers=order["layers"], width=order["width"], num_heads=max(order["width"] // HEAD_WIDTH, 1),
        vocab_size=order["words"], sequence_length=order["tokens"],
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("meta"):
        model = GPT(config)
    mesh = init_device_mesh(device, (1,), mesh_dim_names=("dp",))
    model = zero.shard(
        model,
        mesh,
        stage=order["stage"],
        store=stores_of(order, folder),
        precision=zero.Precision(compute=torch.bfloat16),
        init_module=initialise,
    )
    zero.checkpoint_modules(model, Block, zero.CheckpointPolicy())
    inner = _engines.torch_adamw(model.parameters())
    if order["rests"] == "device":
        optimizer: zero.ShardedOptimizer = zero.ShardedOptimizer(model, inner)
    else:
        kind: Any = "exact" if overlap in ("none", "promised") else overlap
        optimizer = off.OffloadedOptimizer(model, inner, overlap=kind)

    def batch(number: int) -> list[torch.Tensor]:
        return [each.to(device) for each in random_batch(config, sequences=order["sequences"], seed=number)]

    def step(number: int) -> tuple[float, float]:
        """Seconds of all of it, and of the optimizer's part; the loss is left on the device."""
        inputs = batch(number)
        wait(device)
        begun = time.perf_counter()
        promised = overlap == "promised"
        with optimizer.last_backward() if promised else nullcontext():  # type: ignore[attr-defined]
            losses.append(model(*inputs))
            losses[-1].backward()
        wait(device)
        reached = time.perf_counter()
        if overlap != "none":  # forward and backward alone
            optimizer.step()
        optimizer.zero_grad()
        if overlap != "zenflow":  # its thread goes on
            wait(device)
        ended = time.perf_counter()
        return ended - begun, ended - reached

    losses: list[torch.Tensor] = []
    found = [step(number) for number in range(order["steps"] + 3)]
    whole = [each[0] for each in found[3:]]
    # Steps of ZenFlow differ within a window; of all others the median is the better measure.
    step_s = statistics.mean(whole) if overlap == "zenflow" else statistics.median(whole)
    moved = bytes_over_link(lambda: step(len(found))) if device == "cuda" and order["count_bytes"] else {}
    return {
        "layers": order["layers"],
        "parameters": num_parameters(model),
        "step_s": step_s,
        "optimizer_s": statistics.median(each[1] for each in found[3:]),
        "tokens_s": order["sequences"] * order["tokens"] / step_s,
        "loss": float(losses[-1].detach()),
        "peak_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else 0,
        **moved,
    }


def bytes_over_link(act: Any) -> dict[str, int]:
    """Bytes that copies between host and device move, each way, as the profiler counts them."""
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        act()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    copies = [event for event in events if event.get("cat") == "gpu_memcpy"]
    return {
        name: sum(int(event["args"]["bytes"]) for event in copies if kind in event["name"])
        for name, kind in (("down_bytes", "DtoH"), ("up_bytes", "HtoD"))
    }


def wait(device: str) -> None:
    """Until the device has done what was asked of it."""
    if device == "cuda":
        torch.cuda.synchronize()


def main() -> int:
    """Train, print; `FULL` where that does not fit."""
    order = json.loads(os.environ["ORDER"])
    backend = "cpu:gloo,cuda:nccl" if order["device"] == "cuda" else "gloo"
    dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    try:
        with tempfile.TemporaryDirectory(dir=order["folder"], prefix="gpu-offload-bench-") as folder:
            print(json.dumps(train(order, folder)), flush=True)
    except (torch.OutOfMemoryError, off.OffloadMemoryError, off.OffloadDiskError) as error:
        print(error, file=sys.stderr)
        return FULL
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # threads of optimizers that were not closed hold nothing that is wanted

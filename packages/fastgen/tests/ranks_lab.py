"""Functions that run on several ranks: spawned processes, gloo over a file, one thread each."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from fastgen.adapters import Adapters
from fastgen.config import EngineConfig
from fastgen.weights import load_model
from model_lab import Driver, prompts
from torch.distributed.device_mesh import init_device_mesh


@dataclass(frozen=True)
class Job:
    """A model to run.

    Attributes:
        by_mesh: name the ranks by a mesh, else by a process group.
    """

    folder: Path
    config: EngineConfig
    adapter: Path | None = None
    by_mesh: bool = False


@dataclass(frozen=True)
class Outcome:
    """What came out: logits of the prompts' ends, greedy tokens, and the bytes of weights held."""

    logits: torch.Tensor
    tokens: list[list[int]]
    weight_bytes: int
    kv_heads: int


def run_job(job: Job, group: Any = None) -> Outcome:
    """On this rank."""
    loaded = load_model(job.folder, job.config, group=group)
    name = None
    if job.adapter is not None:
        name = "a"
        Adapters(loaded).load(name, job.adapter)
    texts = prompts(6, 21, 13)
    driver = Driver(loaded)
    logits = driver.forward([(driver.add(text, adapter=name), len(text)) for text in texts])
    again = Driver(loaded)
    tokens = again.greedy([again.add(text, 12, adapter=name) for text in texts], 12)
    held = sum(tensor.nbytes for tensor in loaded.decoder.state_dict().values())  # type: ignore[attr-defined]
    return Outcome(logits, tokens, held, loaded.decoder.cache_layout(None).num_kv_heads)


def _rank(rank: int, world_size: int, store: str, jobs: list[Job]) -> list[Outcome]:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, world_size),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=20),
    )
    try:
        mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
        return [run_job(job, mesh if job.by_mesh else dist.group.WORLD) for job in jobs]
    finally:
        dist.destroy_process_group()


def run_on_ranks(jobs: list[Job], world_size: int, folder: Path) -> list[list[Outcome]]:
    """All jobs on every rank; results by rank."""
    context = multiprocessing.get_context("spawn")
    store = str(folder / f"store-{world_size}")
    with ProcessPoolExecutor(world_size, mp_context=context) as pool:
        futures = [pool.submit(_rank, rank, world_size, store, jobs) for rank in range(world_size)]
        for future in as_completed(futures, timeout=120):
            future.result()  # the first failure, not that of a rank that waits for the one that failed
        return [future.result() for future in futures]

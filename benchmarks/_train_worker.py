"""One rank of one engine: builds its model, then steps when told to, and otherwise sleeps.

Started by `_processes.py`, which writes a JSON line for each command to standard input and reads a JSON line for
each answer. Answers leave by the original standard output; whatever libraries print goes to standard error.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any, TextIO

import _compressed_engines
import _engines
import _measure
import torch
import torch.distributed as dist
from gpt import GPT, PRESETS, GPTConfig, random_batch

BATCHES = 8  # steps' worth, seen again and again, so that the loss falls and disagreement shows


def main() -> None:
    """Build, then obey."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    torch.set_num_threads(1)
    order = json.loads(sys.stdin.readline())
    worker = Worker(order)
    answer(answers, worker.describe())
    for line in sys.stdin:
        command = json.loads(line)
        if command["do"] == "stop":
            break
        running = command["do"] == "run"
        answer(answers, worker.run(command["steps"], command["lead"]) if running else worker.memory())
    dist.destroy_process_group()


def answer(answers: TextIO, content: dict[str, Any]) -> None:
    """Send one answer."""
    answers.write(json.dumps(content) + "\n")


def load_lazily_loaded_code(dtype: torch.dtype) -> None:
    """Train a tiny model once, so that the memory of torch's own code is not taken for an engine's."""
    model = GPT(PRESETS["tiny"]).to(dtype)
    optimizer = _engines.torch_adamw(model.parameters())
    model(*random_batch(PRESETS["tiny"], sequences=1, seed=0)).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


class Worker:
    """A built engine, and how far its training has come."""

    def __init__(self, order: dict[str, Any]) -> None:
        engine: str = order["engine"]
        config: GPTConfig = PRESETS[order["model"]]
        if engine.startswith("deepspeed"):
            _engines.init_deepspeed()
        else:
            _engines.init_process_group()
        rank, world = dist.get_rank(), dist.get_world_size()
        job = _engines.Job(
            getattr(torch, order["dtype"]), order["sequences"], order["accumulate"], order["recompute"]
        )
        self.accumulate = job.accumulate
        seeds = range(rank, BATCHES * job.accumulate * world, world)
        self.batches = [random_batch(config, sequences=order["sequences"], seed=seed) for seed in seeds]
        self.done = 0
        dist.barrier()
        load_lazily_loaded_code(job.dtype)
        _measure.give_back_free_memory()
        self.resident_before = _measure.resident_bytes()
        _measure.restart_peak()
        torch.manual_seed(0)
        self.model = GPT(config)
        self.step = _compressed_engines.ALL[engine](self.model, job)

    def describe(self) -> dict[str, Any]:
        """What runs here."""
        versions = {"python": sys.version.split()[0], "torch": torch.__version__}
        for name in ("deepspeed", "zero_core", "comm_compress", "accel_kernels"):
            if name in sys.modules:
                versions[name] = str(getattr(sys.modules[name], "__version__", "?"))
        return {"versions": versions}

    def run(self, steps: int, lead: int) -> dict[str, Any]:
        """Take some steps; this rank's losses, and seconds and processor seconds of those after the first `lead`.

        What the last step left on its way is waited for in its time; with a lead, the first step's time has such a wait
        already, and the last one's is not counted again.
        """
        losses, seconds, processor_seconds = [], [], []
        for number in range(lead + steps):
            first = self.done * self.accumulate % len(self.batches)
            batches = self.batches[first : first + self.accumulate]
            wall, processor = time.perf_counter(), time.process_time()
            losses.append(self.step(batches))
            if not lead and number == steps - 1:
                _engines.settle(self.model)
            seconds.append(time.perf_counter() - wall)
            processor_seconds.append(time.process_time() - processor)
            self.done += 1
        _engines.settle(self.model)
        if lead:  # the next lead step finds memory again; until then other engines have it
            _measure.give_back_free_memory()
        seconds, processor_seconds = seconds[lead:], processor_seconds[lead:]
        return {"losses": losses, "seconds": seconds, "processor_seconds": processor_seconds}

    def memory(self) -> dict[str, Any]:
        """Bytes beyond what this process had before the model: the peak so far, and at rest."""
        peak = _measure.peak_resident_bytes()
        _measure.give_back_free_memory()
        return {
            "peak_bytes": peak - self.resident_before,
            "rest_bytes": _measure.resident_bytes() - self.resident_before,
            "live_tensor_bytes": _measure.live_tensor_bytes(),
        }


if __name__ == "__main__":
    main()

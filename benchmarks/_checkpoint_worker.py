"""One rank of one way to save and load; obeys `checkpoint.py` as `_train_worker.py` obeys its master.

Every engine holds the same state: a GPT trained for two steps, bfloat16 parameters, and float32 masters and moments,
each rank its half.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import _engines
import _measure
import torch
import torch.distributed as dist
from gpt import GPT, PRESETS, num_parameters, random_batch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

BLOCK_BYTES = 4 << 20
KINDS = {
    "param": torch.bfloat16,
    "master": torch.float32,
    "exp_avg": torch.float32,
    "exp_avg_sq": torch.float32,
}
BYTES_PER_PARAMETER = 14


def main() -> None:
    """Build, then obey."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    torch.set_num_threads(1)
    order = json.loads(sys.stdin.readline())
    engine = WAYS[order["engine"]](order["model"])
    answers.write(json.dumps({"versions": {"torch": torch.__version__}}) + "\n")
    for line in sys.stdin:
        command = json.loads(line)
        if command["do"] == "stop":
            break
        dist.barrier()
        answers.write(json.dumps(getattr(engine, command["do"])(Path(command["path"]))) + "\n")
    dist.destroy_process_group()


@contextmanager
def timed(seconds: dict[str, float], key: str) -> Iterator[None]:
    """Keep how long a block took."""
    before = time.perf_counter()
    yield
    seconds[key] = time.perf_counter() - before


def trained(model: str) -> dict[str, torch.Tensor]:
    """Whole tensors of the state, by name."""
    torch.manual_seed(0)
    config = PRESETS[model]
    gpt = GPT(config)
    optimizer = _engines.torch_adamw(gpt.parameters())
    for seed in range(2):
        gpt(*random_batch(config, sequences=1, seed=seed)).backward()
        optimizer.step()
        optimizer.zero_grad()
    state = {}
    for name, param in gpt.named_parameters():
        kept = optimizer.state[param]
        values = {
            "param": param,
            "master": param,
            "exp_avg": kept["exp_avg"],
            "exp_avg_sq": kept["exp_avg_sq"],
        }
        for kind, dtype in KINDS.items():
            state[f"{name}.{kind}"] = values[kind].detach().to(dtype, copy=True)
    return state


class Split:
    """The state as `DTensor`s, each rank its rows."""

    def __init__(self, model: str) -> None:
        _engines.init_process_group()
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        mesh = init_device_mesh("cpu", (self.world,))
        state = trained(model)
        self.whole = {name: (tuple(t.shape), t.stride(), t.dtype) for name, t in state.items()}
        self.state: dict[str, Any] = {}
        for name in self.whole:
            tensor = state.pop(name)
            parts = tensor.chunk(self.world)
            local = parts[self.rank].clone() if self.rank < len(parts) else tensor[:0]
            self.state[name] = DTensor.from_local(
                local, mesh, [Shard(0)], run_check=False, shape=tensor.shape, stride=tensor.stride()
            )
        del tensor, parts
        _measure.give_back_free_memory()

    def clear(self) -> None:
        """Other values, so that a load has something to do."""
        for tensor in self.state.values():
            tensor.to_local().zero_()

    def check(self) -> None:
        """A load has brought values back."""
        first = next(iter(self.state.values())).to_local()
        if not bool(first.any()):
            raise RuntimeError("nothing was loaded")


class Dcp(Split):
    """torch.distributed.checkpoint."""

    def save(self, path: Path) -> dict[str, float]:
        """Files are synced by its writer."""
        from torch.distributed.checkpoint.state_dict_saver import save

        seconds: dict[str, float] = {}
        with timed(seconds, "s"):
            save(self.state, checkpoint_id=path)
            sync(path)
        return seconds

    def load(self, path: Path) -> dict[str, float]:
        """In place."""
        from torch.distributed.checkpoint.state_dict_loader import load

        self.clear()
        seconds: dict[str, float] = {}
        with timed(seconds, "s"):
            load(self.state, checkpoint_id=path)
        self.check()
        return seconds


class Universal(Split):
    """ckpt-universal."""

    def save(self, path: Path) -> dict[str, float]:
        """Durable when it returns."""
        import ckpt_universal as ckpt

        seconds: dict[str, float] = {}
        with timed(seconds, "s"):
            ckpt.save(path, self.state, step=0)
        return seconds

    def load(self, path: Path) -> dict[str, float]:
        """In place."""
        import ckpt_universal as ckpt

        self.clear()
        seconds: dict[str, float] = {}
        with timed(seconds, "s"):
            loaded = ckpt.load(path, into=self.state)
        self.check()
        return {**seconds, "read_ratio": loaded.read_bytes / loaded.wanted_bytes}

    def flat(self, parts: tuple[float, float]) -> dict[str, Any]:
        """The state as ranges of flat tensors, as ZeRO cuts them: one buffer a kind, from one share to another."""
        import ckpt_universal as ckpt

        state: dict[str, Any] = {}
        for kind in KINDS:
            names = [name for name in self.whole if name.endswith(f".{kind}")]
            total = sum(torch.Size(self.whole[name][0]).numel() for name in names)
            low, high, at = int(total * parts[0]), int(total * parts[1]), 0
            for name in names:
                shape, _, dtype = self.whole[name]
                numel = torch.Size(shape).numel()
                start, stop = max(low - at, 0), min(high - at, numel)
                if start < stop:
                    state[name] = ckpt.Shard(shape, dtype, (start,), torch.ones(stop - start, dtype=dtype))
                at += numel
        return state

    def resplit(self, path: Path) -> dict[str, float]:
        """Load halves that were saved as halves, and as a third and two thirds."""
        import _checkpoint_disk as disk
        import ckpt_universal as ckpt

        halves = ((0, 0.5), (0.5, 1))[self.rank]
        ckpt.save(path / "same", self.flat(halves), step=0)
        ckpt.save(path / "other", self.flat(((0, 1 / 3), (1 / 3, 1))[self.rank]), step=0)
        state = self.flat(halves)
        found: dict[str, list[float]] = {"same": [], "other": []}
        ratio = 0.0
        for number in range(6):
            for which in sorted(found, reverse=bool(number % 2)):
                dist.barrier()
                if self.rank == 0:
                    disk.drop_page_cache()
                dist.barrier()
                took: dict[str, float] = {}
                with timed(took, "s"):
                    loaded = ckpt.load(path / which, into=state)
                    dist.barrier()
                found[which].append(took["s"])
                ratio = max(ratio, loaded.read_bytes / loaded.wanted_bytes)
        return {**{which: statistics.median(each) for which, each in found.items()}, "read_ratio": ratio}

    def beside(self, path: Path) -> dict[str, float]:
        """How long a step waits for an asynchronous save, and how long copying the same bytes takes."""
        import ckpt_universal as ckpt

        local = [tensor.to_local() for tensor in self.state.values()]
        room = [torch.ones_like(tensor) for tensor in local]
        blocked, copied = [], []
        with ckpt.AsyncSaver(path, policy=ckpt.SavePolicy(retention=ckpt.Retention(keep_last=1))) as saver:
            for step in range(14):
                saver.wait()
                dist.barrier()
                seconds: dict[str, float] = {}
                with timed(seconds, "save"):
                    saver.save(self.state, step=step)
                saver.wait()
                dist.barrier()
                with timed(seconds, "copy"):
                    for to, tensor in zip(room, local, strict=True):
                        ctypes.memmove(to.data_ptr(), tensor.data_ptr(), tensor.nbytes)
                blocked.append(seconds["save"])
                copied.append(seconds["copy"])
        return {
            "blocked": statistics.median(blocked[2:]),
            "copied": statistics.median(copied[2:]),
        }  # two find pages

    def codecs(self, path: Path) -> dict[str, Any]:
        """What zstd does to each kind of state."""
        from ckpt_universal import codecs
        from ckpt_universal.compression import write_speed
        from ckpt_universal.places import open_directory
        from ckpt_universal.writer import bytes_of

        found: dict[str, Any] = {}
        directory = open_directory(path)
        directory.make()
        found["disk"] = write_speed(directory, "speed")
        for kind in KINDS:
            local = [
                t.to_local().reshape(-1)[: 1 << 20] for n, t in self.state.items() if n.endswith(f".{kind}")
            ]
            samples = [(bytes_of(each), each.element_size()) for each in local if each.numel() >= 1 << 16][:8]
            found[kind] = [[m.level, m.ratio, m.bytes_per_s] for m in codecs.measure(samples)]
        return found


class Limit(Split):
    """Plain threads that write and read as many bytes, aligned, past the page cache."""

    def __init__(self, model: str) -> None:
        _engines.init_process_group()
        self.rank = dist.get_rank()
        total = BYTES_PER_PARAMETER * num_parameters(GPT(PRESETS[model])) // dist.get_world_size()
        self.nbytes = -(-total // BLOCK_BYTES) * BLOCK_BYTES
        self.buffer = memoryview(mmap.mmap(-1, self.nbytes))
        for at in range(0, self.nbytes, BLOCK_BYTES):
            self.buffer[at : at + BLOCK_BYTES] = os.urandom(BLOCK_BYTES)

    def save(self, path: Path) -> dict[str, float]:
        """Write, sync."""
        path.mkdir(exist_ok=True, parents=True)
        seconds: dict[str, float] = {}
        with timed(seconds, "s"):
            handle = os.open(path / str(self.rank), os.O_WRONLY | os.O_CREAT | os.O_DIRECT, 0o644)
            self._blocks(lambda at: os.pwrite(handle, self.buffer[at : at + BLOCK_BYTES], at))
            os.fsync(handle)
            os.close(handle)
        return seconds

    def load(self, path: Path) -> dict[str, float]:
        """Read into place."""
        seconds: dict[str, float] = {}
        with timed(seconds, "s"):
            handle = os.open(path / str(self.rank), os.O_RDONLY | os.O_DIRECT)
            self._blocks(lambda at: os.preadv(handle, [self.buffer[at : at + BLOCK_BYTES]], at))
            os.close(handle)
        return seconds

    def _blocks(self, call: Callable[[int], int]) -> None:
        with ThreadPoolExecutor(4) as threads:
            done = sum(threads.map(call, range(0, self.nbytes, BLOCK_BYTES)))
        if done != self.nbytes:
            raise RuntimeError("a short write or read")


class DeepSpeed:
    """DeepSpeed, stage 2 in bfloat16: the same kinds of state, each rank its half."""

    def __init__(self, model: str) -> None:
        import deepspeed

        _engines.init_deepspeed()
        torch.manual_seed(0)
        config = PRESETS[model]
        gpt = GPT(config)
        settings = {
            "train_micro_batch_size_per_gpu": 1,
            "optimizer": {"type": "AdamW", "params": {"lr": 3e-4, "torch_adam": True}},
            "bf16": {"enabled": True},
            "zero_optimization": {"stage": 2, "reduce_bucket_size": _engines.DEEPSPEED_BUCKET},
            "steps_per_print": 1 << 30,
        }
        self.engine, *_ = deepspeed.initialize(model=gpt, model_parameters=gpt.parameters(), config=settings)
        for seed in range(2):
            self.engine.backward(self.engine(*random_batch(config, sequences=1, seed=seed)))
            self.engine.step()

    def save(self, path: Path) -> dict[str, float]:
        """Its own files, synced afterwards."""
        seconds: dict[str, float] = {}
        with timed(seconds, "s"):
            self.engine.save_checkpoint(str(path), tag="0")
            sync(path)
        return seconds

    def load(self, path: Path) -> dict[str, float]:
        """Its own way."""
        seconds: dict[str, float] = {}
        with timed(seconds, "s"):
            self.engine.load_checkpoint(str(path), tag="0")
        return seconds


def sync(path: Path) -> None:
    """Make what is in a folder durable: this rank a share of the files."""
    for number, file in enumerate(sorted(each for each in path.rglob("*") if each.is_file())):
        if number % dist.get_world_size() == dist.get_rank():
            handle = os.open(file, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)
    dist.barrier()


WAYS: dict[str, Callable[[str], Any]] = {
    "limit": Limit,
    "ckpt-universal": Universal,
    "dcp": Dcp,
    "deepspeed": DeepSpeed,
}

if __name__ == "__main__":
    main()

"""`zerostack doctor`: what is here, what will be used, and how fast two processes exchange tensors.

In: this machine. Out: text to read or to attach to a report. Nothing is changed.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence

import accel_kernels
import torch
import torch.distributed as dist
import zero_core as zero
from zero_core.testing import RankFailedError, run_ranks

from ..explain import num_bytes, table
from ..machine import cpu_bfloat16, cpu_model, memory_bytes
from .main import parser_for
from .text import complain, say

_EXAMPLES = """\
  zerostack doctor
  zerostack doctor --no-bandwidth        only what is installed
  zerostack doctor --max-mb 256          larger messages
"""

_PACKAGES = (
    "zerostack",
    "zero-core",
    "zero-offload-nvme",
    "comm-compress",
    "ckpt-universal",
    "accel-kernels",
    "torch",
    "numpy",
    "safetensors",
    "pydantic",
    "cupy-cuda12x",
    "cupy-cuda13x",
    "numba",
)
_SIZES_KB = (64, 1024, 16 * 1024, 64 * 1024, 256 * 1024)


def main(argv: Sequence[str]) -> int:
    """Print the report."""
    parser = parser_for("doctor", _EXAMPLES)
    parser.add_argument("--no-bandwidth", action="store_true", help="do not start processes to measure")
    parser.add_argument("--max-mb", type=float, default=64, metavar="N", help="largest message (64)")
    args = parser.parse_args(argv)
    if args.max_mb < 0.0625:
        parser.error(f"--max-mb: expected at least 0.0625, got {args.max_mb:g}")
    say(table(("machine", ""), _machine()))
    say()
    say(table(("package", "version"), [(name, _version(name)) for name in _PACKAGES]))
    say()
    say(f"kernels\n-------\n{accel_kernels.report()}")
    if args.no_bandwidth:
        return 0
    say()
    sizes = [kb * 1024 for kb in _SIZES_KB if kb / 1024 <= args.max_mb]
    try:
        rows = run_ranks(_measure, 2, sizes, timeout_s=300)[0]
    except RankFailedError as error:
        complain(f"zerostack doctor: two processes could not talk to each other over gloo: {error}")
        return 1
    say(table(("2 processes, gloo, fp32", "all_reduce GB/s", "all_gather GB/s", "reduce_scatter GB/s"), rows))
    say()
    say("GB/s: bytes of the whole tensor / time; median of several rounds.")
    return 0


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _machine() -> list[tuple[str, str]]:
    rows = [
        ("system", f"{platform.system()} {platform.release()}, Python {platform.python_version()}"),
        ("processor", f"{cpu_model()}, {len(os.sched_getaffinity(0))} core(s) usable"),
        ("memory", num_bytes(memory_bytes())),
        ("bf16 on the CPU", cpu_bfloat16() or "emulated: use fp32"),
        ("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "not set")),
    ]
    if not torch.cuda.is_available():
        return [*rows, ("GPU", "none that torch can use")]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        rows.append((f"GPU {index}", f"{properties.name}, {num_bytes(properties.total_memory)}"))
    return rows


def _measure(rank: int, sizes: list[int]) -> list[list[str]]:
    """Bandwidth of the collectives that training uses; runs on each of two processes."""
    group = dist.group.WORLD
    assert group is not None
    plain = zero.PlainCollectives(group)
    rows = []
    for size in sizes:
        full = torch.ones(size // 4)
        part = torch.ones(size // 8)
        calls: list[Callable[[], object]] = [
            lambda full=full: dist.all_reduce(full),  # type: ignore[misc]
            lambda full=full, part=part: plain.all_gather(part, full, tag=1).wait(),  # type: ignore[misc]
            lambda full=full, part=part: plain.reduce_scatter(full, part, tag=2).wait(),  # type: ignore[misc]
        ]
        rows.append([num_bytes(size), *[f"{size / _median_s(call) / 1e9:.2f}" for call in calls]])
    return rows


def _median_s(call: Callable[[], object], rounds: int = 7) -> float:
    times = []
    for _ in range(rounds + 2):
        dist.barrier()
        start_s = time.perf_counter()
        call()
        times.append(time.perf_counter() - start_s)
    return statistics.median(times[2:])

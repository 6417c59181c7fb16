"""The transfer engine beside fio and DeepSpeed's asynchronous I/O, reading and writing one file past the page cache.

    python3 tools/dev.py bench nvme
    python3 tools/dev.py bench nvme --folder /mnt/nvme --gib 4 --block-kib 1024 --depth 32
    python3 tools/dev.py bench nvme --quick

All of them move the same file, which has been written once before, in blocks of one size and with one queue depth.
They take turns, the order turning too; a ratio is the median over rounds of the ratio inside each. fio's own process
start is left out, as are our opening of the file and the registering of memory. fio moves one set of blocks again and
again, which stay in the processor's caches (psync: a block a job); so do our rows that say so. DeepSpeed and our other
rows move memory as large as the file.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import _measure
import accel_kernels as ak
import torch
from _measure import MIB
from _nvme_peers import (
    Contestant,
    DeepSpeedAio,
    Job,
    fio,
    fio_fixed,
    fio_threads,
    fio_version,
    noise,
    ours,
    ours_again,
)

HERE = Path(__file__).resolve().parent
PEERS = HERE.parent / ".venv-peers" / "environ.json"
ACTS = ("read", "write")
OURS = "ours"


def our_contestants(job: Job, stack: ExitStack) -> dict[str, Contestant]:
    """The engine that is taken here, on registered memory and on what torch allocates; and threads."""
    options: dict[str, Any] = {
        "block_bytes": job.block_bytes,
        "queue_depth": job.queue_depth,
        "num_threads": job.num_threads,
    }
    best = stack.enter_context(ak.TransferEngine(**options))
    registered = ak.aligned_empty(job.nbytes, register=best)
    registered.copy_(noise(job.nbytes))
    blocks = ak.aligned_empty(job.num_threads * job.block_bytes, register=best)
    blocks.copy_(noise(blocks.numel()))
    made = {
        f"{OURS}, {best.name}": ours(best, job, registered),
        f"{OURS}, {best.name}, the same blocks again": ours_again(best, job, blocks),
    }
    plain = torch.empty(job.nbytes, dtype=torch.uint8)
    plain.copy_(registered)
    made[f"{OURS}, {best.name}, a plain tensor"] = ours(best, job, plain)
    if best.name == "io_uring":
        threads = stack.enter_context(ak.TransferEngine(engine="threads", **options))
        made[f"{OURS}, threads"] = ours(threads, job, registered)
        made[f"{OURS}, threads, the same blocks again"] = ours_again(threads, job, blocks)
    return made


def peers(job: Job, stack: ExitStack, versions: dict[str, str]) -> dict[str, Contestant]:
    """Those that are installed; says which are not."""
    made: dict[str, Contestant] = {}
    version = fio_version()
    if version is None:
        print("fio is left out: it is not installed (python3 tools/dev.py peers, or apt-get install fio)")
    else:
        versions["fio"] = version
        size = f"--size={job.nbytes}"
        made["fio, io_uring"] = fio(job, "io_uring", size)
        made["fio, io_uring, fixed buffers and files"] = fio_fixed(job)
        made["fio, libaio"] = fio(job, "libaio", size)
        made[f"fio, psync, {job.num_threads} jobs"] = fio_threads(job)
    for threads in (1, job.num_threads):
        try:
            handle = DeepSpeedAio(job, threads, PEERS)
        except (OSError, RuntimeError) as error:
            print(
                f"DeepSpeed's aio_handle is left out: {error} (apt-get install libaio-dev, tools/dev.py peers)"
            )
            break
        stack.callback(handle.close)
        versions["deepspeed"] = handle.version
        made[f"DeepSpeed aio_handle, {threads} thread{'s' * (threads > 1)}"] = handle
    return made


def measure(contestants: dict[str, Contestant], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of each, for each act, by round; a round before the first does not count."""
    found: dict[str, dict[str, list[float]]] = {name: {act: [] for act in ACTS} for name in contestants}
    names = list(contestants)
    for number in range(rounds + 1):
        turned = names[number % len(names) :] + names[: number % len(names)]
        for act in ACTS:
            for name in turned:
                seconds = contestants[name](act)
                if number:
                    found[name][act].append(seconds)
    return found


def ratio(mine: Sequence[float], its: Sequence[float]) -> float:
    """How many times as fast, in the median round."""
    return statistics.median(b / a for a, b in zip(mine, its, strict=True))


def best_peer(found: dict[str, dict[str, list[float]]], act: str) -> str | None:
    """The fastest that is not ours."""
    others = [name for name in found if not name.startswith(OURS)]
    return min(others, key=lambda name: statistics.median(found[name][act]), default=None)


def page(record: dict[str, Any]) -> str:
    """The table, as Markdown."""
    job, hardware, found = record["job"], record["hardware"], record["seconds"]
    against = {act: best_peer(found, act) for act in ACTS}
    versions = ", ".join(f"{name} {version}" for name, version in sorted(record["versions"].items()))
    lines = [
        "# Reading and writing files",
        "",
        f"{record['date']}; {hardware['processor']}, {hardware['cores']} cores, {hardware['memory_gib']} GiB, "
        f"{record['disk']}; {versions}.",
        "",
        f"{job['nbytes'] / 2**30:g} GiB, blocks of {job['block_bytes'] / MIB:g} MiB, queue depth "
        f"{job['queue_depth']}, {'O_DIRECT' if record['direct'] else 'through the page cache'}; medians of "
        f"{record['rounds']} rounds (bar: ours >= 1.0 x the fastest other)",
        "",
        "| engine | read GB/s | of the fastest other | write GB/s | of the fastest other |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, row in found.items():
        cells = []
        for act in ACTS:
            other = against[act]
            cells.append(f"{job['nbytes'] / 1e9 / statistics.median(row[act]):.2f}")
            cells.append("" if other is None else f"**{ratio(row[act], found[other][act]):.2f}**")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def parsed(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path.cwd(), help="on the disk in question")
    parser.add_argument("--gib", type=float, default=1.0, help="size of the file, and of our memory")
    parser.add_argument("--block-kib", type=int, default=1024)
    parser.add_argument("--depth", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "nvme.json")
    parser.add_argument("--quick", action="store_true", help="64 MiB, two rounds; prints, writes nothing")
    options = parser.parse_args(arguments)
    if options.quick:
        options.gib, options.rounds = 1 / 16, 2
    return options


def main(arguments: Sequence[str]) -> int:
    """Measure, print, write."""
    options = parsed(arguments)
    versions = {
        "accel-kernels": ak.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "linux": platform.release().split("-")[0],
    }
    with (
        tempfile.TemporaryDirectory(dir=options.folder, prefix="nvme-bench-") as folder,
        ExitStack() as stack,
    ):
        job = Job(Path(folder, "file"), int(options.gib * 1024) * MIB, options.block_kib << 10, options.depth)
        with ak.TransferEngine() as engine, engine.open(job.path, nbytes=job.nbytes) as file:
            direct = file.direct
            engine.write(file, 0, noise(job.nbytes)).wait()  # new blocks are slower than old ones
        contestants = {**our_contestants(job, stack), **peers(job, stack, versions)}
        found = measure(contestants, options.rounds)
    record = {
        "benchmark": "nvme",
        "date": _measure.today(),
        "hardware": _measure.hardware(),
        "disk": disk(options.folder),
        "direct": direct,
        "versions": versions,
        "rounds": options.rounds,
        "job": {"nbytes": job.nbytes, "block_bytes": job.block_bytes, "queue_depth": job.queue_depth},
        "seconds": found,
    }
    print(page(record))
    if not options.quick:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(record, indent=1) + "\n")
        options.out.with_suffix(".md").write_text(page(record))
    return 0


def disk(folder: Path) -> str:
    """The block device and file system under a folder, as the system names them."""
    at = folder.resolve()
    best = ("", "a disk without a name", "")
    for line in Path("/proc/mounts").read_text().splitlines():
        device, where, kind = line.split()[:3]
        if at.is_relative_to(where) and len(where) >= len(best[0]):
            best = (where, device, kind)
    return f"{best[2]} on {best[1]}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

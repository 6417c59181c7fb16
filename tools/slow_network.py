"""Two hosts on one machine: network namespaces joined by a link of a chosen rate and delay. Needs root and iproute2.

    sudo python3 tools/slow_network.py --mbit 1000 -- python train.py     # two ranks, one on each "host"
    sudo python3 tools/slow_network.py --mbit 100 --delay-ms 5 -- .venv/bin/python train.py --steps 10

The command runs once in each namespace with the variables of torch.distributed set (RANK, WORLD_SIZE, MASTER_ADDR,
MASTER_PORT, GLOO_SOCKET_IFNAME): `torch.distributed.init_process_group("gloo")` is all it has to call. The rate is that
of each direction (a token bucket on both ends; with a delay, netem). Everything is taken down when the command ends.

Ranks on one machine could still share memory: pass `zero_core.PlainCollectives(group, shared_memory=False)`.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

PORT = 29400
"""In namespaces of their own, ports are free."""


class LabError(RuntimeError):
    """The lab cannot be set up here."""


@dataclass(frozen=True)
class Lab:
    """Two namespaces and the link between them.

    Attributes:
        name: what namespaces and interfaces are called after.
        mbit: megabits a second, each way; None: as fast as the machine.
        delay_ms: one way, added to every packet.
    """

    name: str
    mbit: float | None = None
    delay_ms: float = 0.0

    def command(self, rank: int, command: Sequence[str]) -> list[str]:
        """`command`, to be run on a rank's host."""
        return ["ip", "netns", "exec", f"{self.name}-{rank}", *command]

    def environ(self, rank: int, port: int = PORT) -> dict[str, str]:
        """What a rank needs to find the others; each job at a time needs a port of its own."""
        return {
            "RANK": str(rank),
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "2",
            "MASTER_ADDR": _address(0),
            "MASTER_PORT": str(port),
            "GLOO_SOCKET_IFNAME": f"{self.name}-v{rank}",
        }

    def sent_bytes(self, rank: int) -> int:
        """Bytes that a rank's host has put on the link, headers included."""
        path = f"/sys/class/net/{self.name}-v{rank}/statistics/tx_bytes"
        return int(_run(self.command(rank, ["cat", path])))

    def set_rate(self, mbit: float | None) -> Lab:
        """Change the rate, for those who are connected too."""
        for rank in range(2):
            device = f"{self.name}-v{rank}"
            rate = [] if mbit is None else ["rate", f"{mbit}mbit"]
            if self.delay_ms:
                discipline = ["netem", "delay", f"{self.delay_ms}ms", *rate, "limit", "100000"]
            elif rate:
                # The bucket holds a millisecond; the queue, 50 ms.
                burst = max(int((mbit or 0) * 1e6 / 8 / 1000), 16_000)
                discipline = ["tbf", *rate, "burst", str(burst), "latency", "50ms"]
            else:
                discipline = ["pfifo_fast"]
            _run(self.command(rank, ["tc", "qdisc", "replace", "dev", device, "root", *discipline]))
        return Lab(self.name, mbit, self.delay_ms)


@contextmanager
def lab(mbit: float | None = None, *, delay_ms: float = 0.0) -> Iterator[Lab]:
    """Set the lab up, and take it down.

    Args:
        mbit: megabits a second, each way; None: as fast as the machine.
        delay_ms: one way, added to every packet.

    Raises:
        LabError: no root, no iproute2, or a kernel that lacks namespaces or token buckets.
    """
    if os.geteuid() != 0:
        raise LabError("network namespaces need root: run it under sudo")
    missing = [program for program in ("ip", "tc") if shutil.which(program) is None]
    if missing:
        raise LabError(f"{', '.join(missing)} not found: install iproute2")
    made = Lab(f"zs{os.getpid() % 100_000}", delay_ms=delay_ms)
    try:
        for rank in range(2):
            _run(["ip", "netns", "add", f"{made.name}-{rank}"])
        ends = [[f"{made.name}-v{rank}", "netns", f"{made.name}-{rank}"] for rank in range(2)]
        _run(["ip", "link", "add", *ends[0], "type", "veth", "peer", "name", *ends[1]])
        for rank in range(2):
            device = f"{made.name}-v{rank}"
            for setting in (
                ["addr", "add", f"{_address(rank)}/24", "dev", device],
                ["link", "set", device, "up"],
                ["link", "set", "lo", "up"],
            ):
                _run(made.command(rank, ["ip", *setting]))
        yield made.set_rate(mbit)
    finally:
        for rank in range(2):
            subprocess.run(["ip", "netns", "del", f"{made.name}-{rank}"], capture_output=True, check=False)


def _address(rank: int) -> str:
    return f"10.213.7.{rank + 1}"


def _run(command: Sequence[str]) -> str:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise LabError(f"{' '.join(command)}: {result.stderr.strip() or result.stdout.strip()}")
    return result.stdout


def main(arguments: Sequence[str]) -> int:
    """Run a command on both hosts; the first failure's exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mbit", type=float, help="megabits a second, each way; default: no limit")
    parser.add_argument("--delay-ms", type=float, default=0.0, help="one way")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="after --: what runs on each host")
    options = parser.parse_args(arguments)
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    if not command:
        parser.error("give the command to run, after --")
    try:
        with lab(options.mbit, delay_ms=options.delay_ms) as two:
            ranks = [
                subprocess.Popen(two.command(rank, command), env={**os.environ, **two.environ(rank)})
                for rank in range(2)
            ]
            codes = [rank.wait() for rank in ranks]
    except LabError as error:
        print(f"slow_network: {error}", file=sys.stderr)
        return 2
    return next((code for code in codes if code), 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

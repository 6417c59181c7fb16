"""Hosts on one machine: network namespaces joined by links of a chosen rate and delay. Needs root and iproute2.

    sudo python3 tools/slow_network.py --mbit 1000 -- python train.py     # two ranks, one on each "host"
    sudo python3 tools/slow_network.py --mbit 100 --delay-ms 5 -- .venv/bin/python train.py --steps 10
    sudo python3 tools/slow_network.py --hosts 2 --ranks 2 --mbit 100 -- .venv/bin/python train.py   # four ranks

The command runs once for each rank, in its host's namespace, with the variables of torch.distributed set (RANK,
LOCAL_RANK, LOCAL_WORLD_SIZE, WORLD_SIZE, MASTER_ADDR, MASTER_PORT, GLOO_SOCKET_IFNAME):
`torch.distributed.init_process_group("gloo")` is all it has to call. Two hosts are joined directly, more by a switch;
the rate is that of each host's link, each way (a token bucket on both ends; with a delay, netem). Frames are as large
as clusters have them: cutting data into small ones is work of a network card, and here of the cores that train.
Everything is taken down when the command ends.

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
from dataclasses import dataclass, replace

PORT = 29400
"""In namespaces of their own, ports are free."""


class LabError(RuntimeError):
    """The lab cannot be set up here."""


@dataclass(frozen=True)
class Lab:
    """Namespaces and the links between them.

    Attributes:
        name: what namespaces and interfaces are called after.
        mbit: megabits a second, each way; None: as fast as the machine.
        delay_ms: one way, added to every packet.
        num_hosts: namespaces.
        ranks_per_host: rank r is on host r // ranks_per_host.
        frame_bytes: of the links' frames.
    """

    name: str
    mbit: float | None = None
    delay_ms: float = 0.0
    num_hosts: int = 2
    ranks_per_host: int = 1
    frame_bytes: int = 9000

    @property
    def num_ranks(self) -> int:
        """On all hosts."""
        return self.num_hosts * self.ranks_per_host

    def command(self, rank: int, command: Sequence[str]) -> list[str]:
        """`command`, to be run on a rank's host."""
        return self.on_host(rank // self.ranks_per_host, command)

    def on_host(self, host: int, command: Sequence[str]) -> list[str]:
        """`command`, to be run on a host."""
        return ["ip", "netns", "exec", f"{self.name}-{host}", *command]

    def environ(self, rank: int, port: int = PORT) -> dict[str, str]:
        """What a rank needs to find the others; each job at a time needs a port of its own."""
        return {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank % self.ranks_per_host),
            "LOCAL_WORLD_SIZE": str(self.ranks_per_host),
            "WORLD_SIZE": str(self.num_ranks),
            "MASTER_ADDR": _address(0),
            "MASTER_PORT": str(port),
            "GLOO_SOCKET_IFNAME": f"{self.name}-v{rank // self.ranks_per_host}",
        }

    def sent_bytes(self, host: int) -> int:
        """Bytes that a host has put on its link, headers included."""
        path = f"/sys/class/net/{self.name}-v{host}/statistics/tx_bytes"
        return int(_run(self.on_host(host, ["cat", path])))

    def set_rate(self, mbit: float | None) -> Lab:
        """Change the rate, for those who are connected too."""
        for host in range(self.num_hosts):
            _run(
                self.on_host(
                    host,
                    ["tc", "qdisc", "replace", "dev", f"{self.name}-v{host}", "root", *self._limit(mbit)],
                )
            )
            if self.num_hosts > 2:  # what comes from several others is no faster
                _run(["ip", "netns", "exec", f"{self.name}-s", "tc", "qdisc", "replace", "dev", f"{self.name}-p{host}",
                      "root", *self._limit(mbit, delayed=False)])  # fmt: skip
        return replace(self, mbit=mbit)

    def _limit(self, mbit: float | None, *, delayed: bool = True) -> list[str]:
        rate = [] if mbit is None else ["rate", f"{mbit}mbit"]
        if self.delay_ms and delayed:
            return ["netem", "delay", f"{self.delay_ms}ms", *rate, "limit", "100000"]
        if mbit is None:
            return ["pfifo_fast"]
        # The bucket holds a millisecond; the queue, 50 ms.
        return ["tbf", *rate, "burst", str(max(int(mbit * 1e6 / 8 / 1000), 16_000)), "latency", "50ms"]


@contextmanager
def lab(
    mbit: float | None = None,
    *,
    delay_ms: float = 0.0,
    hosts: int = 2,
    ranks_per_host: int = 1,
    frame_bytes: int = 9000,
) -> Iterator[Lab]:
    """Set the lab up, and take it down.

    Args:
        mbit: megabits a second of each host's link, each way; None: as fast as the machine.
        delay_ms: one way, added to every packet.
        hosts: 2 to 200.
        ranks_per_host: processes that `Lab.command` and `Lab.environ` know on each.
        frame_bytes: of the links' frames (their MTU): 1500 on the internet, 9000 in most clusters.

    Raises:
        LabError: no root, no iproute2, a kernel that lacks namespaces or token buckets, or a lab inside another of one
            process.
    """
    if not (2 <= hosts <= 200 and ranks_per_host >= 1):
        raise LabError(f"expected 2 to 200 hosts with at least a rank each, got {hosts} and {ranks_per_host}")
    if os.geteuid() != 0:
        raise LabError("network namespaces need root: run it under sudo")
    missing = [program for program in ("ip", "tc") if shutil.which(program) is None]
    if missing:
        raise LabError(f"{', '.join(missing)} not found: install iproute2")
    made = Lab(f"zs{os.getpid() % 100_000}", None, delay_ms, hosts, ranks_per_host, frame_bytes)
    spaces: list[str] = []  # made here, so taken down here
    try:
        for end in [*map(str, range(hosts)), *(["s"] if hosts > 2 else [])]:
            _run(["ip", "netns", "add", f"{made.name}-{end}"])
            spaces.append(f"{made.name}-{end}")
        if hosts == 2:
            ends = [[f"{made.name}-v{host}", "netns", spaces[host]] for host in range(2)]
            _run(["ip", "link", "add", *ends[0], "type", "veth", "peer", "name", *ends[1]])
        else:
            _add_switch(made)
        for host in range(hosts):
            device = f"{made.name}-v{host}"
            for setting in (
                ["addr", "add", f"{_address(host)}/24", "dev", device],
                ["link", "set", device, "mtu", str(frame_bytes), "up"],
                ["link", "set", "lo", "up"],
            ):
                _run(made.on_host(host, ["ip", *setting]))
        yield made.set_rate(mbit)
    finally:
        for space in spaces:
            subprocess.run(["ip", "netns", "del", space], capture_output=True, check=False)


def _add_switch(made: Lab) -> None:
    """A bridge in a namespace of its own, with a port for each host."""
    switch = f"{made.name}-s"
    inside = ["ip", "-n", switch, "link"]
    _run([*inside, "add", "switch", "type", "bridge"])
    for host in range(made.num_hosts):
        port, end = f"{made.name}-p{host}", [f"{made.name}-v{host}", "netns", f"{made.name}-{host}"]
        _run(["ip", "link", "add", port, "netns", switch, "type", "veth", "peer", "name", *end])
        _run([*inside, "set", port, "mtu", str(made.frame_bytes), "master", "switch", "up"])
    _run([*inside, "set", "switch", "up"])


def _address(host: int) -> str:
    return f"10.213.7.{host + 1}"


def _run(command: Sequence[str]) -> str:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise LabError(f"{' '.join(command)}: {result.stderr.strip() or result.stdout.strip()}")
    return result.stdout


def main(arguments: Sequence[str]) -> int:
    """Run a command for every rank; the first failure's exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mbit", type=float, help="megabits a second, each way; default: no limit")
    parser.add_argument("--delay-ms", type=float, default=0.0, help="one way")
    parser.add_argument("--frame-bytes", type=int, default=9000, help="of the links' frames; 9000")
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument("--ranks", type=int, default=1, help="on each host")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="after --: what runs on each host")
    options = parser.parse_args(arguments)
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    if not command:
        parser.error("give the command to run, after --")
    try:
        with lab(
            options.mbit,
            delay_ms=options.delay_ms,
            hosts=options.hosts,
            ranks_per_host=options.ranks,
            frame_bytes=options.frame_bytes,
        ) as made:
            ranks = [
                subprocess.Popen(made.command(rank, command), env={**os.environ, **made.environ(rank)})
                for rank in range(made.num_ranks)
            ]
            codes = [rank.wait() for rank in ranks]
    except LabError as error:
        print(f"slow_network: {error}", file=sys.stderr)
        return 2
    return next((code for code in codes if code), 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

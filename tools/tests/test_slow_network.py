"""The lab of slow links: ranks find each other on any number of hosts, links are as slow as asked, nothing is left."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import slow_network

SCRIPT = """
import os, time, torch, torch.distributed as dist
dist.init_process_group("gloo")
value = torch.full((250_000,), float(dist.get_rank()))  # a megabyte
dist.barrier()
begun = time.perf_counter()
dist.all_reduce(value)
seconds = time.perf_counter() - begun
assert float(value[0]) == sum(range(dist.get_world_size())), value[0]
if dist.get_rank() == 0:
    print(dist.get_world_size(), os.environ["LOCAL_WORLD_SIZE"], seconds)
dist.destroy_process_group()
"""


def namespaces_of(process: int) -> list[str]:
    """The network namespaces that the lab of one process holds (other labs may run beside it)."""
    listed = subprocess.run(["ip", "netns"], capture_output=True, text=True, check=True).stdout
    return [line.split()[0] for line in listed.splitlines() if line.startswith(f"zs{process % 100_000}-")]


@pytest.fixture
def possible() -> None:
    """Skips where there can be no lab."""
    try:
        with slow_network.lab():
            pass
    except slow_network.LabError as error:
        pytest.skip(str(error))


@pytest.mark.usefixtures("possible")
@pytest.mark.parametrize(("hosts", "ranks", "mbit"), [(2, 1, 80), (3, 2, None)])
def test_ranks_meet_and_links_are_slow(hosts: int, ranks: int, mbit: float | None, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, slow_network.__file__, "--hosts", str(hosts), "--ranks", str(ranks)]
    if mbit:
        command += ["--mbit", str(mbit)]
    with subprocess.Popen(
        [*command, "--", sys.executable, str(tmp_path / "script.py")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as lab:  # fmt: skip
        try:
            output, errors = lab.communicate(timeout=120)
        finally:
            lab.terminate()  # takes its hosts down with it
    assert lab.returncode == 0, errors
    world, local, seconds = output.split()
    assert (int(world), int(local)) == (hosts * ranks, ranks)
    if mbit:  # each of two ranks sends a megabyte
        assert 0.9 < float(seconds) / (8 / mbit) < 3
    assert not namespaces_of(lab.pid)


@pytest.mark.parametrize("wrong", [{"hosts": 1}, {"hosts": 500}, {"ranks_per_host": 0}])
def test_what_cannot_be_set_up_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(slow_network.LabError, match="expected 2 to 200 hosts"), slow_network.lab(**wrong):
        pass


@pytest.mark.usefixtures("possible")
@pytest.mark.parametrize("hosts", [2, 3])
def test_frames_are_as_large_as_asked_and_a_lab_inside_another_leaves_it_alone(hosts: int) -> None:
    with slow_network.lab(hosts=hosts, frame_bytes=1500) as outer:
        with pytest.raises(slow_network.LabError), slow_network.lab():
            pass
        device = f"/sys/class/net/{outer.name}-v1/mtu"
        assert subprocess.check_output(outer.on_host(1, ["cat", device]), text=True) == "1500\n"

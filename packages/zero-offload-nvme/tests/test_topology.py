"""Cores are shared out fairly, near their memory, for any machine and number of ranks; binding is undone."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
import torch
import zero_offload_nvme as off
from hypothesis import given, settings
from hypothesis import strategies as st
from zero_offload_nvme.binding import read_nodes
from zero_offload_nvme.topology import Node, assign, make_nodes, parse_cpus


@st.composite
def machines(draw: st.DrawFn) -> tuple[Node, ...]:
    """Nodes of unequal sizes, one or two CPUs a core, some of them not allowed."""
    threads = draw(st.integers(1, 2))
    sizes = draw(st.lists(st.integers(1, 12), min_size=1, max_size=5))
    total = sum(sizes)
    cpus_of_node, first = {}, 0
    for number, size in enumerate(sizes):
        cpus_of_node[number] = [
            core + total * k for core in range(first, first + size) for k in range(threads)
        ]
        first += size
    siblings = {cpu: [cpu % total + total * k for k in range(threads)] for cpu in range(total * threads)}
    allowed = draw(st.sets(st.sampled_from(sorted(siblings)), min_size=1))
    return make_nodes(cpus_of_node, siblings, allowed)


@settings(max_examples=300, deadline=None)
@given(nodes=machines(), num_ranks=st.integers(1, 40))
def test_shares(nodes: tuple[Node, ...], num_ranks: int) -> None:
    sets = assign(nodes, num_ranks)
    assert len(sets) == num_ranks
    where = {cpu: node.number for node in nodes for core in node.cores for cpu in core}
    core_of = {cpu: core for node in nodes for core in node.cores for cpu in core}
    every = [cpu for cores in sets for cpu in cores.cpus]
    assert set(every) <= set(where)
    for cores in sets:
        assert cores.cpus == tuple(sorted(set(cores.cpus)))
        assert cores.nodes == tuple(sorted({where[cpu] for cpu in cores.cpus}))
        assert 1 <= cores.num_cores <= len(cores.cpus)
        if num_ranks >= len(nodes):
            assert len(cores.nodes) == 1  # memory is near
    by_node: dict[tuple[int, ...], list[off.CoreSet]] = {}
    for cores in sets:
        by_node.setdefault(cores.nodes, []).append(cores)
    if num_ranks >= len(nodes):
        for node in nodes:
            here = by_node[(node.number,)]
            cpus = [cpu for cores in here for cpu in cores.cpus]
            if len(here) <= len(node.cores):  # whole cores, none left over, none shared
                assert sorted(cpus) == sorted(cpu for core in node.cores for cpu in core)
                assert all(set(core_of[cpu]) <= set(cores.cpus) for cores in here for cpu in cores.cpus)
                counts = [cores.num_cores for cores in here]
                assert max(counts) - min(counts) <= 1
            elif len(here) <= len(core_of):
                assert len(set(cpus)) == len(cpus) or len(here) > sum(map(len, node.cores))
    else:
        assert sorted(every) == sorted(where)


def test_a_common_machine() -> None:
    nodes = make_nodes(
        {0: parse_cpus("0-3,8-11"), 1: parse_cpus("4-7,12-15")},
        {cpu: (cpu % 8, cpu % 8 + 8) for cpu in range(16)},
        range(16),
    )
    assert [cores.cpus for cores in assign(nodes, 4)] == [
        (0, 1, 8, 9),
        (2, 3, 10, 11),
        (4, 5, 12, 13),
        (6, 7, 14, 15),
    ]
    assert [cores.num_cores for cores in assign(nodes, 1)] == [8]
    assert [cores.cpus for cores in assign(nodes, 3)] == [
        (0, 1, 8, 9),
        (2, 3, 10, 11),
        (4, 5, 6, 7, 12, 13, 14, 15),
    ]


@pytest.mark.parametrize(
    ("text", "cpus"), [("0-3,8\n", (0, 1, 2, 3, 8)), ("", ()), ("5", (5,)), ("0,2-3", (0, 2, 3))]
)
def test_lists_of_cpus(text: str, cpus: tuple[int, ...]) -> None:
    assert parse_cpus(text) == cpus


def test_reading_a_machine(tmp_path: Path) -> None:
    for number, cpus in enumerate(("0-1,4-5", "2-3,6-7")):
        folder = tmp_path / "node" / f"node{number}"
        folder.mkdir(parents=True)
        (folder / "cpulist").write_text(cpus + "\n")
    for cpu in range(8):
        folder = tmp_path / "cpu" / f"cpu{cpu}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{cpu % 4},{cpu % 4 + 4}\n")
    assert read_nodes(range(8), tmp_path) == (Node(0, ((0, 4), (1, 5))), Node(1, ((2, 6), (3, 7))))
    assert read_nodes({0, 2, 6}, tmp_path) == (Node(0, ((0,),)), Node(1, ((2, 6),)))
    assert read_nodes({0, 1}, tmp_path / "nowhere") == (Node(-1, ((0,), (1,))),)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system binds no threads")
def test_binding_takes_every_thread_and_is_undone() -> None:
    before, threads = os.sched_getaffinity(0), torch.get_num_threads()
    seen: dict[str, set[int]] = {}
    go, done = threading.Event(), threading.Event()

    def other() -> None:
        done.set()
        go.wait()
        seen["other"] = os.sched_getaffinity(0)

    thread = threading.Thread(target=other)
    thread.start()
    done.wait()
    last = len(before) - 1
    with off.bind_rank(last, len(before)) as bound:
        assert isinstance(bound, off.CoreSet)
        assert os.sched_getaffinity(0) == set(bound.cpus) <= before
        assert torch.get_num_threads() == bound.num_cores
        go.set()
        thread.join()
        assert seen["other"] == set(bound.cpus)
    assert os.sched_getaffinity(0) == before
    assert torch.get_num_threads() == threads
    bound.close()  # again: nothing happens


def test_ranks_that_do_not_exist() -> None:
    with pytest.raises(ValueError, match="expected 0 <= local_rank < num_local_ranks, got 2 of 2"):
        off.bind_rank(2, 2)

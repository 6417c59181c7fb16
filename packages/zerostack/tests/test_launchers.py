"""Processes that a launcher starts are ranks of one group, or told what is missing; never models of their own."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest
from zerostack import ConfigError
from zerostack.launchers import torchrun_variables

SCRIPT = """
import os, torch.distributed as dist, zerostack
zerostack.init_distributed()
print(dist.get_rank(), dist.get_world_size(), os.environ["LOCAL_RANK"])
dist.destroy_process_group()
"""
OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
MPICH = {"PMI_SIZE": "2", "PMI_RANK": "1", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
SLURM = {
    "SLURM_NTASKS": "2",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NUM_NODES": "1",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "1",
}
FOUND = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}


@pytest.mark.parametrize("environ", [OPEN_MPI, MPICH, SLURM], ids=["openmpi", "mpich", "slurm"])
def test_the_variables_of_other_launchers_become_torchruns(environ):
    assert torchrun_variables(environ, 29500) == FOUND
    told = {"MASTER_ADDR": "host0", "MASTER_PORT": "7"}
    assert torchrun_variables(environ | told, 29500) == FOUND | told
    with pytest.raises(ConfigError, match=r"is 2 and RANK is missing: .*`torchrun` or `zerostack run`"):
        torchrun_variables(environ, 29500, others=False)


def test_several_machines_need_an_address():
    across = SLURM | {"SLURM_STEP_NUM_NODES": "2", "SLURM_LOCALID": "0"}
    with pytest.raises(ConfigError, match=r"SLURM_STEP_NUM_TASKS is 2 \(Slurm\), and MASTER_ADDR"):
        torchrun_variables(across, 29500)
    found = torchrun_variables(across | {"MASTER_ADDR": "host0"}, 29500)
    assert found["MASTER_ADDR"] == "host0"
    assert "LOCAL_WORLD_SIZE" not in found


def test_what_is_missing_is_named():
    with pytest.raises(ConfigError, match="WORLD_SIZE is 4 and RANK is missing"):
        torchrun_variables({"WORLD_SIZE": "4"}, 29500)
    with pytest.raises(ConfigError, match="MPI_LOCALRANKID is missing"):
        torchrun_variables({name: v for name, v in MPICH.items() if name != "MPI_LOCALRANKID"}, 29500)


def test_a_process_alone_stays_alone_and_torchrun_counts_first():
    assert torchrun_variables({}, 29500) == {}
    assert torchrun_variables({"WORLD_SIZE": "1", "OMPI_COMM_WORLD_SIZE": "1"}, 29500) == {}
    batch_script = {"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}  # no srun
    assert torchrun_variables(batch_script, 29500) == {}
    given = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    assert torchrun_variables(OPEN_MPI | given, 29500) == {}


def test_two_processes_of_open_mpi_are_one_group():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    running = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT],
            env={**os.environ, **OPEN_MPI, "MASTER_PORT": str(port)}
            | {f"OMPI_COMM_WORLD_{name}": str(rank) for name in ("RANK", "LOCAL_RANK")},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=120)[0].split() for process in running]
    assert said == [["0", "2", "0"], ["1", "2", "1"]]

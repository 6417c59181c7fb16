"""PURE: which process this is, from the environment variables of torchrun, Open MPI, MPICH and Slurm.

In: an environment. Out: torchrun's variables; none where a process was started alone. Next: `distributed` makes the
process group of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .errors import ConfigError

HOW = "or start the script with `torchrun` or `zerostack run`"


@dataclass(frozen=True, kw_only=True)
class Launcher:
    """What a launcher calls the numbers of a process.

    Attributes:
        name: For people.
        size, rank, local_rank: Variables: processes, this one among all, this one on its machine.
        here: The variable that says whether all processes are on one machine, where it is equal to `here_if`.
        here_if: A variable, or a number.
    """

    name: str
    size: str
    rank: str
    local_rank: str
    here: str
    here_if: str


LAUNCHERS = (
    Launcher(
        name="Open MPI",
        size="OMPI_COMM_WORLD_SIZE",
        rank="OMPI_COMM_WORLD_RANK",
        local_rank="OMPI_COMM_WORLD_LOCAL_RANK",
        here="OMPI_COMM_WORLD_LOCAL_SIZE",
        here_if="OMPI_COMM_WORLD_SIZE",
    ),
    Launcher(
        name="MPICH",
        size="PMI_SIZE",
        rank="PMI_RANK",
        local_rank="MPI_LOCALRANKID",
        here="MPI_LOCALNRANKS",
        here_if="PMI_SIZE",
    ),
    Launcher(
        name="Slurm",
        size="SLURM_STEP_NUM_TASKS",  # srun's; SLURM_NTASKS is also there in a batch script, which is one process
        rank="SLURM_PROCID",
        local_rank="SLURM_LOCALID",
        here="SLURM_STEP_NUM_NODES",
        here_if="1",
    ),
)


def torchrun_variables(environ: Mapping[str, str], port: int, *, others: bool = True) -> dict[str, str]:
    """RANK, WORLD_SIZE, LOCAL_RANK and the rendezvous, as far as they are not in `environ` already.

    Args:
        environ: Of this process.
        port: Of the rendezvous, where MASTER_PORT does not say.
        others: Whether to look for launchers other than torchrun.

    Returns:
        What is to be set; nothing for a process that was started alone.

    Raises:
        ConfigError: There are several processes, and one cannot know which it is or where they meet.
    """
    if "RANK" in environ:
        given = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        return {name: value for name, value in given.items() if name not in environ}
    found = next((each for each in LAUNCHERS if _number(environ.get(each.size)) > 1), None)
    if found is None or not others:
        told = "WORLD_SIZE" if found is None else found.size
        if _number(environ.get(told)) > 1:
            raise ConfigError(
                f"{told} is {environ[told]} and RANK is missing: every process would train a model of its own; "
                f"set RANK and LOCAL_RANK, {HOW}"
            )
        return {}
    missing = [name for name in (found.rank, found.local_rank) if name not in environ]
    here = environ.get(found.here) == environ.get(found.here_if, found.here_if)
    if not here and "MASTER_ADDR" not in environ:
        missing.append("MASTER_ADDR (the host of rank 0)")
    if missing:
        raise ConfigError(
            f"{found.size} is {environ[found.size]} ({found.name}), and {', '.join(missing)} is missing: ranks cannot "
            f"find each other; set it, {HOW}"
        )
    made = {
        "RANK": environ[found.rank],
        "WORLD_SIZE": environ[found.size],
        "LOCAL_RANK": environ[found.local_rank],
        "MASTER_ADDR": environ.get("MASTER_ADDR", "127.0.0.1"),
        "MASTER_PORT": environ.get("MASTER_PORT", str(port)),
    }
    if here:
        made["LOCAL_WORLD_SIZE"] = environ[found.size]
    return made


def _number(text: str | None) -> int:
    return int(text) if text is not None and text.isdecimal() else 0

"""`zerostack run`: torch.distributed.run with `--num-procs`, one machine by default, and a sensible environment.

In: torchrun's own flags, a script and its arguments. Out: the script on every process. What is set beside torchrun's
own variables only makes it faster, so a script started here starts with torchrun too.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from ..machine import environment_of_each

_EXAMPLES = """\
examples:
  zerostack run --num-procs 4 train.py --lr 3e-4
  zerostack run --num-procs gpu train.py                           one process for each GPU
  zerostack run --nnodes 2 --num-procs 8 --rdzv-backend c10d --rdzv-endpoint host0:29500 train.py
  zerostack run --num-procs 2 -m my_package.train                  a module instead of a file

Everything before the script is for torch.distributed.run, everything after it for the script.
"""


def main(argv: Sequence[str]) -> int:
    """Start the script on every process and wait for it."""
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        num_procs = torchrun.determine_local_world_size(args.nproc_per_node)
    except ValueError as error:
        parser.error(f"--num-procs: {error}")
    if num_procs < 1:
        parser.error(f"--num-procs: expected at least 1, got {num_procs}")
    rendezvous = (
        "rdzv_backend",
        "rdzv_endpoint",
        "rdzv_id",
        "rdzv_conf",
        "master_addr",
        "master_port",
        "node_rank",
    )
    untouched = all(getattr(args, name) == parser.get_default(name) for name in rendezvous)
    args.standalone = args.standalone or (untouched and args.nnodes in {"1", "1:1"})
    os.environ.update(environment_of_each(num_procs))
    try:
        torchrun.run(args)
    except ChildFailedError as error:  # torchrun has reported which rank failed, and how
        _, failure = error.get_first_failure()
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    return 0


def _parser() -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = torchrun.get_args_parser()
    parser.prog = "zerostack run"
    parser.description = "Start a training script on several processes (torch.distributed.run)."
    parser.epilog = _EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--num-procs",
        "--num_procs",
        dest="nproc_per_node",
        metavar="N",
        help="processes on this machine: a number, or gpu, cpu, auto (same as --nproc-per-node)",
    )
    return parser

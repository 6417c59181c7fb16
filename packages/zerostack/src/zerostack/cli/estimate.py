"""`zerostack estimate`: bytes per rank for every stage and world size, as a table and a chart.

In: a number of parameters. Out: `zero_core.plan_memory`, side by side; with something offloaded,
`zero_offload_nvme.plan_tiers` too, and `zero_offload_nvme.preflight` for this machine. Nothing is allocated.
Source: ZeRO (Rajbhandari et al., arXiv:1910.02054), figure 1.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
import zero_core as zero
import zero_offload_nvme as off
from zero_offload_nvme.free_bytes import drive_free

from ..explain import num_bytes, table
from ..footprint import TIERS, offloaded
from .main import parser_for
from .text import complain, parse_count, say

_EXAMPLES = """\
  zerostack estimate --params 7.5e9 --world 1,4,16,64
  zerostack estimate --params 350M --world 8 --precision fp32 --optimizer sgd-momentum
  zerostack estimate --params 70B --world 64,256,1024 --plot memory.png
  zerostack estimate --params 13B --world 8 --stage 3 --offload-optimizer nvme --offload-param cpu --nvme-path /tmp
  zerostack estimate --params 1.3B --world 2 --stage 3 --offload-optimizer nvme --nvme-path /tmp --measure
"""

_PRECISIONS = {
    "bf16": zero.Precision(compute=torch.bfloat16),
    "fp16": zero.Precision(compute=torch.float16),
    "fp32": zero.Precision(),
}
_KINDS = {
    "params": "parameters",
    "grads": "gradients",
    "master": "fp32 master",
    "optimizer": "optimizer state",
}


def main(argv: Sequence[str]) -> int:
    """Print the table; draw the chart if asked."""
    parser = parser_for("estimate", _EXAMPLES)
    parser.add_argument("--params", type=parse_count, required=True, metavar="N", help="7.5e9, 350M, 1.3B")
    parser.add_argument(
        "--world", type=_integers, default=[1, 4, 16, 64], metavar="N,N", help="numbers of ranks"
    )
    parser.add_argument("--stage", type=_integers, default=[0, 1, 2, 3], metavar="S,S", help="ZeRO stages")
    parser.add_argument("--precision", choices=_PRECISIONS, default="bf16", help="dtype of the maths (bf16)")
    parser.add_argument("--optimizer", default="adam", help="adam, lion, adagrad, sgd-momentum or sgd (adam)")
    parser.add_argument(
        "--plot", type=_picture, metavar="FILE.png", help="draw a bar for each stage and world size"
    )
    parser.add_argument(
        "--offload-optimizer",
        choices=TIERS,
        default="none",
        help="where masters, optimizer state and (stages 2, 3) gradients rest (none)",
    )
    parser.add_argument(
        "--offload-param", choices=TIERS, default="none", help="where parameters rest at stage 3 (none)"
    )
    parser.add_argument("--nvme-path", type=Path, metavar="DIR", help="look at what is free there")
    parser.add_argument(
        "--ranks-per-machine", type=int, default=8, metavar="N", help="that share memory and drives (8)"
    )
    parser.add_argument(
        "--measure",
        action="store_true",
        help="how fast memory and the drive of this machine are, how long the optimizer's step takes with that, and "
        "whether it fits; some seconds for each stage, nothing else should run; 1 is returned where it does not fit",
    )
    args = parser.parse_args(argv)
    if args.ranks_per_machine < 1:
        parser.error(f"--ranks-per-machine: expected at least 1, got {args.ranks_per_machine}")
    if args.nvme_path is not None and "nvme" not in (args.offload_optimizer, args.offload_param):
        parser.error(
            "--nvme-path: nothing would rest there; give --offload-optimizer nvme or --offload-param nvme"
        )
    if args.measure and (args.offload_optimizer, args.offload_param) == ("none", "none"):
        parser.error("--measure: nothing is offloaded; give --offload-optimizer or --offload-param")
    if args.measure and args.nvme_path is None and "nvme" in (args.offload_optimizer, args.offload_param):
        parser.error("--measure: give --nvme-path, a folder of the drive to measure")
    try:
        plans = {
            (stage, world): zero.plan_memory(
                args.params,
                stage=stage,
                world=world,
                precision=_PRECISIONS[args.precision],
                optimizer=args.optimizer,
            )
            for stage in args.stage
            for world in args.world
        }
        tiers = {stage: _tier_plan(args, stage, args.world[-1]) for stage in args.stage}
    except (zero.ZeroConfigError, off.OffloadConfigError) as error:
        parser.error(str(error))
    say(f"Model states per rank: {args.params:g} parameters, {args.precision}, {args.optimizer}")
    say()
    say(_total_table(plans, args.stage, args.world))
    say()
    say(f"What they are made of on {args.world[-1]} rank(s)")
    say()
    say(_parts_table(plans, args.stage, args.world[-1]))
    say()
    if args.offload_optimizer != "none" or args.offload_param != "none":
        say(f"Where they rest on {args.world[-1]} rank(s), and what a machine's ranks hold together")
        say()
        say(_tier_table(tiers, min(args.ranks_per_machine, args.world[-1])))
        if args.nvme_path is not None:
            say(f"Free at {args.nvme_path}: {num_bytes(drive_free([str(args.nvme_path)]))}")
        say()
    say(
        "Not counted: activations, the units that are whole while they are used, and the allocator's own needs."
    )
    if args.plot is not None:
        _draw(plans, args.plot, f"{args.params:g} parameters, {args.precision}, {args.optimizer}")
        say(f"Chart: {args.plot}")
    return 1 if args.measure and not _fits_here(args) else 0


def _fits_here(args: argparse.Namespace) -> bool:
    """Print what `preflight` finds on this machine, stage by stage; whether everything fits."""
    world = args.world[-1]
    fits = True
    for stage in args.stage:
        tiers = offloaded(stage, params=args.offload_param, optimizer=args.offload_optimizer)
        if {tiers.params, tiers.grads, tiers.optimizer} == {"device"}:
            continue
        plan = partial(
            off.preflight,
            args.params,
            stage=stage,
            world=world,
            ranks=min(args.ranks_per_machine, world),
            path=args.nvme_path,
            params=tiers.params,
            grads=tiers.grads,
            optimizer=tiers.optimizer,
            optimizer_kind=args.optimizer,
            precision=_PRECISIONS[args.precision],
        )
        say()
        say(f"On this machine, at stage {stage}")
        say()
        found = why = None
        try:
            found = plan(measure=False)
            found.check()
            found = plan()
        except off.OffloadError as error:
            why = str(error)
        if found is not None:
            say(str(found))
        if why is not None:
            complain(why)
            fits = False
    return fits


def _integers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected whole numbers such as 1,4,16, got {text!r}") from None


def _picture(text: str) -> Path:
    if Path(text).suffix not in {".png", ".svg", ".pdf"}:
        raise argparse.ArgumentTypeError(
            f"expected a file name that ends in .png, .svg or .pdf, got {text!r}"
        )
    return Path(text)


Plans = dict[tuple[int, int], zero.MemoryPlan]


def _total_table(plans: Plans, stages: list[int], worlds: list[int]) -> str:
    head = ["stage", *[f"{world} rank{'s' if world > 1 else ''}" for world in worlds]]
    rows = [[str(s), *[num_bytes(plans[s, w].model_states) for w in worlds]] for s in stages]
    return table(head, rows)


def _parts_table(plans: Plans, stages: list[int], world: int) -> str:
    rows = [[str(s), *[num_bytes(getattr(plans[s, world], kind)) for kind in _KINDS]] for s in stages]
    return table(["stage", *_KINDS.values()], rows)


def _tier_plan(args: argparse.Namespace, stage: int, world: int) -> off.TierPlan:
    tiers = offloaded(stage, params=args.offload_param, optimizer=args.offload_optimizer)
    return off.plan_tiers(
        args.params,
        stage=stage,
        world=world,
        tiers=tiers,
        precision=_PRECISIONS[args.precision],
        optimizer=args.optimizer,
    )


def _tier_table(plans: dict[int, off.TierPlan], ranks: int) -> str:
    head = ["stage", "device", "host", "nvme", f"host, {ranks} rank(s)", f"nvme, {ranks} rank(s)"]
    rows = []
    for stage, plan in plans.items():
        device, host, nvme = plan.total("device"), plan.total("host"), plan.total("nvme")
        sizes = (device, host, nvme, ranks * host, ranks * nvme)
        rows.append([str(stage), *map(num_bytes, sizes)])
    return table(head, rows)


def _draw(plans: Plans, path: Path, title: str) -> None:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.use("Agg")
    figure = Figure(figsize=(1.6 + 0.7 * len(plans), 4.2), layout="constrained")
    axes = figure.add_subplot()
    labels = [f"stage {stage}\n{world}" for stage, world in plans]
    bottom = [0.0] * len(plans)
    for kind, label in _KINDS.items():
        heights = [getattr(plan, kind) / 1e9 for plan in plans.values()]
        axes.bar(labels, heights, bottom=bottom, label=label, width=0.7)
        bottom = [below + height for below, height in zip(bottom, heights, strict=True)]
    for position, top in enumerate(bottom):
        axes.text(position, top, f"{top:.3g}", ha="center", va="bottom", fontsize=8)
    axes.set(ylabel="GB on each rank", xlabel="ZeRO stage and number of ranks", title=title)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
